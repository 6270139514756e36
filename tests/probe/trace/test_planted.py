"""Models whose mechanism is set by hand: a trace finds it, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from probe.trace import Flips, TraceResult, trace
from tests.support.planted import HEAD, HIDDEN, LOUD, OUT, THETA, C, P, R, V, blank, look_back, move

FOUND, NOTHING = 0.9, 0.02
CHANGED, COPIED, ASKED = 2, 3, 5  # positions: the token is changed, it is copied, the answer is asked for


def vanilla_blank(num_layers: int) -> Qwen3ForCausalLM:
    """As `planted.blank`, without depth routing."""
    shape = {"vocab_size": V, "hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": num_layers}
    shape |= {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": HEAD, "tie_word_embeddings": False}
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "max_position_embeddings": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**shape)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.zero_()
        if "q_norm" in name or "k_norm" in name:
            parameter.fill_(3.5)
    return model


def copies(model, first: int, second: int) -> None:
    """Layer `first` copies the token before into P; layer `second` moves P, from two back, to the output."""
    model.model.embed_tokens.weight[:, C] = 1
    model.model.embed_tokens.weight[:, R] = torch.eye(V)
    model.lm_head.weight[:, OUT] = torch.eye(V)
    look_back(model, first, 0, COPIED - CHANGED)
    move(model, first, 0, R, P, 1.0)
    look_back(model, second, 0, ASKED - COPIED)
    move(model, second, 0, P, OUT, LOUD)


def tokens(count: int = 4) -> Flips:
    """Random tokens; the one that is copied is changed, and with it the answer."""
    clean = torch.randint(0, V // 2, (count, ASKED + 1), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, CHANGED] += V // 2
    return Flips(clean, corrupted, ASKED, clean[:, CHANGED], corrupted[:, CHANGED])


def moved(result: TraceResult) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the gap, (sites, positions, sequences): recovered by denoising, and lost by noising."""
    return result.normalised[0], 1 - result.normalised[1]


def found(result: TraceResult, direction: int) -> set[tuple]:
    """(kind, read, source, position) of what moves the whole gap in every sequence; all else must move nothing."""
    shares, sites = moved(result)[direction], set()
    for index, site in enumerate(result.sites):
        for place, position in enumerate(result.positions):
            values = shares[index, place]
            if (values > FOUND).all():
                sites.add((site.kind, site.read, site.source, position))
            else:
                assert (np.abs(values) < NOTHING).all(), (site, position, values)
    return sites


def margins_are_clear(result: TraceResult) -> bool:
    return bool((result.clean > 5).all() and (result.corrupted < -5).all())


@pytest.mark.parametrize("direction", [0, 1])
def test_a_two_layer_copy_circuit_is_traced_to_exactly_its_sites(direction):
    model = vanilla_blank(num_layers=2)
    copies(model, 0, 1)
    result = trace(model, tokens())
    assert margins_are_clear(result)
    assert found(result, direction) == {
        ("stream", 0, None, CHANGED),
        ("input", 0, None, CHANGED),
        ("output", 0, None, COPIED),
        ("stream", 1, None, COPIED),
        ("stream", 2, None, COPIED),
        ("input", 2, None, COPIED),
        ("output", 2, None, ASKED),
        ("stream", 3, None, ASKED),
        ("stream", 4, None, ASKED),
    }


@pytest.mark.parametrize("direction", [0, 1])
def test_a_route_of_depth_is_traced_to_exactly_its_read_and_source(direction):
    """Block sums, a block for each layer: the last layer's attention takes what the first wrote from an older block,
    while a layer between them writes nothing, and no stream carries it there."""
    model = blank("block_sum", num_blocks=3, num_layers=3)
    copies(model, 0, 2)
    result = trace(model, tokens())
    assert margins_are_clear(result)
    assert found(result, direction) == {
        ("stream", 0, None, CHANGED),
        ("input", 0, None, CHANGED),
        ("source", 0, 0, CHANGED),  # the embedding, at the first read
        ("output", 0, None, COPIED),
        ("stream", 1, None, COPIED),
        ("stream", 2, None, COPIED),  # the first block, whole
        ("input", 4, None, COPIED),
        ("source", 4, 1, COPIED),  # of all three sources, that block
        ("output", 4, None, ASKED),
        ("stream", 5, None, ASKED),
        ("stream", 6, None, ASKED),
        ("input", 6, None, ASKED),
        ("source", 6, 3, ASKED),  # the last block, at the final read
    }
    families = {(site.read, site.source): site.family for site in result.sites if site.kind == "source"}
    assert (families[0, 0], families[4, 1], families[6, 3]) == ("embedding", "older", "prev_completed")


def two_routes(threshold: float):
    """One token, two routes: layers 0 and 1 both write its bit, each into a block of its own, and layer 2's MLP writes
    1 if the sum of both is above `threshold`: 0.5 makes an OR of the routes, 1.5 an AND.

    A constant outweighs everything in each norm, so that nothing else changes scale.
    """
    constant, bit, routes, out, hidden, slope = 100.0, 1, (2, 3), 4, 8, 40.0
    model = blank("block_sum", 3, 3, hidden_size=hidden, intermediate_size=4, num_attention_heads=1,
                  num_key_value_heads=1, head_dim=4)  # fmt: skip
    unit = math.sqrt(hidden)  # of the constant, after any norm
    model.model.embed_tokens.weight[:, 0] = constant
    model.model.embed_tokens.weight[V // 2 :, bit] = 1
    for layer, route in enumerate(routes):
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight[0, 0] = 10 / unit  # open
        mlp.up_proj.weight[0, bit] = constant / unit  # 1, if the bit is set
        mlp.down_proj.weight[route, 0] = 1 / 10
    reader = model.model.layers[2].mlp  # relu(x + 1/4) - relu(x - 1/4), for x the sum less the threshold: 0 or 1/2
    for row, edge in ((0, 0.25), (1, -0.25)):
        reader.gate_proj.weight[row, list(routes)] = slope * constant / unit
        reader.gate_proj.weight[row, 0] = slope * (edge - threshold) / unit
        reader.up_proj.weight[row, 0] = 1 / unit
        reader.down_proj.weight[out, row] = (1 if edge > 0 else -1) * 2 / slope
    model.lm_head.weight[1, out] = 10 * constant / unit
    return model


def bits() -> Flips:
    clean = torch.tensor([[V // 2], [V - 1]])
    return Flips(clean, clean - V // 2, 0, 1, 0)


@pytest.mark.parametrize(
    ("threshold", "denoised", "noised"),
    [(0.5, True, False), (1.5, False, True)],
    ids=["OR", "AND"],
)
def test_denoising_finds_either_of_two_routes_and_noising_neither_and_the_reverse_where_both_are_needed(
    threshold, denoised, noised
):
    result = trace(two_routes(threshold), bits())
    assert ((result.clean - result.corrupted) > 5).all()
    routes = {("source", 5, 1, 0), ("source", 5, 2, 0), ("output", 1, None, 0), ("output", 3, None, 0)}
    common = {("stream", 0, None, 0), ("input", 5, None, 0), ("output", 5, None, 0), ("source", 6, 3, 0)}
    for direction, one_route_does in enumerate((denoised, noised)):
        sites = found(result, direction)
        assert common <= sites
        assert sites & routes == (routes if one_route_does else set())
