"""Probes while a model trains: decides *when*; what a probe is, `probe.runner` says."""

from __future__ import annotations

import shutil
import time
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
from probe import publish, storage
from probe.runner import PARTS, Probe, ProbeSettings, check_task, probe_model, sweep_share

MODES = ("exact", "first_order", "both")
MIN_SEQUENCES, MIN_QUERIES = 64, 1024


class ProbeCallback(Callback):
    """Ablate the routing of the model in training, at steps that the schedule names, and write `probe/`.

    A probe leaves random state, train/eval mode and gradients as it found them: losses are bit for bit those of a run
    without it. Vanilla models, which have no routing, are left alone.

    Args:
        enabled: probe at all.
        every_n_steps: evenly spaced probes; 0 for none.
        log_spaced: also at steps 1, 2, 4, 8, …
        at_steps: also at these steps.
        accuracy_jump: also when validation accuracy has risen by this much since the last probe; 0 for never.
            Steps 0 and the last one are always probed.
        num_sequences: sequences per probe; `None` for the fewest that are allowed: 64, and 1,024 queries.
        positions: where ablations act, "all" and / or "query".
        families: source families to ablate.
        sublayers: "self_attn", "mlp", and / or "both" together.
        mode: "exact" ablations, "first_order" estimates of their effects (a few forwards for a whole grid), or "both".
        num_resamples: bootstrap resamples and sign flips.

    Raises:
        ValueError: a name that does not exist, a negative number, or fewer sequences than allowed.
    """

    def __init__(
        self,
        enabled: bool = True,
        every_n_steps: int = 50,
        log_spaced: bool = True,
        at_steps: list[int] | None = None,
        accuracy_jump: float = 0.1,
        num_sequences: int | None = None,
        positions: list[str] | None = None,
        families: list[str] | None = None,
        sublayers: list[str] | None = None,
        mode: str = "exact",
        num_resamples: int = 2000,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"probe.mode must be one of {', '.join(MODES)}, got '{mode}'")
        for name, value in (("every_n_steps", every_n_steps), ("accuracy_jump", accuracy_jump)):
            if value < 0:
                raise ValueError(f"probe.{name} must not be negative, got {value}")
        if any(step < 0 for step in at_steps or ()):
            raise ValueError(f"probe.at_steps must not be negative, got {min(at_steps or ())}")
        if num_sequences is not None and num_sequences < MIN_SEQUENCES:
            raise ValueError(f"probe.num_sequences must be at least {MIN_SEQUENCES}, got {num_sequences}")
        self.enabled = enabled
        self.every_n_steps = every_n_steps
        self.log_spaced = log_spaced
        self.at_steps = frozenset(at_steps or ())
        self.accuracy_jump = accuracy_jump
        self.num_sequences = num_sequences
        defaults = ProbeSettings()
        self.settings = ProbeSettings(
            positions=("all",) if positions is None else tuple(positions),
            families=defaults.families if families is None else tuple(families),
            sublayers=("self_attn", "mlp") if sublayers is None else tuple(sublayers),
            exact=mode != "first_order",
            first_order=mode != "exact",
            num_resamples=num_resamples,
        )
        self.last_step = -1
        self.last_accuracy = 0.0  # validation accuracy known at the last probe
        self.validation_accuracy = 0.0
        self.probe_seconds = 0.0
        self._started = 0.0

    def is_scheduled(self, step: int, max_steps: int) -> bool:
        """Whether the schedule (without accuracy jumps) names `step`."""
        return (
            step in (0, max_steps)
            or (self.every_n_steps > 0 and step % self.every_n_steps == 0)
            or (self.log_spaced and step & (step - 1) == 0)
            or step in self.at_steps
        )

    def scheduled_steps(self, max_steps: int) -> list[int]:
        """The steps of a run that the schedule names."""
        return [step for step in range(max_steps + 1) if self.is_scheduled(step, max_steps)]

    def settings_for(self, task: MQAR, world_size: int = 1) -> ProbeSettings:
        """The settings of a probe on `task` by `world_size` processes."""
        num_sequences = self.num_sequences or _min_sequences(task)
        batch_size = min(self.settings.batch_size, -(-num_sequences // world_size))  # a batch for each process
        return replace(self.settings, num_sequences=num_sequences, batch_size=batch_size)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not self._applies(pl_module):
            return
        self.check(self._task(trainer), pl_module.model)  # type: ignore[arg-type]

    def check(self, task: MQAR, model: torch.nn.Module) -> None:
        """Raise a ValueError if `model` is to be probed and cannot be, on this task and as configured."""
        if not self.enabled or not isinstance(model, AttnResForCausalLM):
            return
        check_task(task)
        if self.num_sequences is not None and self.num_sequences < _min_sequences(task):
            raise ValueError(
                f"probe.num_sequences ({self.num_sequences}) gives under {MIN_QUERIES} queries at "
                f"{task.num_pairs} pairs; it must be at least {_min_sequences(task)}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()
        if not self._applies(pl_module):
            return
        if trainer.is_global_zero:  # a resumed run goes on from its checkpoint: later rows are of steps to come
            storage.drop_steps_after(_directory(trainer), trainer.global_step)
            shutil.rmtree(_directory(trainer) / PARTS, ignore_errors=True)  # of a probe that was killed
            if trainer.global_step > 0:
                publish.log_rows_of_disk(trainer.loggers, _directory(trainer))
        trainer.strategy.barrier("before probes")
        if trainer.global_step == 0:
            self._probe_once(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.is_scheduled(trainer.global_step, trainer.max_steps):
            self._probe_once(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/accuracy")
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or accuracy is None or not self.accuracy_jump:
            return
        self.validation_accuracy = float(accuracy)
        if self.validation_accuracy - self.last_accuracy >= self.accuracy_jump:
            self._probe_once(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._probe_once(trainer, pl_module)
        if trainer.is_global_zero and self._applies(pl_module):
            publish.log_summary(trainer.loggers, _directory(trainer))

    def state_dict(self) -> dict[str, Any]:
        keys = ("last_step", "last_accuracy", "validation_accuracy", "probe_seconds")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key, value in state_dict.items():
            setattr(self, key, value)

    def _applies(self, pl_module: LightningModule) -> bool:
        return self.enabled and isinstance(pl_module.model, AttnResForCausalLM)

    @staticmethod
    def _task(trainer: Trainer) -> MQAR:
        return trainer.datamodule.task  # type: ignore[attr-defined]

    def _probe_once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe now, unless this step has been probed (several triggers can name one step).

        Several processes share the sequences among them; the first one puts the tables together.
        """
        step = trainer.global_step
        if not self._applies(pl_module) or step == self.last_step:
            return
        started = time.perf_counter()
        model: AttnResForCausalLM = pl_module.model  # type: ignore[assignment]
        task, directory = self._task(trainer), _directory(trainer)
        settings = self.settings_for(task, trainer.world_size)
        run = Path(trainer.default_root_dir).resolve().name
        is_shared = trainer.world_size > 1
        probe = None
        with undisturbed(model):
            model = whole_model(model)
            if is_shared:
                ranks = (trainer.global_rank, trainer.world_size)
                sweep_share(*ranks, model, task, settings, directory, run=run, step=step)
                trainer.strategy.barrier("probe")
            if trainer.is_global_zero:
                about = {"run": run, "condition": str(pl_module.condition), "seed": task.seed, "step": step}
                probe = probe_model(model, task, settings, directory, **about, resumable=is_shared)
        self.last_step, self.last_accuracy = step, self.validation_accuracy
        self.probe_seconds += time.perf_counter() - started
        if probe is not None:
            self._report(trainer, probe, step, directory)

    def _report(self, trainer: Trainer, probe: Probe, step: int, directory: Path) -> None:
        training = time.perf_counter() - self._started - self.probe_seconds
        timing = {"in_training_seconds": self.probe_seconds, "training_seconds": training}
        storage.write_summary(directory, {**probe.summary, "probe": {**probe.summary["probe"], **timing}})
        learned = "" if probe.summary["clean"]["task_learned"] else " (not learned)"
        rank_zero_info(
            f"probe at step {step}: accuracy {probe.accuracy:.3f}{learned} on the probe split, {probe.seconds:.1f} s"
        )
        publish.log_probe(trainer.loggers, probe, step)


def _min_sequences(task: MQAR) -> int:
    return max(MIN_SEQUENCES, -(-MIN_QUERIES // task.num_pairs))


def _directory(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "probe"


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
