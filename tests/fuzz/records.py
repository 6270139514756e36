"""Files that runs keep of themselves, altered by hand or damaged: records, tables, and what `report` makes of them."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from pandas.api.types import is_integer_dtype

from attnres.files import MANIFEST, checked, read_manifest
from probe import cli
from probe.files.failed import describe_failed
from probe.files.runs import load_run, training_curves
from probe.files.tables import REQUIRED, read_table
from probe.files.trail import Trail
from probe.training.trail import settings_of_run
from tests.fuzz.kind import Kind
from tests.fuzz.oracle import outcome, reading, untouched
from tests.fuzz.values import damaged, json_texts, yaml_texts
from tests.fuzz.world import World
from tests.support.paths import CONFIGS
from train.loggers.metrics_file import read_metrics
from train.run.provenance import read_segments
from train.study.description import load_study
from train.study.identity import _identity, check_directory

FINAL = "probe/final"


@cache
def study() -> Any:
    return load_study(CONFIGS / "study.yaml")


RECORDS: dict[str, Callable[[Path], Any]] = {
    "provenance.json": lambda run: read_segments(run / "provenance.json"),
    "trail/finished.json": lambda run: Trail(run).last_step,
    "trail/attnres_run.json": lambda run: Trail(run).export(2, run / "exported"),
    "trail/task.json": lambda run: Trail(run).load(2),
    "probe/failed.json": lambda run: describe_failed(run / "probe"),
    "hf/manifest.json": lambda run: (read_manifest(run / "hf"), checked(run / "hf" / "config.json")),
    "study.json": lambda run: check_directory(study(), run),
    "config.yaml": settings_of_run,
    "metrics.csv": lambda run: (training_curves(run), read_metrics(run / "metrics.csv")),
}
BESIDE = {"trail/attnres_run.json": ["trail"], "trail/task.json": ["trail"], "hf/manifest.json": ["hf/config.json"]}
NOT_OF_THE_RUN = {
    "probe/failed.json": {"failed": [{"step": 2, "why": "ValueError: x"}, {"step": 4, "why": "y"}]},
    "study.json": None,
}
CHEAP = tuple(name for name in RECORDS for _ in range(1 if name.startswith("trail/") else 4))


@st.composite
def records(draw: DrawFn, world: World) -> tuple[str, bytes]:
    name = draw(st.sampled_from(CHEAP))
    if name == "metrics.csv":
        return name, draw(metrics((world.run / name).read_bytes()))
    if name == "config.yaml":
        return name, draw(yaml_texts((load_yaml(world.run / name),)))
    document = NOT_OF_THE_RUN[name] if name in NOT_OF_THE_RUN else json.loads((world.run / name).read_text())
    return name, draw(json_texts((json.loads(json.dumps(_identity(study()))) if document is None else document,)))


def load_yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


@st.composite
def metrics(draw: DrawFn, content: bytes) -> bytes:
    """Rows of metrics with fields replaced, dropped and repeated."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.sampled_from(rows))
        place = draw(st.integers(0, max(len(row) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0 if row:
                del row[place]
            case 1:
                rows.append(list(row))
            case 2:
                row.insert(place, "1")
            case _ if row:
                row[place] = draw(st.sampled_from(("", "nan", "inf", "1e400", "x", "-1", "1.5", "9" * 40, '"', "step")))
    return damaged(draw, "\n".join(map(",".join, rows)).encode() + b"\n", often=False)


def check_record(world: World, drawn: tuple[str, bytes]) -> bool:
    name, content = drawn
    with world.copy_of(*BESIDE.get(name, [])) as run:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        before = path.read_bytes()
        found = outcome(reading(lambda: RECORDS[name](run)))
        assert path.read_bytes() == before
    return found.accepted


@dataclass(frozen=True)
class Damage:
    """What is done to a table: edits by name, and where, from `seed`; then perhaps to the file's bytes.

    Attributes:
        manifest: whether the manifest beside it stays, by which damage is found.
    """

    table: str
    edits: tuple[tuple[str, str, Any], ...]
    seed: int
    manifest: bool
    cut: float | None = None


ORDER = ("shuffle",)
"""Edits that change nothing that is said."""
EDITS = (
    *("drop column", "as text", "as integers", "as booleans", "null", "nested", "NaN", "infinite", "huge", "zero"),
    *(
        "negative",
        "replace",
        "shuffle",
        "double",
        "drop rows",
        "empty",
        "one row",
        "rename",
        "add column",
        "other step",
    ),
)


@st.composite
def damages(draw: DrawFn, tables: dict[str, list[str]]) -> Damage:
    table = draw(st.sampled_from(sorted(tables)))
    edit = st.tuples(
        st.sampled_from(EDITS),
        st.sampled_from(tables[table]),
        st.sampled_from(("x", "", "all", "early", "nll", "\x1b[31m", "层", "mask_renormalise", "none")),
    )
    edits = tuple(draw(st.lists(edit, max_size=2)))
    cut = draw(st.none() | st.floats(0, 1)) if draw(st.integers(0, 4)) == 0 else None
    return Damage(table, edits, draw(st.integers(0, 2**20)), draw(st.booleans()), cut)


def columns(world: World) -> dict[str, list[str]]:
    names = ("effects", "clusters", "geometry", "coalitions")
    return {name: pq.read_schema(world.run / FINAL / f"{name}.parquet").names for name in names}


def apply(damage: Damage, content: bytes) -> bytes:
    """The bytes of the damaged table; unchanged bytes if nothing is done to it."""
    if damage.edits:
        source = pq.read_table(BytesIO(content))
        rows, metadata = source.to_pandas(), source.schema.metadata
        rng = np.random.default_rng(damage.seed)
        for edit, column, value in damage.edits:
            rows = edited(rows, edit, column, value, rng)
        table = pa.Table.from_pandas(rows, preserve_index=False)
        kept = {key: text for key, text in (metadata or {}).items() if key != b"pandas"}
        file = BytesIO()
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **kept}), file)
        content = file.getvalue()
    if damage.cut is not None:
        place = int(damage.cut * (len(content) - 1))
        flip = random.Random(damage.seed).randrange(256)
        content = content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
    return content


def edited(rows: pd.DataFrame, edit: str, column: str, value: str, rng: np.random.Generator) -> pd.DataFrame:
    if column not in rows and edit not in ("shuffle", "double", "drop rows", "empty", "one row", "add column"):
        return rows
    some = rng.random(len(rows)) < 0.3
    match edit:
        case "drop column":
            return rows.drop(columns=column)
        case "as text":
            return rows.assign(**{column: rows[column].astype(str)})
        case "as integers" | "as booleans":
            numbers = pd.to_numeric(rows[column], errors="coerce").fillna(0).clip(-(2**60), 2**60)
            return rows.assign(**{column: numbers.astype("int64" if edit == "as integers" else "bool")})
        case "null":
            return rows.assign(**{column: None})
        case "nested":
            return rows.assign(**{column: [[1, 2]] * len(rows)})
        case "NaN" | "infinite" | "huge" | "zero" | "negative":
            number = {"NaN": np.nan, "infinite": np.inf, "huge": 1e300, "zero": 0.0, "negative": -1.0}[edit]
            if not pd.api.types.is_numeric_dtype(rows[column]):
                return rows
            return rows.assign(**{column: rows[column].astype(float).mask(some, number)})
        case "replace":
            return rows.assign(**{column: rows[column].astype(object).mask(some, value)}).astype({column: str})
        case "shuffle":
            return rows.sample(frac=1, random_state=int(rng.integers(2**31)))
        case "double":
            return pd.concat([rows, rows[some]])
        case "drop rows":
            return rows[~some]
        case "empty":
            return rows.head(0)
        case "one row":
            return rows.head(1)
        case "rename":
            return rows if value in rows else rows.rename(columns={column: value})
        case "add column":
            return rows.assign(**{f"{column}_{value}": 1})
        case "other step":
            is_number = "step" in rows and pd.api.types.is_integer_dtype(rows["step"])
            return rows.assign(step=rows["step"].mask(some, rows["step"] + 1)) if is_number else rows
    raise AssertionError(edit)


def check_table(world: World, damage: Damage) -> bool:
    content = (world.run / FINAL / f"{damage.table}.parquet").read_bytes()
    changed = apply(damage, content)
    with world.scratch() as folder:
        path = folder / f"{damage.table}.parquet"
        path.write_bytes(changed)
        if damage.manifest:
            (folder / MANIFEST).write_bytes((world.run / FINAL / MANIFEST).read_bytes())
        with untouched(folder):
            found = outcome(reading(lambda: read_table(folder, damage.table)))
    if damage.manifest:
        assert found.accepted == (changed == content), f"altered, and used: {damage}"
    elif found.accepted:
        rows = found.found[0]
        assert set(REQUIRED[damage.table]) <= set(rows.columns)
        assert is_integer_dtype(rows["step"])
    return found.accepted


@cache
def said(world: World) -> Any:
    """What the claims of the undamaged run say."""
    with world.copy_of(FINAL, "metrics.csv") as run:
        return [claim.to_dict() for claim in load_run(run).claims]


@st.composite
def damaged_runs(draw: DrawFn, world: World) -> tuple[str, Damage | bytes]:
    """A command, and what is done to a table or put into the summary."""
    command = draw(st.sampled_from(("report", "report", "report", "compare", "verify")))
    if draw(st.integers(0, 3)) == 0:
        return command, draw(json_texts((json.loads((world.run / FINAL / "summary.json").read_text()),)))
    return command, draw(damages(columns(world)))


def check_damaged_run(world: World, drawn: tuple[str, Damage | bytes]) -> bool:
    """Figures and the page are left out but for a twentieth of the inputs: they take seconds."""
    command, damage = drawn
    manifests = isinstance(damage, Damage) and damage.manifest
    with world.copy_of(FINAL, "metrics.csv", manifests=manifests) as run:
        name = f"{damage.table}.parquet" if isinstance(damage, Damage) else "summary.json"
        path = run / FINAL / name
        before = path.read_bytes()
        changed = apply(damage, before) if isinstance(damage, Damage) else damage
        path.write_bytes(changed)
        arguments = {"compare": [str(run), str(world.run)], "verify": [str(run), "--cells", "0"]}.get(
            command, [str(run)]
        )
        drawing = isinstance(damage, Damage) and damage.seed % 20 == 7
        with warnings.catch_warnings(), nullcontext() if drawing else drawing_nothing():
            warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, at numbers that are not finite
            found = outcome(lambda: cli.main([command, *arguments]), (2, 1) if command == "verify" else (2,))
        assert path.read_bytes() == changed
        if command == "verify":
            assert found.status != 0 or not manifests or changed == before, "altered, and verified"
            return found.accepted
        if manifests and changed != before:
            assert not found.accepted, f"altered, and used: {damage}"
        if command == "report" and isinstance(damage, Damage) and found.accepted:
            orders = all(edit in ORDER for edit, *_ in damage.edits) and damage.cut is None
            claims = json.loads((run / FINAL / "claims.json").read_text())["claims"]
            assert not orders or claims == json.loads(json.dumps(said(world))), "the order of rows changes a claim"
    return found.accepted


@contextmanager
def drawing_nothing() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch("probe.report.command.write_figures", lambda runs, metric: []))
        stack.enter_context(patch("probe.report.command.write_page", lambda runs, page, metric: page))
        yield


IN_RECORDS = (
    Kind("records of runs", lambda world: records(world), check_record, 200, 10_000),
    Kind("tables", lambda world: damages(columns(world)), check_table, 100, 2_500),
    Kind("damaged runs", lambda world: damaged_runs(world), check_damaged_run, 12, 250),
)
__all__ = ["IN_RECORDS"]
