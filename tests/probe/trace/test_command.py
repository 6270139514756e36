"""`attnres-probe trace`: pairs of a task's own flips, table, figures and printed report; what is refused."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

from attnres.tasks import MQAR, Hops, Pointer, TextRecall
from probe.cli import main
from probe.trace import trace
from probe.trace.of_tasks import flips_of_task
from tests.probe.test_flip_command import POINTER, export

TASKS = {"mqar": MQAR(4, 32), "pointer": Pointer(3, 19), "hops": Hops(num_facts=6, num_entities=7, max_hops=3)}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_pairs_differ_in_one_value_and_in_their_answer(task):
    flips, places = flips_of_task(task, 30, seed=1)
    batch = task.batch("probe", range(30))
    assert torch.equal(flips.clean_ids, batch.input_ids)
    assert ((flips.clean_ids != flips.corrupted_ids).sum(1) == 1).all()
    rows = torch.arange(30)
    assert torch.equal(flips.answer, batch.labels[rows, flips.position])
    assert (flips.flipped_answer != flips.answer).all()
    assert torch.equal(places["query"], flips.position)
    assert (flips.clean_ids[rows, places["value"]] != flips.corrupted_ids[rows, places["value"]]).all()
    assert all((at >= 0).all() and (at <= flips.position).all() for at in places.values())
    if task.name != "hops":  # the new answer is the new value
        assert torch.equal(flips.flipped_answer, flips.corrupted_ids[rows, places["value"]])
    if task.name == "pointer":
        assert {"query - 1", "query - 2", "query - 3"} <= places.keys()


def test_a_trained_pointer_is_traced_from_the_cell_to_the_query(tmp_path, capsys):
    options = ["--num_sequences=24", "--num_resamples=50", "--device=cpu"]
    assert main(["trace", str(POINTER), f"--output={tmp_path / 'new/trace'}", *options]) == 0
    printed = capsys.readouterr()
    table = pd.read_parquet(tmp_path / "new/trace/trace.parquet")
    stream = table[(table["site"] == "stream") & (table["direction"] == "denoise")].set_index(["read", "position"])
    assert stream.loc[(0, "value"), "strength"] == pytest.approx(1, abs=1e-3)  # whatever is known is there at first
    assert stream.loc[(0, "query"), "strength"] == pytest.approx(0, abs=1e-6)
    last = stream.index.get_level_values("read").max()
    assert stream.loc[(last, "query"), "strength"] == pytest.approx(1, abs=1e-3)  # and here at last
    assert stream.loc[(last, "value"), "strength"] == pytest.approx(0, abs=1e-6)
    assert {path.suffix for path in (tmp_path / "new/trace").iterdir()} == {".parquet", ".json", ".png", ".pdf"}
    about = json.loads((tmp_path / "new/trace/trace.json").read_text())
    assert about["task"]["task"] == "pointer"
    names = {path.stem for path in (tmp_path / "new/trace").glob("*.png")}
    assert names == {"trace_denoise", "trace_noise", "trace_flow"}
    edges = table[(table["site"] == "edge") & (table["direction"] == "denoise") & table["head"].notna() & table["live"]]
    attention = about["flow"]["attention"]
    assert attention["cells"] == len(edges)
    expected = scipy_stats.spearmanr(edges["weight"], edges["strength"].abs().where(~edges["below_floor"], 0)).statistic
    assert attention["agreement"]["value"] == pytest.approx(expected)
    assert about["reading"]["layer"] in (0, 1)
    assert f"attention and flow: rank agreement {expected:.2f}" in printed.out
    assert "routing and flow: rank agreement" in printed.out
    assert "read most in layer" in printed.out
    assert "comes back [95 % CI]" in printed.out
    assert "layer 0 self_attn" in printed.out
    assert "forward passes where a naive loop takes" in printed.err


def test_edges_alone_are_traced_and_drawn_without_heat_maps(tmp_path, capsys):
    options = ["--num_sequences=16", "--num_resamples=50", "--device=cpu", "--sites=[edge]"]
    assert main(["trace", str(POINTER), f"--output={tmp_path / 'out'}", *options]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"trace_flow.png"}
    about = json.loads((tmp_path / "out/trace.json").read_text())
    assert set(about["flow"]) == {"attention"}
    assert "routing and flow" not in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["attnres", "vanilla"])
def test_the_table_is_that_of_the_engine(make_model, make_vanilla, architecture, tmp_path, capsys):
    task = TASKS["hops"]
    sizes = {"vocab_size": task.vocab_size, "num_hidden_layers": 2, "max_position_embeddings": 64}
    model = (make_model if architecture == "attnres" else make_vanilla)(**sizes)
    folder = export(model, task, tmp_path / "model")
    options = ["--num_sequences=6", "--num_resamples=20", "--device=cpu", "--seed=2", "--sites=[stream,output]"]
    assert main(["trace", str(folder), f"--output={tmp_path / 'out'}", *options]) == 0
    found = pd.read_parquet(tmp_path / "out/trace.parquet")
    flips, places = flips_of_task(task, 6, seed=2)
    expected = trace(model, flips, sites=["stream", "output"], positions=places)
    margins = expected.margins.mean(-1)
    base = {"denoise": expected.corrupted.mean(), "noise": expected.clean.mean()}
    for d, direction in enumerate(expected.directions):
        rows = found[found["direction"] == direction]
        assert rows["effect"].to_numpy() == pytest.approx((margins[d] - base[direction]).ravel(), abs=1e-5)
    assert "task hops: 6 contexts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output=here"], "--output here exists: choose another folder, nothing is overwritten"),
        (["--task=full.json"], "a trace needs a value that is not in the context, and this task has none left"),
        (["--task=words.json"], "holds no tokenizer"),
        (["--sites=[steam]"], "steam"),
        (["--num_sequences=1000000000000"], "1,000,000,000,000 sequences of 7 tokens would take"),
        (["--num_resamples=0"], "num_resamples must be at least 1, got 0"),
        (["--task=large.json"], "the model's vocabulary (11) is smaller than the task's (67)"),
    ],
)
def test_bad_input_is_one_line(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name, task in {"full": Pointer(2, 7), "large": Pointer(2, 67)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(task.to_dict()))
    (tmp_path / "words.json").write_text(json.dumps(TextRecall().to_dict()))
    with pytest.raises(SystemExit) as end:
        main(["trace", str(POINTER), "--device=cpu", *options])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert words in error


def test_a_context_of_one_pair_has_its_only_value_changed():
    flips, places = flips_of_task(MQAR(1, 32), 3)
    assert places["value"].tolist() == [1] * 3
    assert flips.position.tolist() == [2] * 3
    assert torch.equal(flips.flipped_answer, flips.corrupted_ids[:, 1])
