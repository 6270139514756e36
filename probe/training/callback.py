"""Probes while a model trains: decides *when*; what a probe is, `probe.runner` says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info

from attnres import AttnResForCausalLM
from attnres.sharded import whole_model
from attnres.tasks import MQAR
from probe.ablation.grid import wide_scopes
from probe.files import tables as storage
from probe.files.checkpoints import read_json
from probe.files.layout import PARTS, PROBE, SUMMARY
from probe.files.runs import load_emergence
from probe.report.text import describe_emergence
from probe.runner import Effects, check_probe, inference, probe_model, sweep_share
from probe.settings import MIN_QUERIES, ProbeSettings, TrainingProbeSettings, fewest_sequences
from probe.training.publish import Publisher
from probe.training.schedule import Budget, Schedule, Settled, percent
from probe.vocabulary import Route

STATE = ("last_step", "last_full_step", "last_accuracy", "validation_accuracy", "stopped_at")
"""Attributes of the callback that a checkpoint keeps."""


class ProbeCallback(Callback):
    """Ablate the routing of the model in training, at steps that the schedule names, and write `probe/`.

    A probe leaves random state, train/eval mode and gradients as it found them: losses are bit for bit those of a run
    without it. Vanilla models, which have no routing, are left alone.

    Probes in training have no flip test. The probe of the last step, when training is done, is exact whatever the mode
    and of all scopes, and has the flip test; its cost is counted apart.

    Attributes:
        budget: what probes have cost, and may.
    """

    def __init__(self, settings: TrainingProbeSettings | None = None) -> None:
        self.settings = TrainingProbeSettings() if settings is None else settings
        self.schedule = Schedule(
            self.settings.every_n_steps, self.settings.log_spaced, frozenset(self.settings.at_steps or ())
        )
        self.settled = Settled(self.settings.settled_probes)
        self.budget = Budget(self.settings.max_probe_fraction)
        self.last_step = self.last_full_step = -1  # probed; probed as after training
        self.last_accuracy = 0.0  # validation accuracy known at the last probe
        self.validation_accuracy = 0.0
        self.stopped_at: int | None = None
        self._dropped: frozenset[int] = frozenset()
        self._decided_step = -1

    def settings_for(
        self, task: MQAR, model: AttnResForCausalLM, world_size: int = 1, full: bool = False
    ) -> ProbeSettings:
        """The settings of a probe on `task` by `world_size` processes; `full`: of the one after training."""
        settings, sites = self.settings, model.model.sites
        num_sequences = settings.num_sequences or fewest_sequences(task.num_pairs)
        batch_size = min(settings.batch_size, -(-num_sequences // world_size))  # a batch for each process
        settings = replace(settings, num_sequences=num_sequences, batch_size=batch_size)
        if full:
            return replace(settings, scopes=None, mode="both" if settings.first_order else "exact")
        return replace(settings, scopes=settings.scopes or wide_scopes(sites), flip=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not self._applies(pl_module):
            return
        self.check(self._task(trainer), pl_module.model)  # type: ignore[arg-type]

    def check(self, task: MQAR, model: torch.nn.Module) -> None:
        """Raise a ValueError if `model` is to be probed and cannot be, on this task and as configured."""
        if not self.settings.enabled or not isinstance(model, AttnResForCausalLM):
            return
        least = fewest_sequences(task.num_pairs)
        if self.settings.num_sequences is not None and self.settings.num_sequences < least:
            raise ValueError(
                f"probe.num_sequences ({self.settings.num_sequences}) gives under {MIN_QUERIES} queries at "
                f"{task.num_pairs} pairs; it must be at least {least}"
            )
        check_probe(model, task, self.settings_for(task, model))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.budget.start()
        self._decided_step = trainer.global_step
        if not self._applies(pl_module):
            return
        self._publisher = Publisher(trainer.loggers, _directory(trainer))
        dropped: list[int] = []
        if trainer.is_global_zero:  # a resumed run goes on from its checkpoint: later rows are of steps to come
            dropped = storage.drop_steps_after(_directory(trainer), trainer.global_step)
            shutil.rmtree(_directory(trainer) / PARTS, ignore_errors=True)  # of a probe that was killed
            if trainer.global_step > 0:
                self._publisher.log_rows_of_disk()
        self._dropped = frozenset(trainer.strategy.broadcast(dropped))  # loggers have their rows: they must come again
        if trainer.global_step == 0:
            self._probe(trainer, pl_module, obligatory=True)
        elif self.settings.stop_when_settled and self.settled.is_settled:  # killed while it was stopping
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._decided_step or not self._applies(pl_module):  # batches may be accumulated
            return
        self._decided_step = step
        self.budget.step_done(step)
        if step == trainer.max_steps:
            self._probe_fully(trainer, pl_module)
        elif step in self._dropped or step in self.schedule.at_steps:
            self._probe(trainer, pl_module, obligatory=True)
        elif self.schedule.names(step, trainer.max_steps):
            if self._can_afford(trainer):
                self._probe(trainer, pl_module)
            else:
                self._skip(step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/accuracy")
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or accuracy is None or not self.settings.accuracy_jump or not self._applies(pl_module):
            return
        self.validation_accuracy = float(accuracy)
        if trainer.global_step == self.last_step:
            self.last_accuracy = self.validation_accuracy
        # A jump that cannot be afforded waits: accuracy will still have risen at the next validation.
        has_jumped = self.validation_accuracy - self.last_accuracy >= self.settings.accuracy_jump
        if has_jumped and self._can_afford(trainer, jump=True):
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._applies(pl_module):
            return
        self._probe_fully(trainer, pl_module)
        if trainer.is_global_zero:
            storage.forget_dropped(_directory(trainer))
            self._conclude(Path(trainer.default_root_dir))
            self._publisher.log_summary()

    def state_dict(self) -> dict[str, Any]:
        parts = {"budget": self.budget.state_dict(), "settled": self.settled.state_dict()}
        return {key: getattr(self, key) for key in STATE} | parts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key in STATE:
            setattr(self, key, state_dict.get(key, getattr(self, key)))
        if "budget" in state_dict:
            self.budget.load_state_dict(state_dict["budget"])
            self.settled.load_state_dict(state_dict["settled"])
        else:
            rank_zero_info(
                "the checkpoint does not say what probes have cost: probe.max_probe_fraction counts from here"
            )

    def _applies(self, pl_module: LightningModule) -> bool:
        return self.settings.enabled and isinstance(pl_module.model, AttnResForCausalLM)

    @staticmethod
    def _task(trainer: Trainer) -> MQAR:
        return trainer.datamodule.task  # type: ignore[attr-defined]

    def _can_afford(self, trainer: Trainer, jump: bool = False) -> bool:
        """The first process's clock decides for all."""
        if self.budget.max_fraction is None:
            return True
        allowed = self.budget.allows(trainer.global_step, trainer.max_steps, self.schedule, jump)
        return trainer.strategy.broadcast(allowed)

    def _skip(self, step: int) -> None:
        if not self.budget.skipped:
            rank_zero_info(
                f"probes are limited to {percent(self.budget.max_fraction)} of training time "
                f"(probe.max_probe_fraction): skipping step {step}, and others"
            )
        self.budget.skipped = [*self.budget.skipped, step]

    def _probe(self, trainer: Trainer, pl_module: LightningModule, obligatory: bool = False) -> None:
        """Probe now, unless this step has been probed (several triggers can name one step)."""
        step, started = trainer.global_step, self.budget.clock()
        if step == self.last_step:
            return
        probe = self._run_probe(trainer, pl_module, full=False)
        self.last_step, self.last_accuracy = step, self.validation_accuracy
        if probe is not None:
            self._report(trainer, probe)
        if self.settings.stop_when_settled:
            self._stop_if_settled(trainer, probe)
        self.budget.add(step, self.budget.clock() - started, obligatory)
        if probe is not None:
            self._write_summary(_directory(trainer), probe.summary)

    def _probe_fully(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The probe after training, unless it has been made; it replaces one of this step in training."""
        step, started = trainer.global_step, self.budget.clock()
        if step == self.last_full_step:
            return
        probe = self._run_probe(trainer, pl_module, full=True)
        if probe is not None:  # loggers may have this step's estimates, not its exact effects
            self._report(trainer, probe)
        self.last_step = self.last_full_step = step
        self.last_accuracy = self.validation_accuracy
        self.budget.add_after_training(self.budget.clock() - started)
        if probe is not None:
            self._write_summary(_directory(trainer), probe.summary)

    def _run_probe(self, trainer: Trainer, pl_module: LightningModule, full: bool) -> Effects | None:
        """Several processes share the sequences among them; the first one puts the tables together, and has them."""
        model: AttnResForCausalLM = pl_module.model  # type: ignore[assignment]
        task, directory, step = self._task(trainer), _directory(trainer), trainer.global_step
        settings = self.settings_for(task, model, trainer.world_size, full)
        run = Path(trainer.default_root_dir).resolve().name
        is_shared = trainer.world_size > 1
        with undisturbed(model):
            model = whole_model(model)
            if is_shared:
                ranks = (trainer.global_rank, trainer.world_size)
                sweep_share(*ranks, model, task, settings, directory, run=run, step=step)
                trainer.strategy.barrier("probe")
            if not trainer.is_global_zero:
                return None
            about = {"run": run, "condition": str(pl_module.condition), "seed": task.seed, "step": step}
            return probe_model(model, task, settings, directory, **about, resumable=is_shared)

    def _report(self, trainer: Trainer, probe: Effects) -> None:
        step, learned = trainer.global_step, "" if probe.summary["clean"]["task_learned"] else " (not learned)"
        rank_zero_info(
            f"probe at step {step}: accuracy {probe.accuracy:.3f}{learned} on the probe split, {probe.seconds:.1f} s"
        )
        self._publisher.log_probe(probe, step)

    def _stop_if_settled(self, trainer: Trainer, probe: Effects | None) -> None:
        """On all processes, as the first one finds."""
        if probe is not None:
            motifs = [(motif["sublayer"], motif["scope"], motif["family"]) for motif in probe.summary["motifs"]]
            self.settled.update(motifs, probe.summary["clean"]["task_learned"])
        self.settled.load_state_dict(trainer.strategy.broadcast(self.settled.state_dict()))
        if self.settled.is_settled:
            trainer.should_stop, self.stopped_at = True, trainer.global_step
            found = "; ".join(str(Route(*motif)) for motif in self.settled.motifs)
            rank_zero_info(
                f"stopping at step {trainer.global_step} (probe.stop_when_settled): the task is learned and the motifs "
                f"have been the same at {self.settled.count} probes in a row ({found})"
            )

    def _write_summary(self, directory: Path, summary: dict[str, Any]) -> None:
        cost = {**self.budget.to_dict(), "stopped_when_settled": self.stopped_at}
        storage.write_summary(directory, {**summary, "probe": {**summary["probe"], **cost}})

    def _conclude(self, run_dir: Path) -> None:
        """Training has ended: the summary is brought up to date, with when motifs emerged, and probes are summed up."""
        summary = read_json(run_dir / PROBE / SUMMARY)
        emergence = None
        if self.settings.finds_motifs:
            emergence = load_emergence(run_dir, inference(self.settings))
        if emergence is not None:
            summary["emergence"] = emergence.to_dict()
            rank_zero_info(describe_emergence(emergence))
        self._write_summary(run_dir / PROBE, summary)
        rank_zero_info(str(self.budget))


def _directory(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / PROBE


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluate inside without a trace: random state (Python, NumPy, torch, CUDA) and every module's mode come back."""
    modes = [(module, module.training) for module in model.modules()]
    with isolate_rng(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
