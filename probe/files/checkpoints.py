"""CHECKPOINT on the command line: a run directory, a `.ckpt`, an exported folder, a step of a trail or a hub id."""

from __future__ import annotations

import errno
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from attnres import AttnResConfig
from attnres.files import checked, checked_folder
from attnres.inputs import LARGEST_INTEGER, check_number, parse_json, read_file
from attnres.tasks import Task, TextRecall, task_from_dict
from attnres.text import printable
from probe.files.layout import CHECKPOINTS, EXPORT, RUN_FILE, TASK_FILE, trail_step

INDEX, PICKLES = "model.safetensors.index.json", ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
UNKNOWN = -1
"""Seed or step of a checkpoint beside which nothing says."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with what lies beside it.

    Attributes:
        model: an `AttnResForCausalLM` or a `Qwen3ForCausalLM`, in eval mode.
        task: that it was trained or probed on; `None` where nothing says.
    """

    model: PreTrainedModel
    task: Task | TextRecall | None
    run: str
    condition: str
    seed: int
    step: int

    @property
    def title(self) -> str:
        """The run and, where it is known, the step."""
        return self.run if self.step == UNKNOWN else f"{self.run}, step {self.step}"


def load_model(source: str, any_causal_lm: bool = False) -> Checkpoint:
    """Load from a run directory (its `hf/`), an exported folder, a Lightning `.ckpt` or a hub id.

    Args:
        any_causal_lm: whether models that are neither AttnRes models nor a vanilla Qwen3 are taken, too.

    Raises:
        ValueError: nothing there, or not such a model.
    """
    path = Path(source)
    if path.suffix == ".ckpt":
        return _load_lightning(path)
    if path.is_dir():
        folder = _model_folder(path)
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{source} holds no model: expected a run directory with hf/config.json, an exported folder "
                "with config.json, a .ckpt file or a hub id"
            )
        above = folder.resolve().parent
        run = path.name if folder is not path else above.name if trail_step(folder) is None else above.parent.name
        return _load_exported(str(folder), run or path.resolve().name, folder, any_causal_lm)
    # A hub id is owner/name; where a folder of the owner's name lies here, a path was meant.
    if path.exists() or path.is_absolute() or source.count("/") != 1 or path.parent.exists():
        what = "is not a checkpoint" if path.exists() else "does not exist"
        raise ValueError(f"{source} {what}: expected a run directory, a .ckpt, an exported folder or a hub id")
    return _load_exported(source, source, None, any_causal_lm)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a run directory, an exported folder or a hub id.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    place = str(_model_folder(path)) if path.is_dir() else source
    hint = "give --tokenizer, a folder or a hub id with tokenizer files"
    if path.is_file() or path.suffix == ".ckpt":
        raise ValueError(f"{source} holds no tokenizer: {hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # by what is missing or malformed: OSError, ValueError, ImportError, KeyError, …
        raise ValueError(f"{source} holds no tokenizer that can be read ({first_line(error)}): {hint}") from error
    # Without tokenizer files, transformers makes an empty tokenizer for some models.
    if not tokenizer("name: code", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"{source} holds no tokenizer files: {hint}")
    return tokenizer


def _model_folder(path: Path) -> Path:
    return path / EXPORT if (path / EXPORT / "config.json").exists() else path


def check_weights(folder: Path) -> None:
    """Raise ValueError unless the weights of an exported folder are safetensors inside it, as they were written."""
    checked_folder(folder)
    if (adapter := folder / "adapter_config.json").exists():  # transformers would load the model that it names
        raise ValueError(
            f"{adapter}: {folder} is an adapter: merge it (peft's merge_and_unload), and probe what save_pretrained "
            "writes then"
        )
    if (index := folder / INDEX).exists():
        content = read_json(index)
        files = content.get("weight_map")
        if not isinstance(files, dict) or not files or not isinstance(content.get("metadata"), dict):
            raise ValueError(f"{index} must hold metadata and a weight_map, tensor -> file")
        for name in files.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} names {json.dumps(name)}, which is no safetensors file of {folder}")
    elif not (folder / "model.safetensors").exists():
        pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is read: where you trust it, convert "
                "the folder by from_pretrained(FOLDER).save_pretrained(NEW), which writes model.safetensors"
            )


def _load_exported(source: str, run: str, folder: Path | None, any_causal_lm: bool = False) -> Checkpoint:
    if folder is not None:
        check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a configuration checks itself, by errors of many kinds
        where = "no such local path, and not to be had from the hub"
        what = "its config.json is unreadable" if folder else where
        raise ValueError(f"{source}: {what} ({first_line(error)})") from error
    if not any_causal_lm:
        _check_model_type(source, config.model_type)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # of files, of tensors, or of sizes with which no layer can be made
        raise ValueError(f"{source}: its weights cannot be read ({first_line(error)})") from error
    model, info = loaded
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ValueError(f"{source} does not fit its config.json: {wrong}")
    step = trail_step(folder) if folder else None
    place = folder.resolve().parent if folder and step is not None else folder  # once for all steps of a trail
    beside = [place / name if place else None for name in (TASK_FILE, RUN_FILE)]
    task, about = (read_json(path) if path and path.exists() else {} for path in beside)
    return _checkpoint(model, task, run, about | ({} if step is None else {"step": step}))


def _load_lightning(path: Path) -> Checkpoint:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a .ckpt that attnres-train wrote")
    content = read_lightning(path)
    fields = dict(content["hyper_parameters"]["model_config"])
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        _check_model_type(str(path), config.model_type)
        model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # configurations and layers check themselves, by errors of many kinds
        raise ValueError(f"{path} holds no model of this version ({first_line(error)})") from error
    state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    check_state(path, state, model.state_dict())
    model.load_state_dict(state)
    task = content.get("datamodule_hyper_parameters", {}).get("task", {})
    about = {key: content["hyper_parameters"].get(key) for key in ("condition", "seed")}
    about["step"] = content.get("global_step")
    run = path.parent.parent.name if path.parent.name == "checkpoints" else path.stem
    return _checkpoint(model, task, run, about)


def read_lightning(path: Path) -> dict[str, Any]:
    """A checkpoint of attnres-train, its tensors mapped from the file.

    Raises:
        ValueError: it is torn, altered or not one of ours.
    """
    checked(path)
    cause = None
    try:
        # Reading all of it finds a file that was cut off or has a hole, by its checksums.
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if whole else {}
        config, state, step = content["hyper_parameters"]["model_config"], content["state_dict"], content["global_step"]
        task = content.get("datamodule_hyper_parameters", {}).get("task", {})
        is_state = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        has_model = isinstance(config, dict) and isinstance(config.get("model_type"), str) and is_state
        if has_model and isinstance(task, dict) and isinstance(step, int):
            return content
    except Exception as error:  # of many kinds, by what of an archive is torn
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which seeking to a torn place gives
            raise
        cause = error
    raise ValueError(
        f"'{path}' is not a checkpoint of attnres-train (RUN_DIR/{CHECKPOINTS}/*.ckpt), or not a whole one"
    ) from cause


def check_state(path: Path | str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first tensor, if a checkpoint's do not have the names and shapes of its model's."""
    for name in sorted(state.keys() | expected.keys()):
        held, needed = (list(values[name].shape) if name in values else "nothing" for values in (state, expected))
        if held != needed:
            raise ValueError(f"{path} does not fit the model that it names: {name} is {held}, not {needed}")


def _checkpoint(model: PreTrainedModel, task: dict[str, Any], run: str, about: dict[str, Any]) -> Checkpoint:
    by_config = model.config.attnres_source if isinstance(model.config, AttnResConfig) else "vanilla"
    known = {"condition": by_config, "seed": UNKNOWN, "step": UNKNOWN}
    known |= {key: value for key, value in about.items() if value is not None}
    for key in ("seed", "step"):
        if type(known[key]) is not int:
            raise ValueError(f"the {key} of {run}, beside its model, must be an integer, got {known[key]!r}")
        check_number(f"the {key} of {run}, beside its model,", known[key], UNKNOWN, LARGEST_INTEGER)
    condition, seed, step = printable(str(known["condition"])), int(known["seed"]), int(known["step"])
    return Checkpoint(model.eval(), task_from_dict(task) if task else None, printable(run), condition, seed, step)


def _check_model_type(source: str, model_type: str) -> None:
    if model_type not in (AttnResConfig.model_type, "qwen3"):
        raise ValueError(f"{source} is a '{model_type}' model; supported are qwen3_attnres and qwen3 (vanilla)")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError, naming the file, for anything else, or if it was altered."""
    content = read_file(checked(path))
    try:
        content = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a readable JSON file ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def first_line(error: Exception) -> str:
    """Of what an error says; and the next, if that ends in a colon. Its type, if it is no more than a key."""
    first, *others = str(error).strip().splitlines() or [""]
    if isinstance(error, KeyError) or not first:
        return f"{type(error).__name__} {first}".strip()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first
