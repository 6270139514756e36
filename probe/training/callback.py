"""Probes while a model trains: decides *when*; what a probe is, `probe.runner` says."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

from attnres import AttnResForCausalLM
from attnres.sharded import whole_model
from attnres.tasks import Task
from probe.failures import in_words, is_of_the_disk
from probe.files import tables as storage
from probe.files.failed import FailedProbes
from probe.files.layout import PARTS, PROBE
from probe.files.trail import Trail
from probe.runner import Effects, check_probe
from probe.settings import MIN_QUERIES, TrainingProbeSettings, fewest_sequences
from probe.training.curves import measurable, measure_curves
from probe.training.publish import Publisher
from probe.training.schedule import Cost, Schedule, Settled
from probe.training.shared import FewFailures, Team, probe_together, settings_of_probe
from probe.training.trail import conclude, probe_trail
from probe.vocabulary import Route

STATE = ("probed", "last_accuracy", "validation_accuracy", "stopped_at")
"""Attributes of the callback that a checkpoint keeps."""


class ProbeCallback(Callback):
    """Ablate the routing of the model in training, at steps that the schedule names, and write `probe/`.

    A probe that fails does not end training: a line says so, `probe/failed.json` keeps it, and training goes on. A full
    or broken disk ends it, as it would at the next checkpoint.

    A probe leaves random state, train/eval mode and gradients as it found them: losses are bit for bit those of a run
    without it. Vanilla models, which have no routing, are left alone, but for the curves of their trail.

    Probes in training have no flip test, nor have those of the trail, which come when training has ended. The probe of
    the last step, which is made at the very end, is exact whatever the mode and of all scopes, and has the flip test.
    How the flip test comes out through training, the curves say (`probe.training.curves`).

    Attributes:
        cost: what probes have cost.
    """

    def __init__(self, settings: TrainingProbeSettings | None = None) -> None:
        self.settings = TrainingProbeSettings() if settings is None else settings
        self.schedule = Schedule(
            self.settings.every_n_steps, self.settings.log_spaced, frozenset(self.settings.at_steps or ())
        )
        self.settled = Settled(self.settings.settled_probes)
        self.cost = Cost()
        self.probed: list[int] = []  # in training
        self.last_accuracy = 0.0  # validation accuracy known at the last probe
        self.validation_accuracy = 0.0
        self.stopped_at: int | None = None
        self._decided_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not self._applies(pl_module):
            return
        self.check(self._task(trainer), pl_module.model)  # type: ignore[arg-type]

    def check(self, task: Task, model: torch.nn.Module) -> None:
        """Raise a ValueError if `model` is to be probed and cannot be, on this task and as configured."""
        if not self.settings.enabled or not isinstance(model, AttnResForCausalLM):
            return
        least = fewest_sequences(task.num_queries)
        if self.settings.num_sequences is not None and self.settings.num_sequences < least:
            raise ValueError(
                f"probe.num_sequences ({self.settings.num_sequences}) gives under {MIN_QUERIES} queries at "
                f"{task.num_queries} a sequence; it must be at least {least}"
            )
        check_probe(model, task, settings_of_probe(self.settings, task, model))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.cost.start()
        self._decided_step = trainer.global_step
        if not self.settings.enabled:
            return
        self._publisher = Publisher(trainer.loggers, _directory(trainer))
        if trainer.is_global_zero:  # a resumed run goes on from its checkpoint: later rows are of steps to come
            storage.drop_steps_after(_directory(trainer), trainer.global_step)
            FailedProbes(_directory(trainer)).remove_after(trainer.global_step if trainer.global_step else -1)
            shutil.rmtree(_directory(trainer) / PARTS, ignore_errors=True)  # of a probe that was killed
            if trainer.global_step > 0:
                with guarded("to tell the loggers of earlier probes"):
                    self._publisher.log_rows_of_disk()
                    self._publisher.log_curves_of_disk()
        if not self._applies(pl_module):
            return
        if trainer.global_step == 0:
            self._probe(trainer, pl_module)
        elif self.settings.stop_when_settled and self.settled.is_settled:  # killed while it was stopping
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._decided_step or not self._applies(pl_module):  # batches may be accumulated
            return
        self._decided_step = step
        if step < trainer.max_steps and self.schedule.names(step, trainer.max_steps):
            self._probe(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/accuracy")
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or accuracy is None or not self.settings.accuracy_jump or not self._applies(pl_module):
            return
        self.validation_accuracy = float(accuracy)
        if trainer.global_step in self.probed[-1:]:
            self.last_accuracy = self.validation_accuracy
        has_jumped = self.validation_accuracy - self.last_accuracy >= self.settings.accuracy_jump
        if has_jumped and trainer.global_step < trainer.max_steps:
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        probe = None
        if self._applies(pl_module):
            with guarded("to probe the trail"):
                self._probe_trail(trainer)
            with self.cost.counted("after_training"):
                probe = self._run_probe(trainer, pl_module, full=True)
        if self.settings.enabled:
            with guarded("to measure curves on the trail"):
                self._measure_curves(trainer)
        if probe is None:
            return
        with guarded("to sum up the probes"):
            self._report(trainer.global_step, probe)
            self._publisher.log_probe(probe, trainer.global_step)  # of this step loggers may have estimates already
            emergence = conclude(Path(trainer.default_root_dir), self.settings, self._costs())
            for line in (emergence, str(self.cost)):
                rank_zero_info(line or "")
            self._publisher.log_summary()

    def state_dict(self) -> dict[str, Any]:
        parts = {"cost": self.cost.state_dict(), "settled": self.settled.state_dict()}
        return {key: getattr(self, key) for key in STATE} | parts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of checkpoints of before there was a trail, which know less."""
        for key in STATE:
            setattr(self, key, state_dict.get(key, getattr(self, key)))
        self.cost.load_state_dict(state_dict.get("cost", {}))
        if "settled" in state_dict:
            self.settled.load_state_dict(state_dict["settled"])

    def _applies(self, pl_module: LightningModule) -> bool:
        return self.settings.enabled and isinstance(pl_module.model, AttnResForCausalLM)

    @staticmethod
    def _task(trainer: Trainer) -> Task:
        return trainer.datamodule.task  # type: ignore[attr-defined]

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe now, unless this step has been probed (several triggers can name one step)."""
        step = trainer.global_step
        if step in self.probed[-1:]:
            return
        with self.cost.counted("in_training"):
            probe = self._run_probe(trainer, pl_module, full=False)
            self.probed = [*self.probed, step]
            self.last_accuracy = self.validation_accuracy
            if probe is not None:
                self._report(step, probe)
                with guarded(f"to tell the loggers of the probe at step {step}"):
                    self._publisher.log_probe(probe, step)
            if self.settings.stop_when_settled:
                self._stop_if_settled(trainer, probe)
        self.cost.num_probed += 1
        if probe is not None:
            summary = probe.summary | {"probe": probe.summary["probe"] | self._costs()}
            storage.write_summary(_directory(trainer), summary)

    def _probe_trail(self, trainer: Trainer) -> None:
        """Probe the trail, if there is one, and tell the loggers of it and of what another process has probed."""
        run_dir, team = Path(trainer.default_root_dir), _team(trainer)
        if not team.broadcast(bool(self.settings.trail_probes and Trail(run_dir).steps)):
            return
        with self.cost.counted("on_trail"), _hold(Trail(run_dir)) if team.is_first else nullcontext():
            last = trainer.global_step  # is probed next
            how = {"device": trainer.strategy.root_device, "taken": {last}, "team": team, "report": self._report}
            done = probe_trail(run_dir, self.settings, **how, on_failure=FewFailures(partial(record_failure, trainer)))
        self.cost.num_of_trail += len(done)
        if trainer.is_global_zero:
            self._publisher.log_rows_of_disk(told={*self.probed, last})

    def _measure_curves(self, trainer: Trainer) -> None:
        """By the first process, step by step: curves on the trail, if there is one, of any architecture."""
        run_dir, team = Path(trainer.default_root_dir), _team(trainer)
        kinds = measurable(self.settings.curves, self._task(trainer))
        if not team.broadcast(bool(kinds and self.settings.trail_probes and Trail(run_dir).steps)):
            return
        how: dict[str, Any] = {
            "device": trainer.strategy.root_device,
            "team": team,
            "on_failure": FewFailures(partial(record_failure, trainer)),
        }
        try:
            with self.cost.counted("on_curves"), _hold(Trail(run_dir)) if team.is_first else nullcontext():
                done = measure_curves(run_dir, replace(self.settings.of_curves, kinds=kinds), **how)
            rank_zero_info(f"curves ({', '.join(kinds)}) at {len(done)} steps of the trail: {run_dir / PROBE}")
        finally:
            if trainer.is_global_zero:
                self._publisher.log_curves_of_disk(is_new=True)

    def _run_probe(self, trainer: Trainer, pl_module: LightningModule, full: bool) -> Effects | None:
        """Several processes share the sequences among them; the first one puts the tables together, and has them.

        None elsewhere, and if the probe has failed.
        """
        model: AttnResForCausalLM = pl_module.model  # type: ignore[assignment]
        task, team = self._task(trainer), _team(trainer)
        settings = settings_of_probe(self.settings, task, model, team.size, full)
        about = {"run": Path(trainer.default_root_dir).resolve().name, "condition": str(pl_module.condition)}
        about |= {"seed": task.seed, "step": trainer.global_step}
        probe = None
        try:
            with undisturbed(model):
                probe = probe_together(team, whole_model(model), task, settings, _directory(trainer), **about)
        except Exception as error:
            record_failure(trainer, trainer.global_step, error)
        if probe is not None:
            with guarded("to record that a probe has not failed"):
                FailedProbes(_directory(trainer)).remove(trainer.global_step)
        return probe

    @staticmethod
    def _report(step: int, probe: Effects) -> None:
        learned = "" if probe.summary["clean"]["task_learned"] else " (not learned)"
        rank_zero_info(
            f"probe at step {step}: accuracy {probe.accuracy:.3f}{learned} on the probe split, {probe.seconds:.1f} s"
        )

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

    def _costs(self) -> dict[str, Any]:
        return {**self.cost.to_dict(), "stopped_when_settled": self.stopped_at}


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """What fails inside is left out, and a line says `what`. A full or broken disk is not passed over."""
    try:
        yield
    except Exception as error:
        if is_of_the_disk(error):
            raise
        say(f"training has failed {what} ({in_words(error)[:300]}) and goes on without")


def record_failure(trainer: Trainer, step: int, error: Exception) -> None:
    """The probe of `step` has failed in all processes. Raises the error if that is of a full or broken disk."""
    if is_of_the_disk(error):
        raise error
    if trainer.is_global_zero:
        say(f"the probe at step {step} has failed ({in_words(error)[:300]}); training goes on without it")
        shutil.rmtree(_directory(trainer) / PARTS, ignore_errors=True)  # would be taken for those of the next probe
        with guarded("to record it"):
            FailedProbes(_directory(trainer)).add(step, error)


@contextmanager
def _hold(trail: Trail) -> Iterator[None]:
    """Keep other processes from probing the trail; wait for one that does, and so probes it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(trail.held())
        except ValueError:
            rank_zero_info(f"waiting for another process that probes {trail.folder}")
            stack.enter_context(trail.held(waits=True))
        yield


@rank_zero_only
def say(line: str) -> None:
    print(f"attnres-train: {line}", file=sys.stderr, flush=True)


def _directory(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / PROBE


def _team(trainer: Trainer) -> Team:
    strategy = trainer.strategy
    return Team(trainer.global_rank, trainer.world_size, strategy.broadcast, strategy.reduce_boolean_decision)


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
