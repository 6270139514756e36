"""Operators, bytes and FLOPs of a step: counted rightly, and no more of them than is recorded (docs/performance.md)."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.counts import SHAPES, OperatorCounter, counted, reads_of
from tests.support.paths import ROOT

RECORD = json.loads((ROOT / "benchmarks/results/counts.json").read_text())
SMALL = SHAPES["8x64"] | {"layers": 2, "blocks": 2, "batch": 1, "length": 4}


def test_operators_and_bytes_of_a_known_graph():
    """A product (2, 3) x (3, 4) and a sum of it with itself; the views between are free."""
    one, other = torch.ones(2, 3), torch.ones(3, 4)
    with OperatorCounter() as counter:
        product = one @ other.view(4, 3).transpose(0, 1)
        product.view(8) + product.flatten()
    assert counter.operators == {"mm": 1, "add": 1}
    assert counter.bytes == 4 * ((6 + 12 + 8) + (8 + 8 + 8))


@pytest.mark.parametrize("source", ["cumulative", "block_sum"])
def test_reads_as_peers_write_them_are_the_same_reads(make_model, source):
    model, ids = (
        make_model(attnres_source=source, num_hidden_layers=5, attnres_num_blocks=3),
        torch.arange(12).view(2, 6),
    )
    with torch.no_grad():
        expected = model(ids, use_cache=False, output_routing_weights=True)
        with reads_of("stacked"):
            found = model(ids, use_cache=False, output_routing_weights=True)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    for one, other in zip(found.routing_weights, expected.routing_weights, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_more_tokens_move_more_bytes_and_launch_nothing_more():
    one, twice = (counted("cumulative", SMALL | {"length": length}, "training") for length in (4, 8))
    assert one["operators"] == twice["operators"]
    assert one["bytes"] < twice["bytes"] < 2 * one["bytes"]  # weights are taken once
    assert one["flops"] < twice["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cumulative", "block_sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_is_launched_or_moved_than_is_recorded(shape, model):
    rows = {(row["model"], row["step"]): row for row in RECORD[shape]["results"] if not row["autocast"]}
    for step, most in (("training", 1.42), ("decoding", 1.03)):
        found, vanilla = (counted(name, SHAPES[shape], step) for name in (model, "vanilla"))
        for count in ("operators", "bytes", "flops"):
            recorded = rows[model, step][count] / rows["vanilla", step][count]
            assert found[count] / vanilla[count] <= 1.005 * recorded
        assert found["bytes"] <= most * vanilla["bytes"]
        assert found["operators"] <= 1.80 * vanilla["operators"]
