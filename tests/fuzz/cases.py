"""Hostile commands, each with what was done before it: the rows of `docs/errors.md`, and tests.

Capitals in a command are paths: RUN is a finished run (a copy of it, where something is done to it first), VANILLA and
WORDS are exported models, FILE is a file that the case writes, NEW a path where nothing is.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

import probe.cli
from attnres.files import MANIFEST
from probe.files.locks import held
from tests.fuzz.oracle import Reached
from tests.fuzz.values import BOMB
from tests.fuzz.world import PROBE, TRAIN
from tests.support.paths import CONFIGS

Paths = dict[str, Path]
Before = Callable[[Paths], Any]


@dataclass(frozen=True)
class Case:
    """A command line that is refused, or ended.

    Attributes:
        given: what is special about it, in words.
        before: does something to the paths, and may return a context to run the command in.
        parts: of the run that are copied, if something is done to it.
        manifests: whether they keep their manifests, by which damage is found.
    """

    program: str
    words: str
    given: str = ""
    before: Before | None = None
    parts: tuple[str, ...] = ()
    manifests: bool = False
    status: int = 2
    is_bug: bool = False

    @property
    def command(self) -> str:
        return f"{self.program} {self.words}"


def run(words: str, given: str = "", before: Before | None = None, **fields: Any) -> Case:
    return Case("attnres-probe", words, given, before, **fields)


def fit(words: str, given: str = "", before: Before | None = None, **fields: Any) -> Case:
    return Case("attnres-train", words, given, before, **fields)


def holds(content: str | bytes) -> Before:
    """FILE holds this."""

    def write(paths: Paths) -> None:
        paths["FILE"].write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def pipe(paths: Paths) -> None:
    os.mkfifo(paths["FILE"])


def folder(paths: Paths) -> None:
    paths["FILE"].mkdir()


def flipped(name: str) -> Before:
    """One byte in the middle of a file of RUN."""

    def flip(paths: Paths) -> None:
        path = paths["RUN"] / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return flip


def with_json(name: str, **changes: Any) -> Before:
    """Keys of a JSON file of RUN; None removes one."""

    def change(paths: Paths) -> None:
        path = paths["RUN"] / name
        content = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(
            json.dumps({key: value for key, value in content.items() if value is not None or key not in changes})
        )

    return change


def with_text(name: str, text: str) -> Before:
    return lambda paths: (paths["RUN"] / name).write_text(text)


def without(name: str) -> Before:
    return lambda paths: (paths["RUN"] / name).unlink()


def with_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Before:
    def save(paths: Paths) -> None:
        path = paths["RUN"] / "hf" / "model.safetensors"
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return save


def with_table(name: str, change: Callable[[Any], Any]) -> Before:
    def write(paths: Paths) -> None:
        path = paths["RUN"] / "probe" / "final" / f"{name}.parquet"
        table = pq.read_table(path)
        pq.write_table(change(table), path)

    return write


def pickled(paths: Paths) -> None:
    (paths["RUN"] / "hf" / "model.safetensors").unlink()
    (paths["RUN"] / "hf" / "pytorch_model.bin").write_bytes(pickle.dumps(print))


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf


def not_numbers(tensors: dict[str, torch.Tensor]) -> None:
    for value in tensors.values():
        value.fill_(torch.nan)


@contextmanager
def unfinished(paths: Paths, change: Callable[[Path], None] | None = None) -> Iterator[None]:
    """NEW has a probe that was stopped at its end, of which nobody is told that it goes on."""

    def stop(*_: Any, **__: Any) -> None:
        raise Reached

    with patch("probe.files.tables.write_results", stop), redirect_stderr(StringIO()):
        try:
            probe.cli.main(["run", str(paths["RUN"]), "--output", str(paths["NEW"]), *PROBE])
        except Reached:
            (part,) = sorted((paths["NEW"] / "parts").glob("*.npz"))
    if change is not None:
        change(part)
    with patch("probe.commands.say"):
        yield


def edited_part(path: Path) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = next(name for name in arrays if "effects" in name)
    arrays[name] = arrays[name] + 1
    np.savez(path, **arrays)  # type: ignore[arg-type]


def raising(place: str, error: BaseException) -> Before:
    """Raised where work begins."""
    return lambda paths: patch(place, side_effect=error)


def signalled(number: int) -> Before:
    return lambda paths: patch("lightning.pytorch.Trainer.fit", lambda *_, **__: signal.raise_signal(number))


def full(place: str) -> Before:
    return raising(place, OSError(28, "No space left on device", "effects.parquet.part"))


QUICK = " ".join(PROBE)
NEW = f"--output NEW {QUICK}"
CONFIG = f"fit --config {CONFIGS / 'demo.yaml'} --run_dir NEW"
SMALL = f"{CONFIG} {' '.join(TRAIN)}"
FILE_TASK = f"run RUN {NEW} --task FILE"
PROMPTS = f"run WORDS {NEW} --prompts FILE"
HF, FINAL = ("hf",), ("probe/final", "metrics.csv")
FILE_CONFIG = "fit --config FILE --run_dir NEW"
STUDY = "study --config FILE --dir NEW"
MISSING = "NEW is not there"

ON_THE_LINE = [
    run("", "no command"),
    run("prob RUN", "a command misspelt"),
    run(f"run RUN {NEW} --num_sequence 8", "an option misspelt"),
    run("run RUN", "no --output"),
    run(f"run RUN {NEW} --num_sequences 0"),
    run(f"run RUN {NEW} --num_sequences 1000000000000"),
    run(f"run RUN {NEW} --num_sequences 1e400"),
    run(f"run RUN {NEW} --scopes [all,all]"),
    run(f"run RUN {NEW} --scopes [layer:77]"),
    run(f"run RUN {NEW} --kinds [zero,zero]"),
    run(f"run RUN {NEW} --kinds [mask]"),
    run(f"run RUN {NEW} --kinds [os.path]"),
    run(f"run RUN {NEW} --kinds []"),
    run(f"run RUN {NEW} --families [embeding]"),
    run(f"run RUN {NEW} --sublayers [mlp,mlp]"),
    run(f"run RUN {NEW} --positions [query,query]"),
    run(f"run RUN {NEW} --coalitions [all,all]"),
    run(f"run RUN {NEW} --matters nan"),
    run(f"run RUN {NEW} --equivalent 0.5"),
    run(f"run RUN {NEW} --num_resamples 0"),
    run(f"run RUN {NEW} --num_resamples 1000000000000"),
    run(f"run RUN {NEW} --seed -1"),
    run(f"run RUN {NEW} --seed 18446744073709551616"),
    run(f"run RUN {NEW} --mode inexact"),
    run(f"run RUN {NEW} --device foo"),
    run(f"run RUN {NEW} --devices 0"),
    run(f"run RUN {NEW} --dtype int8"),
    run(f"run RUN {NEW} --task FILE --prompts FILE", "both", holds("{}")),
    run(f"run RUN {NEW} --tokenizer WORDS", "a tokenizer for the task mqar"),
    run(f"run VANILLA {NEW}", "a vanilla model"),
    run(f"run NEW/x {NEW}", MISSING),
    run(f"run FILE {NEW}", "a pipe", pipe),
    run(f"run RUN --output RUN {QUICK}", "onto the run itself"),
    run(f"run RUN --output FILE/x {QUICK}", "FILE is a file", holds("mine")),
    run(f"baseline RUN {NEW}", "an AttnRes model"),
    run(f"baseline VANILLA {NEW} --num_blocks 0"),
    run(f"baseline VANILLA {NEW} --num_blocks 1000000000"),
    run(f"baseline VANILLA {NEW} --recency_bias 1e30"),
    run(f"baseline VANILLA {NEW} --recency_bias nan"),
    run("compare RUN VANILLA", "never probed"),
    run("compare RUN RUN --output RUN/metrics.csv", "a file of the run"),
    run("compare RUN RUN --output RUN/probe/final/effects.parquet", "its own input"),
    run("compare RUN RUN --output NEW.txt"),
    run("compare RUN RUN --num_resamples 0"),
    run("report NEW", MISSING),
    run(f"report {'n' * 300}", "a name of 300 letters"),
    run("report VANILLA", "never probed"),
    run("report RUN --page RUN/checkpoints/last.ckpt"),
    run("report RUN --page RUN/probe/final/effects.parquet"),
    run("report RUN --page /dev/null"),
    run("report RUN --page RUN/probe"),
    run("report RUN --page FILE", "a page of somebody else", holds("<html>mine</html>")),
    run("verify NEW", MISSING),
    run("verify RUN --cells -1"),
    run("flip NEW", MISSING),
    run("flip RUN --num_sequences 0"),
    run("flip RUN --output NEW.txt"),
    run("flip RUN --batch_size -1"),
    run("trace NEW", MISSING),
    run("trace RUN --output FILE", "it is there", holds("mine")),
    run("trace RUN --sites [steam]"),
    run("trace VANILLA --sites [source]", "a model without depth routing"),
    run(
        "trace RUN --task FILE",
        "a task whose contexts use up all values",
        holds('{"task": "mqar", "num_pairs": 4, "vocab_size": 8}'),
    ),
    run("heads NEW", MISSING),
    run("heads RUN --output FILE", "it is there", holds("mine")),
    run("heads RUN --kinds [none]"),
    run("heads RUN --kinds []"),
    run("heads RUN --pairs_among 1"),
    run("heads RUN --num_sequences 1", "no other to resample from"),
    run("heads RUN --num_sequences 3 --pairs_among 2", "too few to choose pairs"),
    run("trail VANILLA", "no trail"),
    run("trail RUN --num_probes 0"),
    run("curves VANILLA", "no trail"),
    run("curves RUN --kinds [flips]"),
    run("curves RUN --num_sequences 2"),
    run("curves RUN --num_steps 0"),
    run("prune VANILLA", "no trail"),
    run("export RUN 7 NEW", "a step that is not there"),
    run("export RUN 2 RUN/probe", "onto a folder"),
]
FILES_GIVEN = [
    run(FILE_TASK, "a pipe", pipe),
    run(FILE_TASK, "a folder", folder),
    run(FILE_TASK, "`[1]`", holds("[1]")),
    run(FILE_TASK, "`{`", holds("{")),
    run(FILE_TASK, "100,000 opening brackets", holds("[" * 100_000)),
    run(FILE_TASK, "a key twice", holds('{"task": "mqar", "task": "mqar"}')),
    run(FILE_TASK, "`num_pairs` is text", holds('{"task": "mqar", "num_pairs": "x"}')),
    run(
        FILE_TASK,
        "`noise_tokens` is 10⁹",
        holds('{"task": "mqar", "num_pairs": 4, "vocab_size": 16, "noise_tokens": 1000000000, "noise_vocab_size": 2}'),
    ),
    run(FILE_TASK, "`num_pairs` is 10⁹", holds('{"task": "mqar", "num_pairs": 1000000000, "vocab_size": 16}')),
    run(FILE_TASK, "`task` has a terminal escape", holds('{"task": "\\u001b[31mred"}')),
    run(FILE_TASK, "an unknown key", holds('{"task": "mqar", "pairs": 4}')),
    run(PROMPTS, "nothing in it", holds("")),
    run(PROMPTS, "bytes that are no text", holds(b"\xff\xfe\x00")),
    run(PROMPTS, "a line that is no JSON", holds("prompt")),
    run(PROMPTS, "no answer", holds('{"prompt": "a", "distractors": [" 1"]}')),
    run(PROMPTS, "an empty prompt", holds('{"prompt": "", "answer": " 1", "distractors": [" 2"]}')),
    run(PROMPTS, "the answer among the distractors", holds('{"prompt": "a", "answer": " 1", "distractors": [" 1"]}')),
    run(PROMPTS, "a NUL", holds('{"prompt": "a\\u0000", "answer": " 1", "distractors": [" 2"]}')),
    run(PROMPTS, "an unknown key", holds('{"prompt": "a", "answer": " 1", "distractors": [" 2"], "colour": 1}')),
    run(f"run RUN {NEW} --prompts FILE", "a model without a tokenizer", holds('{"prompt": "a"}')),
]
DAMAGED = [
    run(
        f"run RUN {NEW}",
        "one byte of `hf/model.safetensors` flipped",
        flipped("hf/model.safetensors"),
        parts=HF,
        manifests=True,
    ),
    run(
        f"run RUN {NEW}",
        "`hf/config.json` edited",
        with_json("hf/config.json", rms_norm_eps=1.0),
        parts=HF,
        manifests=True,
    ),
    run(f"run RUN {NEW}", "a weight is infinite", with_weights(infinite), parts=HF),
    run(f"run RUN {NEW}", "all weights are NaN", with_weights(not_numbers), parts=HF),
    run(f"run RUN {NEW}", "a pickle for weights", pickled, parts=HF),
    run(
        f"run RUN {NEW}",
        "an index that names a file elsewhere",
        with_json("hf/model.safetensors.index.json", weight_map={"x": "../outside.safetensors"}),
        parts=HF,
    ),
    run(f"run RUN {NEW}", "`hidden_size` is text", with_json("hf/config.json", hidden_size="wide"), parts=HF),
    run(
        f"run RUN {NEW}",
        "a layer too few in `layer_types`",
        with_json("hf/config.json", layer_types=["full_attention"]),
        parts=HF,
    ),
    run(f"run RUN {NEW}", "a model of another kind", with_json("hf/config.json", model_type="gpt2"), parts=HF),
    run(f"run RUN {NEW}", "a mode of another code", with_json("hf/config.json", attnres_mode="delta"), parts=HF),
    run(
        f"run RUN {NEW}",
        "fields of two codes",
        with_json("hf/config.json", attnres_use_null_source=True),
        parts=HF,
    ),
    run(f"run RUN {NEW}", "no `task.json`", without("hf/task.json"), parts=HF),
    run(f"run RUN {NEW}", "`seed` is text", with_json("hf/attnres_run.json", seed="x"), parts=HF),
    run(
        f"run RUN/checkpoints/last.ckpt {NEW}",
        "one byte flipped",
        flipped("checkpoints/last.ckpt"),
        parts=("checkpoints/last.ckpt",),
        manifests=True,
    ),
    run(
        f"run RUN/checkpoints/last.ckpt {NEW}",
        "one byte flipped, no manifest",
        flipped("checkpoints/last.ckpt"),
        parts=("checkpoints/last.ckpt",),
    ),
    run(
        f"run RUN {NEW}",
        "a batch of the unfinished probe in NEW edited",
        lambda paths: unfinished(paths, edited_part),
        parts=HF,
    ),
    run(f"run RUN {NEW} --seed 5", "another seed than the unfinished probe in NEW", unfinished, parts=HF),
    run(f"run RUN {NEW}", "another process probes into NEW", lambda paths: held(paths["NEW"], "probe"), parts=HF),
    run(
        "report RUN",
        "one byte of `effects.parquet` flipped",
        flipped("probe/final/effects.parquet"),
        parts=FINAL,
        manifests=True,
    ),
    run(
        "report RUN",
        "one byte of `clusters.parquet` flipped",
        flipped("probe/final/clusters.parquet"),
        parts=FINAL,
        manifests=True,
    ),
    run(
        "report RUN",
        "`summary.json` edited",
        with_json("probe/final/summary.json", seed=1),
        parts=FINAL,
        manifests=True,
    ),
    run(
        "report RUN",
        "`effects.parquet` cut short, no manifest",
        lambda paths: os.truncate(paths["RUN"] / "probe/final/effects.parquet", 99),
        parts=FINAL,
    ),
    run(
        "report RUN",
        "a table without the column `effect`",
        with_table("effects", lambda t: t.drop_columns(["effect"])),
        parts=FINAL,
    ),
    run("report RUN", "a table without rows", with_table("effects", lambda t: t.slice(0, 0)), parts=FINAL),
    run("report RUN", "no `clusters.parquet`", without("probe/final/clusters.parquet"), parts=FINAL),
    run("report RUN", "no `summary.json`", without("probe/final/summary.json"), parts=FINAL),
    run("report RUN", "`summary.json` without `clean`", with_json("probe/final/summary.json", clean=None), parts=FINAL),
    run("report RUN", "`metrics.csv` without the column `step`", with_text("metrics.csv", "a,b\n1,2\n"), parts=FINAL),
    run("report RUN", "a manifest that is no JSON", with_text(f"probe/final/{MANIFEST}", "{"), parts=FINAL),
    run(
        "compare RUN RUN",
        "`n_queries` is 0",
        with_table(
            "clusters",
            lambda t: t.set_column(t.column_names.index("n_queries"), "n_queries", [np.zeros(len(t), "int64")]),
        ),
        parts=FINAL,
    ),
    run(
        "trail RUN",
        "`config.yaml` is no configuration",
        with_text("config.yaml", "a: 1\n"),
        parts=("trail", "config.yaml"),
    ),
    run(
        "trail RUN",
        "another process probes the trail",
        lambda paths: _trail_held(paths["RUN"]),
        parts=("trail", "config.yaml", "probe"),
    ),
]
TRAINING = [
    fit("fit", "nothing"),
    fit(f"{CONFIG} --model.hidden_sizes 3", "an option misspelt"),
    fit(f"{CONFIG} --model.hidden_size wide"),
    fit(f"{CONFIG} --model.hidden_size 100000000"),
    fit(f"{CONFIG} --model.architecture gpt2"),
    fit(f"{CONFIG} --data.task.num_pairs 0"),
    fit(f"{CONFIG} --data.task.num_pairs 1000000000"),
    fit(f"{CONFIG} --data.batch_size 0"),
    fit(f"{CONFIG} --trainer.max_steps 0"),
    fit(f"{CONFIG} --trainer.gradient_clip_val -1"),
    fit(f"{CONFIG} --trainer.strategy deepspeed"),
    fit(f"{CONFIG} --probe.num_sequences 8"),
    fit(f"{CONFIG} --probe.accuracy_jump nan"),
    fit(f"{CONFIG} --probe.scopes [all,all]"),
    fit(f"{CONFIG} --trail.every_n_steps -1"),
    fit(f"{CONFIG} --seed_everything -1"),
    fit(f"{CONFIG} --ckpt_path NEW.ckpt"),
    fit(f"fit --config {CONFIGS / 'demo.yaml'} --run_dir RUN", "a run that is there"),
    fit(f"fit --config {CONFIGS / 'demo.yaml'} --run_dir FILE", "a file", holds("mine")),
    fit(FILE_CONFIG, "not YAML", holds("a: b: c")),
    fit(FILE_CONFIG, "5,000 opening brackets", holds("[" * 5000)),
    fit(FILE_CONFIG, "aliases that stand for 8¹³ values", holds(BOMB)),
    fit(FILE_CONFIG, "an alias inside of itself", holds("a: &a\n  b: *a\n")),
    fit(FILE_CONFIG, "a tag that would run code", holds("!!python/object/apply:os.system [id]")),
    fit(FILE_CONFIG, "`model` is a list", holds("model: [1]")),
    fit(FILE_CONFIG, "a pipe", pipe),
    fit(SMALL, "another process trains in NEW", lambda paths: _training(paths["NEW"])),
    fit(
        "validate --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt",
        "one byte flipped",
        flipped("checkpoints/last.ckpt"),
        parts=("checkpoints/last.ckpt", "config.yaml"),
        manifests=True,
    ),
    fit("panels x", "no account, or no ENTITY/PROJECT"),
    fit(STUDY, "no conditions", holds("base: []\nseeds: [0]\n")),
    fit(STUDY, "seeds twice", holds("base: []\nconditions: {a: []}\nseeds: [0, 0]\n")),
    fit(STUDY, "a key misspelt", holds("base: []\ncondition: {a: []}\nseeds: [0]\n")),
    fit(STUDY, "a condition named `../a`", holds("base: []\nconditions: {../a: []}\nseeds: [0]\n")),
    fit(
        STUDY,
        "a probe that would be refused",
        holds("base: []\nconditions: {a: []}\nseeds: [0]\nprobe: --num_sequences 0\n"),
    ),
    fit("estimate --config FILE", "a pipe", pipe),
]
ENDED = [
    fit(
        f"{SMALL} --model.learning_rate 1e6 --model.warmup_steps 0 --trainer.max_steps 30 --probe.enabled false",
        "training that diverges",
        status=1,
    ),
    fit(SMALL, "SIGTERM while it trains", signalled(signal.SIGTERM), status=143),
    fit(SMALL, "SIGINT while it trains", signalled(signal.SIGINT), status=130),
    fit(SMALL, "the disk is full", full("lightning.pytorch.Trainer.fit"), status=74),
    fit(SMALL, "too little memory", raising("lightning.pytorch.Trainer.fit", MemoryError()), status=1),
    run(f"run RUN {NEW}", "the disk is full", full("probe.files.tables.write_results"), status=74),
    run(
        f"run RUN {NEW}",
        "SIGINT while it probes",
        raising("probe.commands.probe_model", KeyboardInterrupt()),
        status=130,
    ),
    run(f"run RUN {NEW}", "a bug", raising("probe.commands.probe_model", KeyError("effects")), status=1, is_bug=True),
]
CASES = [*ON_THE_LINE, *FILES_GIVEN, *DAMAGED, *TRAINING, *ENDED]


def _training(folder: Path) -> Any:
    folder.mkdir()
    return held(folder, "train")


def _trail_held(run_dir: Path) -> Any:
    from probe.files.trail import Trail

    return Trail(run_dir).held()


@contextmanager
def prepared(case: Case, paths: Paths) -> Iterator[None]:
    """What the case does before its command, and while it runs."""
    with ExitStack() as stack:
        context = None if case.before is None else case.before(paths)
        if hasattr(context, "__enter__"):
            stack.enter_context(context)
        yield


__all__ = ["CASES", "Case", "prepared"]
