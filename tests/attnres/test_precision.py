"""Precision: routing is computed in float32 whatever the model's dtype, and in float64 in a float64 model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from attnres import AttnResForCausalLM, Read, routing
from tests.conftest import BOTH
from tests.support import oracle


def captured(model: AttnResForCausalLM, input_ids: torch.Tensor) -> list[Read]:
    reads: list[Read] = []

    def keep(read: Read) -> Read:
        reads.append(read)
        return read

    with torch.no_grad():
        model(input_ids, intervention=keep)
    return reads


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(make_model, make_tokens, source, mode, dtype):
    """What a read gives is the float64 sum of its sources, rounded once."""
    model = make_model(attnres_source=source, attnres_mode=mode)
    sources = tuple(torch.randn(2, 3, 16).to(dtype) for _ in range(5))
    weights = torch.randn(2, 3, 5).softmax(-1)
    exact = torch.einsum("btn,nbth->bth", weights.double(), torch.stack(sources).double())
    mixed = routing.mix(weights, sources)
    assert mixed.dtype == dtype
    assert (mixed.double() - exact).abs().max() <= (0.502 * torch.finfo(dtype).eps * exact.abs()).max()
    model.to(dtype)
    for read in captured(model, make_tokens(model)):
        assert read.routing_weights.dtype == torch.float32


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@BOTH
def test_the_key_norm_has_the_configured_epsilon(make_model, make_tokens, source, mode, eps):
    model = make_model(attnres_source=source, attnres_mode=mode, rms_norm_eps=eps)
    input_ids = make_tokens(model)
    with torch.no_grad():
        assert (model(input_ids).logits - oracle.forward(model, input_ids)[0]).abs().max() <= 1e-5


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.0125)])
def test_half_precision_routes_in_float32(make_model, make_tokens, source, mode, dtype, tolerance):
    single = make_model(attnres_source=source, attnres_mode=mode)
    for parameter in single.parameters():  # so that only the computation differs
        parameter.data = parameter.data.to(dtype).float()
    model = copy.deepcopy(single)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    input_ids = make_tokens(model)
    reads = captured(model, input_ids)
    with torch.no_grad():
        output = model(input_ids, output_routing_weights=True)
        expected = single(input_ids).logits
    assert output.logits.dtype == dtype
    assert (output.logits - expected).abs().max() <= tolerance * expected.abs().max()
    parameters = dict(model.named_parameters())
    for read, weights in zip(reads, output.routing_weights, strict=True):
        assert weights.dtype == torch.float32
        name = {"self_attn": f"layers.{read.site.layer_idx}.attn", "mlp": f"layers.{read.site.layer_idx}.mlp"}
        query, gain = (
            parameters[f"model.{name.get(read.site.sublayer, 'final')}_res_{part}.weight"].float().flatten()
            for part in ("proj", "norm")
        )
        normed = F.rms_norm(torch.stack(read.sources).float(), (16,), gain, eps=1e-6)
        logits = torch.einsum("h,nbth->btn", query, normed)
        if read.site.has_current:
            logits[..., -1] += parameters[f"model.{name[read.site.sublayer]}_res_bias"].float()
        # Logits rounded to half precision would be off by 1e-3 and more.
        torch.testing.assert_close(weights, logits.softmax(-1), atol=2e-6, rtol=0)


@BOTH
def test_as_the_oracle_in_float64(make_model, make_tokens, source, mode):
    model = make_model(num_hidden_layers=7, attnres_num_blocks=3, attnres_source=source, attnres_mode=mode).double()
    input_ids = make_tokens(model)
    with torch.no_grad():
        output = model(input_ids, output_routing_weights=True)
        logits, routing_weights = oracle.forward(model, input_ids)
    assert (output.logits - logits).abs().max() <= 1e-11
    for weights, expected in zip(output.routing_weights, routing_weights, strict=True):
        torch.testing.assert_close(weights, expected, atol=1e-11, rtol=0)
