"""The table of a trace: shares of the gap with intervals, clustered; and what is refused."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from attnres.tasks import MQAR
from probe.analysis import stats
from probe.analysis.inference import Inference
from probe.trace import Flips, TraceResult, plan, trace
from probe.trace.result import GAP_NOT_POSITIVE, TRACE_COLUMNS
from tests.probe.trace.test_engine import flips
from tests.support.planted import TASK, redundant_blocks

HOW = Inference(num_resamples=200)


def recall_flips(task: MQAR, count: int) -> Flips:
    """The value of one key of each example is changed to one that is not in the context; that key is asked for."""
    batch, rows = task.batch("probe", range(count)), torch.arange(count)
    pair, ids = batch.query_order[:, 0], batch.input_ids
    new = torch.tensor([next(v for v in range(task.first_value, task.vocab_size) if v not in row)
                        for row in batch.values.tolist()])  # fmt: skip
    corrupted = ids.clone()
    corrupted[rows, 2 * pair + 1] = new
    return Flips(ids, corrupted, 2 * task.num_pairs, batch.values[rows, pair], new)


@pytest.fixture(scope="module")
def traced() -> TraceResult:
    """Of a model that solves recall, at the flipped value, its key and the query."""
    pairs = recall_flips(TASK, 24)
    value = pairs.differs.int().argmax(1)
    return trace(redundant_blocks().model, pairs, positions={"key": value - 1, "value": value, "query": pairs.position})


@pytest.fixture(scope="module")
def table(traced) -> pd.DataFrame:
    return traced.table(HOW)


def test_the_table_has_a_row_for_each_direction_site_and_position(traced, table):
    assert list(table.columns) == TRACE_COLUMNS
    assert len(table) == 2 * len(traced.sites) * len(traced.positions)
    keys = ["direction", "site", "read", "source", "position"]
    assert not table.duplicated(keys).any()
    assert set(table["metric"]) == {"logit_diff"}
    assert set(table["n_sequences"]) == {24}
    finals = table[table["sublayer"] == "final"]
    assert set(finals["scope"]) == {"final"}
    assert set(table["scope"]) == {"final", *(f"layer:{i}" for i in range(6))}
    assert (table["family"].notna() == (table["site"] == "source")).all()


def test_shares_are_ratios_of_sums_with_fiellers_intervals(traced, table):
    gap = traced.clean - traced.corrupted
    assert gap.mean() > 1
    assert set(table["no_strength"]) == {""}
    for direction, base, sign in (("denoise", traced.corrupted, 1), ("noise", traced.clean, -1)):
        d = traced.directions.index(direction)
        for index in range(0, len(traced.sites), 5):
            site = traced.sites[index]
            rows = table[
                (table["direction"] == direction) & (table["site"] == site.kind) & (table["read"] == site.read)
            ]
            rows = rows[rows["source"].isna() if site.source is None else rows["source"] == site.source]
            moved = (traced.margins[d, index] - base).T
            np.testing.assert_allclose(rows["effect"], moved.mean(0), atol=1e-12)
            expected = stats.strengths(sign * moved, gap, np.ones(24), 200, 0)
            for name, values in zip(("strength", "strength_low", "strength_high"), expected, strict=True):
                np.testing.assert_allclose(rows[name], values, atol=1e-12)
            normalised = (traced.margins[d, index] - traced.corrupted[None]).sum(1) / gap.sum()
            np.testing.assert_allclose(rows["normalised_margin"], normalised, atol=1e-12)


def test_the_embedding_of_the_flipped_value_is_the_whole_answer_and_what_comes_before_it_is_nothing(table):
    first = table[(table["site"] == "stream") & (table["read"] == 0)].set_index("position")["strength"]
    np.testing.assert_allclose(first["value"], 1.0, atol=1e-12)
    assert (first["query"] == 0).all()
    before = table[table["position"] == "key"]
    assert len(before) == len(table) / 3
    assert (before[["effect", "strength"]] == 0).all(axis=None)
    assert before["below_floor"].all()
    assert (before["p_value"] == 1).all()


def test_sequences_of_one_cluster_are_one_observation(traced):
    """Every sequence twice: the same table, of clusters of two."""
    twice = {f.name: getattr(traced, f.name) for f in fields(traced)}
    for name, axis in (("logits", 3), ("clean_logits", 0), ("corrupted_logits", 0), ("logit_sizes", 0)):
        twice[name] = np.repeat(twice[name], 2, axis=axis)
    doubled = TraceResult(**(twice | {"clusters": np.repeat(traced.clusters, 2)})).table(HOW)
    same = ["effect", "ci_low", "p_value", "p_adjusted", "strength", "strength_low", "strength_high", "n_clusters"]
    np.testing.assert_allclose(doubled[same], traced.table(HOW)[same], rtol=1e-6, atol=1e-9)
    assert set(doubled["n_sequences"]) == {48}


def test_where_the_gap_is_not_clear_of_zero_there_are_no_shares(make_model):
    """A random model's two margins differ by chance alone."""
    found = trace(make_model(), flips(count=8), ["output"]).table(HOW)
    assert set(found["no_strength"]) == {GAP_NOT_POSITIVE}
    assert found[["strength", "strength_low", "normalised_margin"]].isna().all(axis=None)
    assert found["effect"].notna().all()


def test_one_pair_alone_has_effects_and_no_intervals(make_model):
    found = trace(make_model(), flips(count=1), ["stream"])
    table = found.table(HOW)
    assert table["effect"].notna().all()
    assert table[["ci_low", "strength"]].isna().all(axis=None)
    assert np.isfinite(found.normalised).all()


# --- What is refused: each in one line --------------------------------------------------------------------------------

GOOD = {
    "clean_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
    "corrupted_ids": torch.tensor([[7, 2, 3], [4, 8, 6]]),
    "position": 2,
    "answer": torch.tensor([1, 2]),
    "flipped_answer": torch.tensor([3, 4]),
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": 3}, "sequence 0: position 3 is out of range, there are 3 tokens"),
        ({"position": torch.tensor([2, -1])}, "sequence 1: position -1 is out of range, there are 3 tokens"),
        ({"position": torch.tensor([2, 2, 2])}, "position has 3 numbers, there are 2 sequences"),
        ({"position": 1.5}, "position must be a number, or one for each sequence"),
        ({"position": "last"}, "position must be a number, or one for each sequence, got str"),
        ({"corrupted_ids": GOOD["clean_ids"]}, "sequence 0: the flip changes nothing, its tokens up to position 2"),
        ({"position": torch.tensor([2, 0])}, "sequence 1: the flip changes nothing, its tokens up to position 0"),
        ({"flipped_answer": torch.tensor([3, 2])}, "sequence 1: the flip changes nothing, its answer is 2"),
        ({"corrupted_ids": torch.tensor([[7, 2], [4, 8]])}, "clean_ids are (2, 3), corrupted_ids (2, 2)"),
        ({"clean_ids": torch.tensor([1, 2, 3])}, "clean_ids must be an int64 tensor (sequences, seq)"),
        ({"clean_ids": torch.zeros((0, 3), dtype=torch.long)}, "clean_ids must be an int64 tensor"),
        ({"clean_ids": torch.zeros((2, 3))}, "clean_ids must be an int64 tensor"),
        ({"clusters": torch.tensor([0, 2])}, "clusters must be numbered from 0 without a gap"),
    ],
)
def test_flips_that_are_none_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the text is looked at below)
        Flips(**(GOOD | fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": [0, 3]}, "positions: 3 is out of range, the last that an answer can depend on is 2"),
        ({"positions": [-1]}, "positions: -1 is out of range"),
        ({"positions": [1, 1]}, "position 1 is there twice"),
        ({"positions": []}, "positions must name at least one"),
        ({"positions": {"value": torch.tensor([0, 1, 2])}}, "positions 'value' has 3 numbers, there are 2 sequences"),
        ({"positions": {"all": torch.ones((2, 2), dtype=torch.bool)}}, "positions 'all' is a mask (2, 2)"),
        ({"sites": ["head"]}, "kind of site 'head' does not exist; choose from stream, output, input, source"),
        ({"sites": []}, "name at least one kind of site"),
        ({"directions": ["both"]}, "direction 'both' does not exist; choose from denoise, noise"),
        ({"directions": ["noise", "noise"]}, "directions must be one or both of denoise, noise, each once"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tokens_per_pass": 0}, "tokens_per_pass must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("call", [trace, plan])
def test_settings_that_do_not_fit_are_refused_in_one_line(make_model, call, settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(make_model(), Flips(**GOOD), **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_models_that_do_not_fit_are_refused(make_model, make_vanilla):
    pairs = Flips(**GOOD)
    with pytest.raises(ValueError, match="a Qwen3ForCausalLM has no sources of depth: trace its stream, output"):
        trace(make_vanilla(), pairs, ["stream", "source"])
    llama = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="a trace needs an AttnResForCausalLM or a Qwen3ForCausalLM, got LlamaFor"):
        trace(AutoModelForCausalLM.from_config(llama), pairs)
    with pytest.raises(ValueError, match="there is the token id 99, the model's vocabulary is 40"):
        trace(make_model(), replace(pairs, answer=torch.tensor([1, 99])))
    with pytest.raises(ValueError, match="there are 3 tokens, the model is made for 2"):
        trace(make_model(max_position_embeddings=2), pairs)
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="the model's logits are not finite: it overflows in float32"):
        trace(broken, pairs, ["stream"])
