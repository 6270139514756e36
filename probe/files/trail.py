"""The trail of a run: weights of many steps, kept while it trains, each in a folder that `from_pretrained` takes.

RUN/trail/step_<n>/model.safetensors      written last and at once: where it is, the step is whole
                   config.json, manifest.json
          task.json, attnres_run.json     of all steps, with a manifest.json
          finished.json                   once training has ended: its last step
          *.lock                          empty: who holds one of them writes
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from attnres.files import MANIFEST, checked, checked_folder, remove, replacing, replacing_folder
from probe.files.checkpoints import Checkpoint, load_model, read_json
from probe.files.layout import RUN_FILE, TASK_FILE, TRAIL, TRAIL_FINISHED, TRAIL_STEP
from probe.files.locks import held

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Trail:
    """Steps of a run directory whose weights are kept. One process writes it, any may read it."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / TRAIL
        self._config: str | None = None
        self._syncing: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(max_workers=1)  # its thread starts with the first step that is written

    @classmethod
    def of(cls, run_dir: Path) -> Trail:
        """The trail of a run that has one. Raises ValueError if there is none."""
        found = cls(run_dir)
        if not found.folder.is_dir():
            raise ValueError(f"{run_dir} has no trail: attnres-train fit keeps one with trail.every_n_steps above 0")
        return found

    def folder_of(self, step: int) -> Path:
        """The folder of a step, whether it is there or not."""
        return self.folder / f"step_{step}"

    @property
    def steps(self) -> list[int]:
        """Steps that are there, whole, in order."""
        return sorted(step for step in self._all_steps() if (self.folder_of(step) / WEIGHTS).exists())

    @property
    def last_step(self) -> int | None:
        """The last step of a training that has ended; None while it goes on."""
        path = self.folder / TRAIL_FINISHED
        if not path.exists():
            return None
        step = read_json(path).get("step")
        if type(step) is not int or step < 0:
            raise ValueError(f"{path} must hold the last step of a training, an integer, got {step!r}")
        return step

    def start(self, step: int, task: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Training begins at `step`, or goes on from there: what was kept of later steps is removed.

        Args:
            task: settings of the task, for `task.json`.
            about: what `attnres_run.json` says of the run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove(self.folder / TRAIL_FINISHED)
        self.remove([later for later in self._all_steps() if later > step])
        _write_json(self.folder / TASK_FILE, task)
        _write_json(self.folder / RUN_FILE, about)

    def write(self, step: int, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
        """Keep `state`, the whole state dict of `model`, as that of `step`: all of it or nothing."""
        folder = self.folder_of(step)
        folder.mkdir(exist_ok=True)
        if self._config is None:
            self._config = _config_text(model)
        with replacing(folder / CONFIG, recorded=True) as part:
            part.write_text(self._config, encoding="utf-8")
        with replacing(folder / WEIGHTS, recorded=True) as part:
            save_file({name: state[name].contiguous() for name in _kept(model, state)}, part, {"format": "pt"})
        paths = (folder / CONFIG, folder / MANIFEST, folder / WEIGHTS, folder, self.folder)
        self._syncing.append(self._pool.submit(_sync, *paths))  # takes longer than all else: training does not wait

    def sync(self) -> None:
        """Wait until what was written outlives a loss of power: a checkpoint, which does, is not ahead of its trail.

        Raises:
            OSError: it cannot be made to.
        """
        while self._syncing:
            self._syncing.pop(0).result()

    def finish(self, step: int) -> None:
        """Training has ended at `step`."""
        self.sync()
        _write_json(self.folder / TRAIL_FINISHED, {"step": step})

    def remove(self, steps: Iterable[int]) -> None:
        """Remove steps, or what is left of them. Weights go first: the process may be killed in between."""
        for step in steps:
            (self.folder_of(step) / WEIGHTS).unlink(missing_ok=True)
            shutil.rmtree(self.folder_of(step), ignore_errors=True)

    def prune(self, kept: Collection[int]) -> list[int]:
        """Remove all steps but those that are `kept`, and return them. If it is killed, another call goes on."""
        removed = [step for step in self._all_steps() if step not in kept]
        self.remove(removed)
        return removed

    def load(self, step: int) -> Checkpoint:
        """The model of a step, in eval mode, with the run's task. Raises ValueError if it is not there, or torn."""
        self._check(step)
        return load_model(str(self.folder_of(step)))

    def export(self, step: int, folder: Path) -> None:
        """Copy a step into a new `folder` with all that a run's `hf/` has.

        Raises:
            ValueError: the step is not there, or `folder` is.
        """
        self._check(step)
        if folder.exists() or not folder.absolute().parent.is_dir():
            what = "exists" if folder.exists() else "cannot be made there"
            raise ValueError(f"{folder} {what}: choose another folder, nothing is overwritten")
        about = {**read_json(self.folder / RUN_FILE), "step": step}
        source = checked_folder(self.folder_of(step))
        paths = [source / CONFIG, source / WEIGHTS, checked(self.folder / TASK_FILE)]
        with held(self.folder, "export"), replacing_folder(folder) as part:
            for path in paths:
                shutil.copy(path, part)
            _write_json(part / RUN_FILE, about)

    def held(self, waits: bool = False) -> AbstractContextManager[None]:
        """Of all processes that probe the trail or prune it, one at a time is inside (`probe.files.locks.held`)."""
        return held(self.folder, "probing", waits)

    def _check(self, step: int) -> None:
        if step not in (steps := self.steps):
            nearest = sorted(sorted(steps, key=lambda other: abs(other - step))[:3])
            which = f"the nearest are {', '.join(map(str, nearest))}" if nearest else "there is no trail"
            raise ValueError(f"step {step} is not in {self.folder}: {which}")

    def _all_steps(self) -> list[int]:
        """Those that are not whole, too."""
        found = (TRAIL_STEP.fullmatch(folder.name) for folder in self.folder.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)


def step_size(model: PreTrainedModel) -> int:
    """Bytes of one step of the model's trail. Its parameters may be on the "meta" device, or divided over devices."""
    state = model.state_dict()
    return sum(state[name].numel() * state[name].element_size() for name in _kept(model, state))


def _kept(model: PreTrainedModel, state: Mapping[str, Tensor]) -> list[str]:
    """All weights of `state` but those that are tied to others."""
    tied = (model._tied_weights_keys or ()) if model.config.tie_word_embeddings else ()
    return [name for name in state if name not in tied]


def _sync(*paths: Path) -> None:
    """Those that are still there."""
    for path in paths:
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _config_text(model: PreTrainedModel) -> str:
    config: Any = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 renames the class
    return config.to_json_string(use_diff=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path, recorded=True) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
