"""What loggers are told of probes: each number once, whatever a logger's files hold; summary fields and tables."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from probe.analysis.curves import CURVE_COLUMNS
from probe.files.tables import write_curves
from probe.training import publish
from probe.training.loggers import RunLogger, run_logger

MOTIF = {"sublayer": "mlp", "scope": "early", "family": "embedding", "motif": "embedding -> early mlp"}
TIMES = {
    "onset": 90.0,
    "onset_low": 75.0,
    "onset_high": 110.0,
    "effect_half": 60.0,
    "mass_half": None,
    "peak": 0.4,
    "peak_step": 80,
}
HEAVIEST = {"heaviest": "current", "most_harmful": "embedding", "dissociated": True, "p_heaviest_is_most_harmful": 0.01}
MOTIFS = [MOTIF | TIMES | {"status": "emerged"}]
MOTIFS += [MOTIF | {"scope": "late", "status": "transient", "onset": None, "effect_half": 30.0}]
SUMMARY = {
    "step": 4,
    "clean": {"accuracy": 0.5, "logit_diff": 3.0, "nll": 1.0, "task_learned": True},
    "dissociation": {"mlp": HEAVIEST},
    "probe": {"fraction": 0.1},
    "emergence": {"accuracy_half": 100.0, "motifs": MOTIFS},
}


class Recorder:
    def __init__(self) -> None:
        self.seen: Counter[tuple[int | None, str]] = Counter()

    def log_metrics(self, metrics, step=None) -> None:
        self.seen.update((step, name) for name in metrics)


class OnceRecorder(RunLogger, Recorder):
    takes_views, experiment = True, None

    def write_image(self, name, image, step) -> None:
        self.seen[step, name] += 1


NAMES = st.sets(st.sampled_from(["probe/a", "probe_mass/b", "train/loss"]))
ROWS = st.lists(st.tuples(st.integers(0, 3), NAMES, st.booleans()), max_size=12)


@given(kept=ROWS, rows=ROWS)
def test_each_number_and_image_of_a_probe_is_told_once(kept, rows):
    """To a logger that goes on with its files, and to any other, which is wrapped."""
    logger, plain = OnceRecorder(), Recorder()
    for step, names, _ in kept:  # in its files
        logger.told.add(step, dict.fromkeys(names, 0.0))
    wrapped = run_logger(plain)  # type: ignore[arg-type]
    for step, names, draws in rows:
        for told in (logger, wrapped):
            told.log_metrics(dict.fromkeys(names, 1.0), step)
            told.log_view("probe/image", lambda draws=draws: np.zeros(1) if draws else None, step)
    numbers = Counter((step, name) for step, names, _ in rows for name in names)
    once = {key: 1 if key[1].startswith("probe") else count for key, count in numbers.items()}
    assert plain.seen == once
    held = {(step, name) for step, names, _ in kept for name in names}
    images = {(step, "probe/image"): 1 for step, _, draws in rows if draws}
    assert logger.seen == {key: count for key, count in once.items() if key not in held} | images


def test_metrics_without_a_step_are_always_told():
    logger = OnceRecorder()
    for _ in range(2):
        logger.log_metrics({"probe/a": 1.0})
    assert logger.seen == {(None, "probe/a"): 2}


def test_summary_fields():
    cell = "mlp/early/embedding"
    assert publish.summary_fields(SUMMARY) == {
        "final/accuracy": 0.5,
        "final/logit_diff": 3.0,
        "final/nll": 1.0,
        "final/task_learned": True,
        "accuracy_half": 100.0,
        "probe/fraction_of_training": 0.1,
        "effect_half/mlp/late/embedding": 30.0,
    } | {f"dissociation/mlp/{name}": value for name, value in HEAVIEST.items()} | {
        f"{name}/{cell}": value for name, value in TIMES.items() if value is not None
    }
    little = {"step": 0, "clean": {"accuracy": 0.5, "nll": math.nan}, "dissociation": {}, "probe": {}}
    assert publish.summary_fields(little) == {"final/accuracy": 0.5}


def test_lightnings_own_loggers_have_summary_and_tables_at_the_end(tmp_path, monkeypatch):
    """As of a callback that somebody uses with a Trainer of their own."""
    effects = pd.DataFrame({column: [0.5, math.nan] for column in publish.TABLE_COLUMNS}).assign(step=[2, 4])
    summary, rows, texts = {}, {}, {}
    run = SimpleNamespace(summary=summary, log=rows.update)
    board = TensorBoardLogger(tmp_path, "", "")
    board._experiment = SimpleNamespace(add_text=lambda name, text, step: texts.update({name: (text, step)}))
    publisher = publish.Publisher([WandbLogger(experiment=run), board], tmp_path)
    publisher.log_summary()
    assert not summary | rows | texts  # no probe has been written
    (tmp_path / "summary.json").touch()
    monkeypatch.setattr(publish, "read_json", lambda _: SUMMARY)
    monkeypatch.setattr(publish.storage, "read_effects", lambda _: effects)
    publisher.log_summary()
    assert summary == publish.summary_fields(SUMMARY)
    assert rows["probe_table/motifs"].get_column("status") == ["emerged", "transient"]
    assert rows["probe_table/effects"].get_column("step") == [2, 4]
    assert rows["probe_table/effects"].get_column("effect") == [0.5, None]
    assert rows["trainer/global_step"] == 4
    assert "| final/accuracy | 0.5 |" in texts["probe/summary"][0]
    assert {name: (text.count("\n") - 1, step) for name, (text, step) in texts.items() if "table" in name} == {
        "probe_table/effects": (1, 4),  # as text, the rows of the last probe
        "probe_table/motifs": (2, 4),
    }


def test_curves_are_told_at_their_own_steps_with_a_picture_at_the_last(tmp_path):
    """To loggers that know what they were told, and to others only if the curves are new."""
    about = {"run": "run", "condition": "vanilla", "seed": 0, "data_id": "x", "n_queries": 8, "n_sequences": 8}
    curve = {"kind": "trace", "quantity": "source_query", "place": "layer 1 MLP, current (2)", "group": "all"}
    for step, value in ((0, math.nan), (5, 0.25), (9, 1.0)):
        row = about | curve | {"step": step, "value": value, "low": value - 0.1, "high": math.inf}
        write_curves(tmp_path, pd.DataFrame([row])[CURVE_COLUMNS])
    name = "source_query/layer_1_MLP_current_(2)/all"
    expected = {(step, f"probe_trace{end}/{name}"): 1 for step in (5, 9) for end in ("", "_low")}
    for is_new in (True, False):
        logger, plain = OnceRecorder(), Recorder()
        publisher = publish.Publisher([logger, plain], tmp_path)  # type: ignore[list-item]
        for _ in range(2):
            publisher.log_curves_of_disk(is_new)
        assert logger.seen == expected | {(9, "probe/curves"): 1}
        assert plain.seen == (expected if is_new else {})
    table = pd.read_parquet(tmp_path / "curves.parquet")
    assert publish.curve_scalars(table[table["step"] == 5])[f"probe_trace/{name}"] == 0.25
