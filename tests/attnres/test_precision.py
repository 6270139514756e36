"""Precision: routing is computed in float32 whatever the model's dtype. (In float64: tests/attnres/test_routing.py.)"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from attnres import Read, routing
from tests.conftest import BOTH

HALF = {torch.bfloat16: 0.1, torch.float16: 0.0125}  # tolerance of logits, as a share of the largest


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_sums_in_float32(dtype):
    """What a read gives is the float64 sum of its sources, rounded once."""
    sources = tuple(torch.randn(2, 3, 16).to(dtype) for _ in range(5))
    weights = torch.randn(2, 3, 5).softmax(-1)
    exact = torch.einsum("btn,nbth->bth", weights.double(), torch.stack(sources).double())
    mixed = routing.mix(weights, sources)
    assert mixed.dtype == dtype
    assert (mixed.double() - exact).abs().max() <= (0.502 * torch.finfo(dtype).eps * exact.abs()).max()


@BOTH
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_half_precision_routes_in_float32(make_model, make_tokens, source, mode, autocast, dtype):
    """Sublayers run in half precision; from what they write, the routing weights follow in float32."""
    single = make_model(attnres_source=source, attnres_mode=mode)
    for parameter in single.parameters():  # so that only the computation differs
        parameter.data = parameter.data.to(dtype).float()
    model, reads = copy.deepcopy(single), []
    for parameter in [] if autocast else model.parameters():
        parameter.data = parameter.data.to(dtype)

    def record(read: Read) -> Read:
        reads.append(read)
        return read

    input_ids = make_tokens(model)
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        output = model(input_ids, output_routing_weights=True, intervention=record)
    assert output.logits.dtype == dtype
    expected = single(input_ids).logits
    assert (output.logits - expected).abs().max() <= HALF[dtype] * expected.abs().max()
    parameters = {name: parameter.double() for name, parameter in model.routing_parameters().items()}
    for read, weights in zip(reads, output.routing_weights, strict=True):
        assert weights.dtype == torch.float32
        assert torch.equal(weights, read.routing_weights)
        if not read.sources:
            continue
        layer = "" if read.site.layer_idx is None else f"layers.{read.site.layer_idx}."
        name = f"model.{layer}{read.site.sublayer.removeprefix('self_')}_res_"
        values = torch.stack(read.sources, dim=-2).double()  # (B, T, n, H)
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
        logits = (values * parameters[name + "norm.weight"]) @ parameters[name + "proj.weight"][0]
        if read.site.has_current:
            logits[..., -1] += parameters[name + "bias"]
        # Logits rounded to half precision would be off by 1e-3 and more.
        torch.testing.assert_close(weights.double(), logits.softmax(-1), atol=5e-6, rtol=0)
