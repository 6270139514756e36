"""`attnres-probe flip`: what a trained and an untrained model do, on any architecture, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from attnres.tasks import Hops, Pointer, task_from_dict
from probe.analysis.flips import flip_shares
from probe.cli import main
from probe.examples.flip import FlipResult, flip_outcomes
from tests.support.paths import ROOT

POINTER = ROOT / "tests/fixtures/pointer"


def shares_of(folder: Path, tmp_path: Path, *options: str) -> pd.DataFrame:
    assert main(["flip", str(folder), "--device=cpu", f"--output={tmp_path / 'outcomes.parquet'}", *options]) == 0
    return flip_shares(pd.read_parquet(tmp_path / "outcomes.parquet"))


def export(model, task, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "task.json").write_text(json.dumps(task.to_dict()))
    return folder


def test_a_trained_model_follows_the_addressed_cell_and_no_other(tmp_path, capsys):
    shares = shares_of(POINTER, tmp_path, "--num_sequences=512").set_index("asked")
    assert (shares.loc[True, ["follows", "moves"]] >= 0.99).all()
    assert (shares.loc[True, ["follows_low", "moves_low"]] > 0.98).all()
    assert (shares.loc[False, ["follows", "moves"]] <= 0.01).all()
    assert (shares.loc[False, ["follows_high", "moves_high"]] < 0.02).all()
    printed = capsys.readouterr().out
    assert "on 512 sequences of task pointer, address_bits 2" in printed
    assert "asked for       1.0000 [0.9926, 1.0000]" in printed


def test_an_untrained_model_does_not_tell_them_apart(make_model, tmp_path):
    model = make_model(vocab_size=11, num_hidden_layers=2)
    folder = export(model, Pointer(2, 11), tmp_path / "untrained")
    shares = shares_of(folder, tmp_path, "--num_sequences=512").set_index("asked")
    assert shares.loc[True, "follows_low"] <= shares.loc[False, "follows_high"]
    assert shares.loc[False, "follows_low"] <= shares.loc[True, "follows_high"]
    assert shares.loc[True, "follows"] < 0.5


@pytest.mark.parametrize("architecture", ["attnres", "vanilla", "gpt2", "bloom"])
@torch.no_grad()
def test_outcomes_are_those_of_one_sequence_at_a_time(make_model, make_vanilla, architecture, tmp_path):
    """And of any causal language model, by the names of the groups."""
    task = Hops(num_facts=5, num_entities=6, max_hops=3, min_hops=0)
    sizes = {"vocab_size": task.vocab_size}
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    elif architecture == "bloom":  # has no limit of positions
        model = BloomForCausalLM(BloomConfig(**sizes, hidden_size=16, n_layer=2, n_head=2)).eval()
    else:
        model = (make_model if architecture == "attnres" else make_vanilla)(**sizes)
    shares_of(export(model, task, tmp_path / "model"), tmp_path, "--num_sequences=6", "--seed=2", "--batch_size=4")
    found = pd.read_parquet(tmp_path / "outcomes.parquet")
    batch, rows = task.batch("probe", range(6)), []
    for change, flip in enumerate(task.flips(batch, seed=2)):
        for sequence, query in [(s, q) for s in range(6) for q in range(task.num_queries)]:
            position = int(batch.query_positions[query])
            before, after = (
                int(model(part.input_ids[sequence : sequence + 1]).logits[0, position].argmax())
                for part in (batch, flip.changed)
            )
            old, new = (int(part.labels[sequence, position]) for part in (batch, flip.changed))
            value = int(flip.value[sequence])
            if old == new == value:
                continue
            group = f"hops_{int(batch.hops[sequence, query])}"
            follows = after == (new if old != new else value)
            rows.append((change, sequence, query, group, old != new, follows, after != before))
    expected = pd.DataFrame(rows, columns=found.columns)
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected, check_dtype=False)


def test_shares_are_means_of_their_rows_with_intervals_by_sequence():
    model = AutoModelForCausalLM.from_pretrained(POINTER).float()
    task = task_from_dict(json.loads((POINTER / "task.json").read_text()))
    outcomes = flip_outcomes(model, task, task.batch("train", range(20)))
    result, shares = FlipResult.of(outcomes), flip_shares(outcomes).set_index("asked")
    assert (result.n_queried, result.n_other, result.n_sequences) == (20, 20, 20)
    assert shares.loc[True, "follows"] == result.follows_queried == 1
    assert shares.loc[True, "follows_low"] == pytest.approx(20 / (20 + 1.959964**2))  # Wilson's, for a share of 1
    assert shares.loc[True, "follows_high"] == 1
    more = pd.concat([outcomes, outcomes])  # no more sequences: no narrower
    assert flip_shares(more).set_index("asked").loc[True, "follows_low"] == shares.loc[True, "follows_low"]


def test_groups_are_in_the_order_of_their_numbers():
    names = [f"position_{number}" for number in range(12)]
    rows = [{"sequence": 0, "group": name, "asked": True, "follows": True, "moves": True} for name in names[::-1]]
    assert flip_shares(pd.DataFrame(rows))["group"].tolist() == ["all", *names]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output=out.txt"], "--output out.txt must end in .json, .csv, .parquet"),
        (["--output=here.csv"], "--output here.csv exists: choose another, nothing is overwritten"),
        (["--task=full.json"], "the flip test needs a value that is not in the context, and this task has none left"),
        (["--task=large.json"], "the model's vocabulary (11) is smaller than the task's (67)"),
        (["--task=long.json"], "the task's longest sequence has at least 16 tokens, the model is made for 7"),
        (["--num_sequences=0"], "num_sequences"),
        (["--num_sequences=1000000000000"], "1,000,000,000,000 sequences of 7 tokens would take"),
        (["--seed=-1"], "seed"),
        ([f"--seed={2**70}"], f"--seed must be at most {2**63 - 1:,}"),
        (["--tokenizer=gpt2"], "the task pointer has token ids of its own"),
    ],
)
def test_bad_input_is_one_line(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.csv").write_text("mine")
    tasks = {"full": Pointer(3, 11), "large": Pointer(2, 67), "long": Hops(4, 4, max_hops=1)}
    for name, task in tasks.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(task.to_dict()))
    with pytest.raises(SystemExit) as end:
        main(["flip", str(POINTER), "--device=cpu", *options])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert words in error
    assert (tmp_path / "here.csv").read_text() == "mine"
