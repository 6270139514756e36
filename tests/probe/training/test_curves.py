"""Curves on a trail: those of the commands for single checkpoints, the same however often they were interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from attnres.tasks import MQAR, Hops, Pointer
from probe.analysis.flips import flip_shares
from probe.analysis.placement import next_step
from probe.cli import main
from probe.curves import CURVE_KINDS
from probe.examples.examples import Examples
from probe.examples.flip import recall_accuracy
from probe.files import tables as storage
from probe.files.layout import PROBE
from probe.files.trail import Trail
from probe.settings import CurveSettings
from probe.training.curves import measure_curves
from probe.training.trail import read_clean, task_of_step
from tests.support.paths import ROOT

pytestmark = pytest.mark.filterwarnings("error:::(train|attnres|probe)")

POINTER = ROOT / "tests/fixtures/pointer"
STEPS = list(range(0, 33, 2))
SETTINGS = CurveSettings(num_steps=6, num_sequences=16, num_resamples=50)


def write(run: Path, task, model: PreTrainedModel, condition: str = "cumulative") -> Path:
    """On the way from an untrained model to `model`; what is done rises between steps 8 and 24."""
    torch.manual_seed(0)
    mixed = type(model)(model.config).eval()
    first, last = ({k: v.clone() for k, v in m.state_dict().items()} for m in (mixed, model))
    trail = Trail(run)
    trail.start(0, task.to_dict(), {"condition": condition, "seed": 5})
    for step in STEPS:
        share = min(1.0, max(0.0, (step - 8) / 16))
        trail.write(step, mixed, {name: torch.lerp(first[name], last[name], share) for name in first})
    trail.finish(STEPS[-1])
    (run / "config.yaml").write_text("probe: {num_resamples: 50, seed: 0}\ntrainer: {max_steps: 32}\n")
    return run


@pytest.fixture(scope="module")
def pointer(tmp_path_factory) -> Path:
    """A trail that ends with a model that has learned its task."""
    model = AutoModelForCausalLM.from_pretrained(POINTER).float().eval()
    return write(tmp_path_factory.mktemp("pointer") / "run", Pointer(2, 11), model)


@pytest.fixture
def run(pointer, tmp_path) -> Path:
    return Path(shutil.copytree(pointer, tmp_path / "run"))


@pytest.fixture
def hops(tmp_path, make_vanilla) -> Path:
    """A trail of a vanilla model, of a task with groups."""
    task = Hops(5, 5, max_hops=2)
    return write(tmp_path / "hops", task, make_vanilla(vocab_size=task.vocab_size), "vanilla")


def curves(run: Path) -> pd.DataFrame:
    found = storage.read_curves(run / PROBE)
    assert found is not None
    return found


def rows_at(run: Path, step: int, kind: str) -> dict[tuple[str, str, str], list[float]]:
    table = curves(run)
    rows = table[(table["step"] == step) & (table["kind"] == kind)]
    return {
        (row["quantity"], row["place"], row["group"]): [row[name] for name in ("value", "low", "high")]
        for row in rows.to_dict("records")
    }


def export(run: Path, step: int, folder: Path) -> Path:
    assert main(["export", str(run), str(step), str(folder)]) == 0
    return folder


@pytest.mark.parametrize("which", ["run", "hops"])
def test_accuracy_and_flips_at_a_step_are_those_of_the_exported_step(which, request, tmp_path):
    run = request.getfixturevalue(which)
    measure_curves(run, CurveSettings(("flip",), 3, 16))
    step = sorted(set(curves(run)["step"]))[1]
    folder = export(run, step, tmp_path / "exported")
    outcomes = tmp_path / "outcomes.parquet"
    assert main(["flip", str(folder), "--device=cpu", "--num_sequences=16", f"--output={outcomes}"]) == 0
    shares, found = flip_shares(pd.read_parquet(outcomes)), rows_at(run, step, "flip")
    assert len(found) == 2 * len(shares)
    for share in shares.to_dict("records"):
        for outcome in ("follows", "moves"):
            own = found[f"{outcome}{'' if share['asked'] else '_other'}", "", share["group"]]
            expected = [share[f"{outcome}{end}"] for end in ("", "_low", "_high")]
            assert own == pytest.approx(expected)
    task = task_of_step(Trail(run).load(step))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = recall_accuracy(model, Examples.from_batch(task.batch("probe", range(16))))
    assert rows_at(run, step, "accuracy")["accuracy", "", "all"][0] == pytest.approx(expected)
    assert ("accuracy", "", "hops_2") in rows_at(run, step, "accuracy") or which == "run"


def test_the_trace_at_a_step_is_that_of_the_exported_step(run, tmp_path):
    measure_curves(run, CurveSettings(("trace",), 2, 16, num_resamples=50))
    folder = export(run, STEPS[-1], tmp_path / "exported")
    how = ["--device=cpu", "--num_sequences=16", "--num_resamples=50", f"--output={tmp_path / 'trace'}"]
    assert main(["trace", str(folder), *how]) == 0
    table, found = pd.read_parquet(tmp_path / "trace/trace.parquet"), rows_at(run, STEPS[-1], "trace")
    gap = found["gap", "", "all"][0]
    assert gap == pytest.approx(float((table["clean"] - table["corrupted"]).iloc[0]), rel=1e-4)
    names = {("stream", at): f"stream_{at}" for at in ("value", "query")}
    names |= {("output", "query"): "attention_query", ("source", "query"): "source_query"}
    checked = 0
    for row in table[table["direction"] == "denoise"].to_dict("records"):
        name = names.get((row["site"], row["position"]))
        if name is None or (row["site"] != "source" and row["sublayer"] == "mlp"):
            continue
        layer = "" if np.isnan(row["layer"]) else f"layer {row['layer']:.0f}"
        place = layer or "final norm"
        if row["site"] == "source":
            sublayer = {"self_attn": " attention", "mlp": " MLP", "final": "final read"}[row["sublayer"]]
            family = row["family"].replace("prev_completed", "prev. completed")
            place = f"{layer}{sublayer}, {family} ({row['source']:.0f})"
        expected = [row["strength"], row["strength_low"], row["strength_high"]]
        assert found[name, place, "all"] == pytest.approx(expected, abs=1e-4, nan_ok=True)
        checked += 1
    assert checked == len(found) - 1


def test_heads_at_a_step_are_those_of_the_exported_step(run, tmp_path):
    measure_curves(run, CurveSettings(("heads",), 2, 16, num_resamples=50))
    folder = export(run, STEPS[-1], tmp_path / "exported")
    how = ["--num_sequences=16", "--num_resamples=50", "--kinds=[mean]", "--pairs_among=0", "--device=cpu"]
    assert main(["heads", str(folder), *how, f"--output={tmp_path / 'heads'}"]) == 0
    table = pd.read_parquet(tmp_path / "heads/heads.parquet").query("metric == 'logit_diff'")
    found = rows_at(run, STEPS[-1], "heads")
    assert len(found) == len(table)
    for row in table.to_dict("records"):
        own = found["head", f"layer {row['layer']}, head {row['head']}", "all"]
        expected = [row[name] for name in ("strength", "strength_low", "strength_high")]
        assert own == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_groups_of_a_trace_are_their_own_contexts(hops):
    measure_curves(hops, CurveSettings(("trace",), 1, 32, num_resamples=20))
    found = curves(hops)
    rows = found[found["quantity"] == "gap"].set_index("group")
    assert set(rows.index) == {"all", "hops_1", "hops_2"}
    counts = rows["n_sequences"]
    assert counts["hops_1"] + counts["hops_2"] == counts["all"] == 32
    values = rows["value"]
    whole = sum(values[group] * counts[group] for group in ("hops_1", "hops_2")) / 32
    assert whole == pytest.approx(values["all"], rel=1e-5)


@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_interrupted_it_ends_as_if_left_alone(after, run, tmp_path, monkeypatch):
    """After so many kinds of curves at steps."""
    whole = Path(shutil.copytree(run, tmp_path / "whole" / "run"))
    settings = CurveSettings(("flip",), 6, 16)
    done, made = measure_curves(whole, settings), 0
    assert len(done) == 6
    kind = type(CURVE_KINDS["flip"])
    for each in (type(CURVE_KINDS["accuracy"]), kind):

        def die(self, model, contexts, measure: Callable = each.measure) -> pd.DataFrame:
            nonlocal made
            if made == after:
                raise KeyboardInterrupt
            made += 1
            return measure(self, model, contexts)

        monkeypatch.setattr(each, "measure", die)
    with pytest.raises(KeyboardInterrupt):
        measure_curves(run, settings)
    monkeypatch.undo()
    measure_curves(run, settings)
    pd.testing.assert_frame_equal(curves(run), curves(whole), check_exact=True)
    assert measure_curves(run, settings) == []


@pytest.mark.parametrize("which", ["run", "hops"])
def test_steps_are_placed_as_those_of_probes(which, request):
    """With depth routing, or by accuracy and margin alone."""
    run = request.getfixturevalue(which)
    done = measure_curves(run, CurveSettings(("flip",), 11, 16))
    readings = {}
    for step in done:
        assert next_step(STEPS, readings, 11) == step
        found = Trail(run).load(step)
        readings[step] = read_clean(found.model, task_of_step(found), 64)
    assert len(done) == 11
    assert bool(readings[0].masses) == (which == "run")


def test_steps_that_were_probed_are_taken_and_the_most_telling_of_many(run, monkeypatch):
    probed = {2, 10, 14, 32}
    monkeypatch.setattr("probe.training.curves.storage.probed_steps", lambda _: probed)
    assert sorted(measure_curves(run, CurveSettings(("flip",), 4, 16, num_resamples=20))) == sorted(probed)
    assert set(curves(run)["step"]) == probed
    more = measure_curves(run, CurveSettings(("flip",), 7, 16, num_resamples=20))
    assert len(more) == 3  # placed, where most happens
    few = measure_curves(run, CurveSettings(("heads",), 3, 16, num_resamples=20))
    assert len(few) == 3
    assert set(few) <= set(curves(run)["step"])


def test_another_kind_goes_on_with_the_same_steps_and_other_contexts_are_refused(run):
    first = measure_curves(run, CurveSettings(("flip",), 4, 16, num_resamples=20))
    assert sorted(measure_curves(run, CurveSettings(("flip", "heads"), 4, 16, num_resamples=20))) == sorted(first)
    before = curves(run)
    with pytest.raises(ValueError, match=r"curves\.parquet has curves of other contexts than num_sequences 24"):
        measure_curves(run, CurveSettings(("flip",), 4, 24, num_resamples=20))
    pd.testing.assert_frame_equal(curves(run), before)
    storage.drop_steps_after(run / PROBE, first[0])
    assert curves(run)["step"].max() == first[0]


def test_the_command_says_since_when_and_draws_it(run, hops, capsys):
    options = ["--num_steps=9", "--num_sequences=16", "--device=cpu"]
    for each, kinds in ((run, "[flip,trace,heads]"), (hops, "[flip]")):
        assert main(["curves", str(each), f"--kinds={kinds}", *options]) == 0
    assert (run / "figures/curves.png").stat().st_size > 10_000
    assert (hops / "figures/curves.pdf").exists()
    out, of_hops = capsys.readouterr().out.split("Behaviour and flow")[1:]
    lines = {line[:58].strip(): line[58:].split() for line in out.splitlines()}
    table = curves(run)
    accuracy = table[table["kind"] == "accuracy"].set_index("step")["value"]
    expected = int(accuracy.index[accuracy < 0.5].max())
    since = int(lines["accuracy"][0])
    assert since == min(accuracy.index[accuracy.index > expected])
    assert "output follows what is asked for" in lines
    assert "stream at value, before" in out
    assert "margin lost without layer" in out
    assert "hops_1              hops_2" in of_hops


def test_bad_input_is_one_line(run, tmp_path, capsys):
    def refused(*command: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["curves", *command])
        error = capsys.readouterr().err
        assert (end.value.code, error.count("\n")) == (2, 1)
        return error

    (tmp_path / "empty").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "empty")
    assert "has no trail: attnres-train fit keeps one" in refused(str(tmp_path / "empty"))
    assert "is not a run directory of attnres-train" in refused(str(tmp_path))
    assert "num_sequences must be at least 8" in refused(str(run), "--num_sequences=2")
    assert "names 'flip' twice" in refused(str(run), "--kinds=[flip,flip]")
    assert "sequences of 7 tokens would take" in refused(str(run), "--num_sequences=1000000000000")
    with Trail(run).held():
        assert "another process probes or prunes" in refused(str(run))
    (run / "trail/task.json").write_text(json.dumps(MQAR(num_pairs=2, vocab_size=4).to_dict()))
    (run / "trail/manifest.json").unlink()
    assert "needs a value that is not in the context" in refused(str(run))
    assert not (run / PROBE).exists()


def test_a_step_that_cannot_be_measured_is_left_out(run, monkeypatch):
    """Another takes its place; in training its failure is recorded, and training ends as it would."""
    failed, load = [], Trail.load

    def broken(trail, step):
        if step == trail.steps[-1]:
            raise ValueError("its weights are not finite")
        return load(trail, step)

    monkeypatch.setattr(Trail, "load", broken)
    last = Trail(run).steps[-1]
    with pytest.raises(ValueError, match="not finite"):
        measure_curves(run, CurveSettings(("flip",), 4, 16, num_resamples=20))
    done = measure_curves(
        run,
        CurveSettings(("flip",), 4, 16, num_resamples=20),
        on_failure=lambda step, error: failed.append((step, str(error))),
    )
    assert failed == [(last, "its weights are not finite")]
    assert last not in set(curves(run)["step"])
    assert curves(run)["step"].nunique() == 4
    assert done
