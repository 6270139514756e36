"""In: `trainer.logger` and a run directory (`build.build_loggers`); in a run, metrics, probes and what was configured.
Out: `metrics.csv`, `probes.csv`, TensorBoard's log and W&B's files and workspace: views of a run, each number once."""
