"""`attnres-probe verify`: whether a run directory holds what was measured.

1. Every file that a manifest lists is read again, and must have the digest that it was written with.
2. Every effect must follow from the rows of `clusters.parquet`, sequence by sequence.
3. Some cells, drawn by a fixed seed, are ablated again in the exported model, and must come out as they did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jsonargparse import Namespace

from attnres import AttnResForCausalLM
from attnres.files import MANIFEST, digest, read_manifest
from attnres.tasks import TextRecall
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import Ablation
from probe.analysis.effects import CELL_KEYS
from probe.commands import say
from probe.examples.tasks import GROUP, ProbeTask, TokenTask
from probe.examples.text_recall import TextPrompts
from probe.files.checkpoints import Checkpoint, load_model, load_tokenizer
from probe.files.layout import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    FINAL_PROBE,
    HEADS,
    HEADS_TABLE,
    PAIRS_TABLE,
    PARTS,
    PROBE,
    PROVENANCE,
    RUN_FILE,
    SUMMARY,
    TABLES,
    TASK_FILE,
    TRACE,
    TRACE_ABOUT,
    TRACE_TABLE,
    TRAIL,
    TRAIL_FINISHED,
    has_results,
    result_folders,
    table_file,
)
from probe.files.parts import read_part
from probe.files.runs import load_run, unlisted
from probe.files.tables import read_table
from probe.vocabulary import MARGIN, MARGINS, Route, harm_sign

HOLDS, FAILED, UNKNOWN = "ok", "FAILED", "no digest"
SKIPPED = "not done"
ARTEFACTS = {
    CONFIG,
    PROVENANCE,
    SUMMARY,
    TASK_FILE,
    RUN_FILE,
    TRAIL_FINISHED,
    "config.json",
    *(TRACE_TABLE, TRACE_ABOUT, HEADS_TABLE, PAIRS_TABLE),
    *(table_file(Path(), name).name for name in TABLES),
}
"""Files that later steps read; besides, those that end in `WEIGHTS`."""
WEIGHTS = (".safetensors", ".ckpt")
ROUNDING = {"rtol": 1e-6, "atol": 1e-9}
"""Sums of the same numbers in another order."""
OF_EFFECT, OF_MARGIN = 1e-3, 1e-5
"""How far the same ablation may be off on another machine, or in other batches: shares of effect and clean margin."""
Line = tuple[str, str]
"""Of what is printed: a verdict, and on what."""


def verify(options: Namespace) -> int:
    """Print a line for each file and check; returns 1 if something does not hold, else 0.

    Raises:
        ValueError: there is nothing to verify.
    """
    run = options.run
    if not run.is_dir():
        raise ValueError(f"{run} is not a directory: expected a run directory, or a folder that attnres wrote")
    if options.cells < 0:
        raise ValueError(f"--cells must not be negative, got {options.cells}")
    counts: dict[str, int] = dict.fromkeys((HOLDS, FAILED, UNKNOWN, SKIPPED), 0)
    for verdict, what in findings(run, options.cells):
        counts[verdict] += 1
        say(f"{verdict:<9}  {what}")
    if not sum(counts.values()):
        raise ValueError(f"{run} holds nothing that attnres writes: expected a run directory")
    say(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    return int(counts[FAILED] > 0)


def findings(run: Path, num_cells: int) -> Iterator[Line]:
    """The lines about a run directory, or a folder of results or a model."""
    steps = sorted((run / TRAIL).glob("step_*"))
    folders = (run, run / CHECKPOINTS, run / EXPORT, run / TRAIL, *steps, run / PROBE, run / PROBE / FINAL_PROBE)
    folders += (run / TRACE, run / HEADS)
    for folder in folders:
        yield from _files(folder)
    results = [folder for folder in dict.fromkeys(result_folders(run)) if has_results(folder)]
    for folder in results:
        yield from _guarded(folder / "effects.parquet", lambda folder=folder: _effects_follow(folder))
    if results:
        yield from _guarded(run / EXPORT, lambda: _repeat(run, num_cells))


def _guarded(about: Path, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """What a check finds; that it cannot be made is a failure."""
    try:
        with unlisted([about.parent]):
            yield from check()
    except ValueError as error:
        yield FAILED, f"{about}: cannot be checked: {' '.join(str(error).split())}"


def _files(folder: Path) -> Iterator[Line]:
    try:
        listed = read_manifest(folder)
    except ValueError as error:
        yield FAILED, str(error)
        listed = {}
    for name, digests in listed.items():
        path = folder / name
        if not path.is_file():
            yield FAILED, f"{path} is missing"
        elif digest(path, anew=True) in digests:
            yield HOLDS, str(path)
        else:
            yield FAILED, f"{path} is not what was written: {MANIFEST} has another SHA-256"
    files = [path for path in folder.glob("*") if path.name in ARTEFACTS or path.suffix in WEIGHTS]
    yield from ((UNKNOWN, str(path)) for path in sorted(files) if path.name not in listed)
    for path in sorted((folder / PARTS).glob("*.npz")):
        yield from _guarded(path, lambda path=path: _part(path))


def _part(path: Path) -> Iterator[Line]:
    read_part(path)
    yield HOLDS, f"{path} (of an unfinished probe)"


def estimates(clusters: pd.DataFrame) -> pd.DataFrame:
    """What `effects.parquet` must say, a row per cell, from the rows of its sequences; NaN where there is no effect."""
    groups = clusters.groupby(CELL_KEYS, sort=False)
    sums = groups[["n_queries", "summed_clean"]].sum()
    found = pd.DataFrame({"n_queries": sums["n_queries"], "clean": sums["summed_clean"] / sums["n_queries"]})
    found["n_sequences"], found["mass"] = groups["sequence"].nunique(), groups["mass"].mean()
    effect = groups["summed_effect"].sum(min_count=1)
    found["effect"] = effect / sums["n_queries"]
    found = found.reset_index()
    primary = found[found["metric"] == MARGIN].groupby(["run", "step"])["clean"].first()
    found["margin"] = primary.reindex(pd.MultiIndex.from_frame(found[["run", "step"]])).to_numpy()
    found["margin"] = found["clean"].where(found["metric"].isin(MARGINS), found["margin"])
    found["strength"] = found["effect"] * found["metric"].map(harm_sign) / found["margin"]
    return found


def _effects_follow(folder: Path) -> Iterator[Line]:
    effects, clusters = (read_table(folder, name) for name in ("effects", "clusters"))
    path, expected = table_file(folder, "effects"), estimates(clusters)
    both = effects.merge(expected, on=CELL_KEYS, how="outer", suffixes=("", "_again"), indicator=True)
    if (lost := (both["_merge"] != "both").sum()) or len(both) != len(effects):
        yield FAILED, f"{path}: {lost} cells are in it or in clusters.parquet alone"
        return
    both["strength_again"] = both["strength_again"].where(both["no_strength"] == "")
    for column in expected.columns.difference(CELL_KEYS, sort=False):
        same = np.isclose(both[column], both[f"{column}_again"], equal_nan=True, **ROUNDING)
        if not same.all():
            row, count = both[~same].iloc[0], int((~same).sum())
            first = f"{row[column]:.6g}, not {row[f'{column}_again']:.6g}"
            yield (
                FAILED,
                f"{path}: {column} does not follow from clusters.parquet in {count} of {len(both)} cells, first in "
                f"{_cell(row)}, {row['metric']}, step {row['step']}: {first}",
            )
            return
    yield HOLDS, f"{path}: {len(effects)} effects follow from clusters.parquet"


def _cell(row: pd.Series) -> str:
    return f"{Route(row['sublayer'], row['scope'], row['family'])} ({row['kind']}, {row['positions']})"


def _repeat(run: Path, num_cells: int) -> Iterator[Line]:
    """Ablate some cells of the last probe again."""
    probed = load_run(run)
    rows = probed.effects[probed.effects["metric"] == MARGIN]
    kinds = [kind for kind, intervention in Ablation.known.items() if not intervention.is_game]
    rows = rows[rows["applicable"] & rows["kind"].isin(kinds)]
    if not num_cells or rows.empty:
        return
    model, why = _model_of(run, probed.summary["step"])
    task = None if model is None else _task(model, run, (probed.summary.get("task") or {}).get(GROUP))
    if model is None or task is None:
        yield SKIPPED, f"{run}: no cell is measured again: {why or 'nothing beside the model says on which task'}"
        return
    examples = task.examples(probed.summary["probe"]["n_sequences"])
    if examples.data_id() != probed.summary["data_id"]:
        yield SKIPPED, f"{run}: no cell is measured again: it was probed on other examples than those of its own task"
        return
    chosen = rows.sample(min(num_cells, len(rows)), random_state=0)
    network: AttnResForCausalLM = model.model  # type: ignore[assignment]
    network.to(getattr(torch, probed.summary["model"]["dtype"]))  # type: ignore[arg-type]
    about = ("sublayer", "scope", "family", "kind", "positions", "with_aliases")
    for _, row in chosen.iterrows():
        sublayer, scope, family, kind, positions, with_aliases = (row[name] for name in about)
        cells = build_grid(
            network.model.sites, Kind(Ablation.known[kind]), [family], [sublayer], [scope], [bool(with_aliases)]
        )
        result = Engine(network, cells, [positions], seed=probed.summary["probe"]["seed"]).run(examples)
        again = result.effects[0, positions][MARGIN].sum() / result.counts.sum()
        tolerance = OF_EFFECT * abs(row["effect"]) + OF_MARGIN * abs(row["margin"]) + row["floor"]
        same = abs(again - row["effect"]) <= tolerance
        saying = f"{row['effect']:+.4g} nats of the margin, measured again {again:+.4g}"
        yield HOLDS if same else FAILED, f"{_cell(row)}, step {row['step']}: {saying}"


def _model_of(run: Path, step: int) -> tuple[Checkpoint | None, str]:
    """The exported model of a run that was probed at `step`, or why there is none."""
    if not (run / EXPORT / "config.json").exists():
        return None, f"it has no {EXPORT}/"
    found = load_model(str(run))
    if not isinstance(found.model, AttnResForCausalLM) or found.step != step:
        return None, f"{EXPORT}/ is of step {found.step}, the last probe of step {step}"
    return found, ""


def _task(found: Checkpoint, run: Path, group: str | None) -> ProbeTask | None:
    if found.task is None or not isinstance(found.task, TextRecall):
        return None if found.task is None else TokenTask(found.task, group)
    return TextPrompts(found.task, load_tokenizer(str(run)), str(run))
