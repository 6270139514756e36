"""The weight from the position that asks to that of the value: transformers' own, and where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnres.tasks import MQAR, Hops, Pointer
from probe.examples.examples import Examples
from probe.heads import measure_heads
from probe.heads.attention import value_places

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
SHAPE = {"vocab_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("fields", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("architecture", ["attnres", "vanilla"])
def test_weights_are_those_of_transformers(make_model, make_vanilla, architecture, fields, monkeypatch):
    monkeypatch.setattr("probe.heads.attention.KEYS_AT_ONCE", 1)
    make = make_model if architecture == "attnres" else make_vanilla
    model = make(**SHAPE | fields)
    examples = Examples.from_batch(MQAR(num_pairs=3, vocab_size=24).batch("probe", range(4)))
    found = measure_heads(model, examples, ("zero",), pairs=0).attention_to_value.reshape(3, 4, -1)
    eager = make(**SHAPE | fields, attn_implementation="eager")
    weights = eager(examples.input_ids, output_attentions=True).attentions
    for layer, head, b in np.ndindex(3, 4, 4):
        expected = []
        for asked in examples.queries[b].nonzero().flatten().tolist():
            (value,) = (examples.input_ids[b] == examples.labels[b, asked]).nonzero().flatten().tolist()
            expected.append(weights[layer][b, head, asked, value].item())
        assert found[layer, head, b] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found.std() > 0.01


def test_the_value_is_where_the_answer_stands_once_before():
    examples = Examples.from_batch(Pointer(2, 11).batch("probe", range(3)))
    places = value_places(examples)
    assert places[:, 0].tolist() == [0, 1, 2]
    assert (places[:, 1] == examples.input_ids.shape[1] - 1).all()
    assert torch.equal(examples.input_ids[[0, 1, 2], places[:, 2]], examples.labels[:, -1])
    assert not len(value_places(Examples.from_batch(Hops().batch("probe", range(3)))))  # an entity stands at several


def test_an_answer_of_several_tokens_stands_where_all_of_them_do(make_vanilla):
    row = ([9, 4, 8, 4, 2, 7, 4], [-100] * 5 + [4, 2], [[4, 8], [4, 2]])
    absent = ([9, 4, 2, 4, 2, 7, 4], [-100] * 5 + [4, 8], [[4, 8], [4, 2]])  # its tokens stand nowhere in a row
    twice = ([9, 4, 2, 4, 2, 7, 4], [-100] * 5 + [4, 2], [[4, 8], [4, 2]])
    rows = (map(torch.tensor, each) for each in (row, absent, twice))
    examples = Examples.collate([(ids, labels, candidates) for ids, labels, candidates in rows])
    assert value_places(examples).tolist() == [[0, 5, 3]]
    found = measure_heads(make_vanilla(num_hidden_layers=2), examples, ("zero",), pairs=0)
    assert np.isfinite(found.attention_to_value[:, 0]).all()
    assert np.isnan(found.attention_to_value[:, 1:]).all()
    weights = found.table()["attention_to_value"].to_numpy()
    np.testing.assert_allclose(weights[:4], found.attention_to_value[:, 0])
