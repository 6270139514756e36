"""Small finished runs, the commands that are disturbed, and what a command has left, so that two can be compared."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from attnres.files import MANIFEST, checked, read_manifest
from probe.files.layout import METRICS, PREVIOUS_CHECKPOINT, PROVENANCE

SIZE = {
    "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 4, "warmup_steps": 1},
    "data": {"task": {"init_args": {"num_pairs": 8, "vocab_size": 32}}, "batch_size": 4, "num_validation_examples": 8},
    "trainer": {"accelerator": "cpu", "val_check_interval": 2, "log_every_n_steps": 1, "max_steps": 6},
    "probe": {"every_n_steps": 0, "log_spaced": False, "accuracy_jump": 0, "num_resamples": 20, "trail_probes": 3},
    "trail": {"every_n_steps": 2},
}
SIZE["model"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "attnres_num_blocks": 2, "learning_rate": 0.02}
SIZE["probe"] |= {"scopes": ["early", "all"], "sublayers": ["mlp"]}
FIT = [
    f"--{group}.{name}={value if isinstance(value, str) else json.dumps(value)}"
    for group, options in SIZE.items()
    for name, value in options.items()
]
PROBE = ["--num_sequences", "16", "--num_resamples", "20", "--device", "cpu", "--batch_size", "4"]
PROBE += ["--sublayers", "[mlp]", "--scopes", "[early,all]"]
STUDY = {"base": ["size.yaml"], "conditions": {"small": []}, "seeds": [0], "probe": " ".join(PROBE)}

PAGE = 4096
OF_CHECKPOINT = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "TaskDataModule")
TIMES = re.compile("seconds|fraction|^code$|^n_of_trail$|^n_probed$")
"""Keys of what differs each time, or is counted from the last start on."""


@dataclass(frozen=True)
class Command:
    """A command, given in a folder of its own.

    Attributes:
        given: what of the finished runs is in that folder, and is not to be changed but for `writes`.
        writes: files and folders that the command may write.
    """

    words: tuple[str, ...]
    given: tuple[str, ...]
    writes: tuple[str, ...]


def _command(words: str | list[str], given: str, writes: str) -> Command:
    words = words.split() if isinstance(words, str) else words
    return Command(tuple(words), tuple(given.split()), tuple(writes.split()))


_TRAIN = ["attnres-train", "fit", "--ckpt_path", "last", *FIT]
COMMANDS = {
    "fit": _command([*_TRAIN, "--run_dir", "new"], "", "new"),
    "resume": _command([*_TRAIN, "--run_dir", "half"], "half", "half"),
    "run": _command(["attnres-probe", "run", "run", "--output", "out", *PROBE], "run", "out"),
    "baseline": _command(
        ["attnres-probe", "baseline", "vanilla", "--num_blocks", "2", "--output", "seen", *PROBE], "vanilla", "seen"
    ),
    "trail": _command("attnres-probe trail run --num_probes 4", "run", "run/probe run/trail/probing.lock"),
    "report": _command(
        "attnres-probe report probed",
        "probed",
        "probed/report.html probed/report.txt probed/figures probed/claims.json",
    ),
    "compare": _command(
        "attnres-probe compare probed wrapped --num_resamples 20 --output c.parquet", "probed wrapped", "c.parquet"
    ),
    "export": _command("attnres-probe export run 2 copy", "run", "copy run/trail/export.lock"),
    "prune": _command("attnres-probe prune run", "run", "run/trail"),
    "verify": _command("attnres-probe verify run", "run", ""),
    "study": _command("attnres-train study --config study.yaml --dir study", "study.yaml size.yaml", "study"),
}
FINISHED = {
    "run": [*_TRAIN, "--run_dir", "run"],
    "half": [*_TRAIN, "--run_dir", "half"],  # stopped after its first checkpoint, by `make`
    "probed": ["attnres-probe", "run", "run", "--output", "probed", *PROBE],
    "vanilla": [*_TRAIN, "--run_dir", "vanilla", "--model.architecture=vanilla", "--probe.enabled=false"],
    "wrapped": ["attnres-probe", "baseline", "vanilla", "--num_blocks", "2", "--output", "wrapped", *PROBE],
}
"""The runs that other commands are given, and how they are made."""


def write_study(folder: Path) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "size.yaml").write_text(yaml.safe_dump(SIZE))


def lay_out(finished: Path, given: tuple[str, ...], folder: Path) -> None:
    """Copy what a command is given into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in given:
        source = finished / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy2(source, folder / name)


def contents(folder: Path) -> dict[str, str]:
    """[file] -> digest of its bytes."""
    return {str(p.relative_to(folder)): _hash(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def size(finished: Path, given: tuple[str, ...]) -> int:
    """Bytes that `lay_out` takes of a file system: whole pages, and one for each folder."""
    paths = [path for name in given for path in [finished / name, *(finished / name).rglob("*")]]
    return sum(PAGE * (1 + path.stat().st_size // PAGE) if path.is_file() else PAGE for path in paths)


def results(folder: Path, ignored: str = "") -> dict[str, str]:
    """[file] -> digest of what it says, without what differs each time: timings, starts, locks.

    Args:
        ignored: a file that is left out.

    Raises:
        ValueError: a file is not what its manifest says.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (
            name == ignored
            or not path.is_file()
            or path.suffix == ".lock"
            or "wandb" in path.parts
            or "locks" in path.parts
        ):
            continue
        if path.name == MANIFEST:
            found[name] = ",".join(sorted(read_manifest(path.parent)))
            continue
        found[name] = _hash(_say(checked(path)))
    return found


def is_close(a: Path, b: Path) -> bool:
    """Whether two tables or JSON files say the same up to rounding of float32 sums."""
    if a.suffix == ".parquet":
        left, right = (pd.read_parquet(path) for path in (a, b))
    elif a.suffix == ".json":
        left, right = (pd.json_normalize(_timeless(json.loads(path.read_text()))) for path in (a, b))
    else:
        return False
    try:
        pd.testing.assert_frame_equal(left, right, check_exact=False, rtol=1e-4, atol=1e-6)
    except AssertionError:
        return False
    return True


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _say(path: Path) -> bytes:
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        return table.drop(columns=[name for name in table if "seconds" in name]).to_csv().encode()
    if path.name == METRICS:
        table = pd.read_csv(path, dtype=str)
        kept = table.drop(columns=list(table.filter(like="throughput/")))
        return kept[sorted(kept)].dropna(how="all", subset=kept.columns.difference(["epoch", "step"])).to_csv().encode()
    if path.name == PROVENANCE:  # a start more for each time that it was stopped
        return json.dumps(sorted(json.loads(path.read_text()))).encode()
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(path.read_text())), sort_keys=True).encode()
    if path.name == PREVIOUS_CHECKPOINT:  # which step it is of depends on where training was stopped
        return b""
    if path.suffix == ".ckpt":
        content = torch.load(path, weights_only=True)
        return _bytes({key: content[key] for key in OF_CHECKPOINT})
    if path.suffix in (".pdf", ".html", ".csv", ".txt", ".yaml", ".safetensors", ".png"):
        return path.read_bytes()
    return b""


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(item) for key, item in value.items() if not TIMES.search(key)}
    return [_timeless(item) for item in value] if isinstance(value, list | tuple) else value


def _bytes(value: Any) -> bytes:
    """Of tensors, in depth."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    if isinstance(value, Mapping):
        return b"".join(str(key).encode() + _bytes(item) for key, item in value.items())
    return b"".join(map(_bytes, value)) if isinstance(value, list) else repr(value).encode()
