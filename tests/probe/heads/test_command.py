"""`attnres-probe heads`: what it prints and writes, on tasks in token ids and in words; what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from attnres.tasks import MQAR, Hops, Pointer, TextRecall
from probe.analysis.inference import Inference
from probe.cli import main
from probe.examples.tasks import TokenTask
from probe.files.checkpoints import load_model
from probe.heads import measure_heads
from probe.heads_commands import answer
from probe.report.figures import style
from probe.report.figures.heads import plot_heads
from tests.probe.test_flip_command import POINTER, export
from tests.support import tokenizers

OPTIONS = ["--num_resamples=50", "--device=cpu"]


def test_a_trained_pointer_is_measured_and_written(tmp_path, capsys):
    folder = tmp_path / "new/heads"
    assert main(["heads", str(POINTER), f"--output={folder}", "--num_sequences=40", "--pairs_among=3", *OPTIONS]) == 0
    printed = capsys.readouterr()
    assert "at most" in printed.err
    assert "forward passes where a naive loop takes" in printed.err
    first, about = printed.out.split("\n")[0], json.loads((folder / "heads.json").read_text())
    assert first == about["answer"]
    assert "40 sequences, 40 answers" in printed.out
    assert "every pair" in printed.out
    names = {f"heads_{kind}" for kind in ("zero", "mean", "resample")}
    assert {path.stem for path in folder.iterdir()} == {"heads", "pairs", "manifest", *names}
    for name in names:
        for suffix in (".png", ".pdf"):
            assert (folder / name).with_suffix(suffix).stat().st_size > 5_000
    model, task = load_model(str(POINTER)).model, Pointer.from_dict(about["task"])
    expected = measure_heads(model, TokenTask(task).examples(40), pairs=3)
    how = Inference(num_resamples=50)
    for file, table in (("heads", expected.table(how)), ("pairs", expected.pair_table(how))):
        found = pd.read_parquet(folder / f"{file}.parquet")
        assert {"run", "condition", "seed", "step"} <= set(found.columns)
        pd.testing.assert_frame_equal(found[table.columns], table, check_exact=False, atol=1e-5)
    strongest = expected.table(how).query("metric == 'logit_diff'").sort_values("strength").iloc[-1]
    assert f"ayer {strongest['layer']} head {strongest['head']}" in first
    assert about["n_sequences_of_pairs"] == 20


@pytest.mark.parametrize("architecture", ["attnres", "vanilla"])
def test_every_pair_of_a_small_model(make_model, make_vanilla, architecture, tmp_path, capsys):
    """An entity of `Hops` stands at several places, so that there is no weight on the value."""
    task = Hops(num_facts=5, num_entities=5, max_hops=2)
    model = (make_model if architecture == "attnres" else make_vanilla)(vocab_size=8, num_hidden_layers=2)
    folder = export(model, task, tmp_path / "model")
    out = tmp_path / "out"
    options = ["--num_sequences=6", "--kinds=[zero,resample]", "--pairs_among=9", f"--output={out}"]
    assert main(["heads", str(folder), *options, *OPTIONS]) == 0
    pairs = pd.read_parquet(out / "pairs.parquet")
    assert len(pairs) == 2 * 2 * 6  # kinds, margins, pairs of four heads
    assert set(pairs["n_sequences"]) == {6}
    assert pd.read_parquet(out / "heads.parquet")["attention_to_value"].isna().all()
    printed = capsys.readouterr()
    assert "at most" not in printed.err
    assert "no shares: the clean margin is not clear of zero" in printed.out
    assert not list(out.glob("*.png"))


def test_a_task_in_words(make_vanilla, tmp_path, capsys):
    tokenizer = tokenizers.make("qwen")
    folder = tmp_path / "words"
    make_vanilla(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "task.json").write_text(json.dumps(TextRecall(num_pairs=3).to_dict()))
    assert main(["heads", str(folder), "--num_sequences=8", "--kinds=[mean]", "--pairs_among=0", *OPTIONS]) == 0
    assert ", task text_recall: 8 sequences" in capsys.readouterr().out


def rows(weight: float = 0.6, **strengths) -> pd.DataFrame:
    """A table of two heads by kind, whose strengths are given."""
    found = [
        {"kind": kind, "layer": 0, "head": head, "strength": value, "strength_low": value - 0.1}
        | {"strength_high": value + 0.1, "p_matters": 0.001 if value > 0.2 else 1.0, "attention_to_value": looks}
        for kind, values in strengths.items()
        for head, (value, looks) in enumerate(zip(values, (weight, np.nan), strict=True))
    ]
    return pd.DataFrame(found)


def test_the_answer_is_a_sentence():
    assert answer(rows(zero=(0.5, 0.3), mean=(0.6, 0.3))) == (
        "Layer 0 head 0 is the head that the model relies on most: without it the margin falls by 50 % [40, 60] "
        "(zero), 60 % [50, 70] (mean). Of the heads that matter, layer 0 head 0 looks most at the answer's value in "
        "the context: 60 % of its weight where the answer is asked for."
    )
    assert answer(rows(zero=(0.1, 0.5), mean=(0.6, 0.3))).startswith(
        "Which head the model relies on most depends on what stands in for it: layer 0 head 1 (zero: 50 % [40, 60]); "
        "layer 0 head 0 (mean: 60 % [50, 70])."
    )
    assert answer(rows(zero=(0.1, 0.1))) == "No head by itself was shown to be worth more than 5 % of the margin."
    for table, cost in ((rows(zero=(0.1, 0.5)), "10 % [0, 20]"), (rows(0.2, zero=(0.5, 0.1)), "50 % [40, 60]")):
        weight = f"{100 * table['attention_to_value'][0]:.0f} % of its weight"
        assert answer(table).endswith(
            "No head that matters looks much at the answer's value in the context; layer 0 head 0 does most "
            f"({weight}), and costs {cost} (zero)."
        )
    assert "looks" not in answer(rows(np.nan, zero=(0.1, 0.5)))


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 2), (28, 16)])
def test_figures_of_any_size(layers, heads, tmp_path):
    """Of made-up numbers: one head, and the shape of a model of 0.6 billion parameters."""
    rng = np.random.default_rng(0)
    where = [(layer, head) for layer in range(layers) for head in range(heads)]
    table = pd.DataFrame(where, columns=["layer", "head"]).assign(kind="zero", metric="logit_diff")
    table = table.assign(strength=rng.normal(0, 0.1, len(where)), p_matters=rng.random(len(where)))
    table = table.assign(attention_to_value=rng.random(len(where)))
    pairs = pd.DataFrame(columns=["kind", "metric", "layer_a", "head_a", "layer_b", "head_b", "strength", "p_matters"])
    if len(where) > 1:
        pairs.loc[0] = ["zero", "logit_diff", *where[0], *where[1], 0.4, 0.01]
    figure = plot_heads(table, pairs, "zero", "logit_diff", "a model")
    assert len(figure.axes) == 3 + (len(where) > 1)  # with the colour bar
    image = figure.axes[0].get_images()[0].get_array()
    assert image is not None
    assert image.shape == (layers, heads)
    assert all(path.stat().st_size > 5_000 for path in style.save(figure, tmp_path / "heads"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output=here"], "--output here exists: choose another folder, nothing is overwritten"),
        (["--kinds=[none]"], "none"),
        (["--kinds=[]"], "kinds must be some of zero, mean, resample, each once"),
        (["--pairs_among=1"], "pairs_among must be 0, for no pairs, or at least 2, got 1"),
        (["--num_sequences=3", "--pairs_among=2"], "4 clusters are needed, there are 3"),
        (["--num_sequences=1"], "has no partner"),
        (["--num_sequences=1000000000000"], "1,000,000,000,000 sequences of 7 tokens would take"),
        (["--num_resamples=0"], "num_resamples must be at least 1, got 0"),
        (["--seed=-1"], "seed must be at least 0"),
        (["--task=words.json"], "holds no tokenizer"),
        (["--task=one.json"], "with one there is no distractor"),
        (["--task=large.json"], "the model's vocabulary (11) is smaller than the task's (67)"),
    ],
)
def test_bad_input_is_one_line(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name, task in {"one": MQAR(1, 8), "large": Pointer(2, 67), "words": TextRecall()}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(task.to_dict()))
    with pytest.raises(SystemExit) as end:
        main(["heads", str(POINTER), "--device=cpu", *options])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert words in error


def test_weights_that_are_not_finite_are_refused(make_vanilla, tmp_path, capsys):
    model = make_vanilla(vocab_size=8)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    folder = export(model, MQAR(2, 8), tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["heads", str(folder), "--device=cpu"])
    assert "lm_head.weight are NaN or infinite" in capsys.readouterr().err
