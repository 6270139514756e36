"""The read: equal to the oracle in value and gradient, exact under no-op interventions, and without memory."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attnres import Read
from attnres.routing import DepthState, map_state
from tests.conftest import BOTH
from tests.support import oracle

# 7 layers in blocks of 3, 3 and 1; and of 2, 2, 2 and 1: last blocks that are shorter than the others.
SHORT_LAST_BLOCK = {"num_hidden_layers": 7, "attnres_num_blocks": 3}
SHAPES = [SHORT_LAST_BLOCK, {"num_hidden_layers": 4, "attnres_num_blocks": 2}]


@st.composite
def shapes(draw: st.DrawFn) -> dict:
    num_layers = draw(st.integers(1, 7))
    num_kv_heads = draw(st.integers(1, 2))
    return {
        "num_hidden_layers": num_layers,
        "attnres_num_blocks": draw(st.integers(1, num_layers)),
        "hidden_size": draw(st.sampled_from([6, 10, 24])),  # of 4 numbers, the norm can be next to zero
        "intermediate_size": draw(st.sampled_from([6, 20])),
        "num_attention_heads": num_kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([4, 8])),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 0.3])),
    }


seeds = st.integers(0, 2**31)
batches = st.integers(1, 3)
seqs = st.integers(1, 9)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:  # of a read without sources
        return
    scale = max(1.0, expected.abs().max().item())
    error = (actual - expected).abs().max().item() / scale
    assert error <= tolerance, f"{what}: {error:.1e} of {scale:.1e}"


def gradients(model: nn.Module, logits: Tensor, direction: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logits * direction).sum().backward()
    # A bias of a read without `current` is in no graph: no gradient and zero gradient are the same here.
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


class DoubleNorm(nn.Module):
    """An RMSNorm that, unlike transformers' own, does not go through float32 in a float64 model."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def to_double(model: nn.Module) -> nn.Module:
    model = model.double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen3RMSNorm":
                setattr(parent, name, DoubleNorm(child))
    return model


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@settings(max_examples=10)
@given(shape=shapes(), batch=batches, seq=seqs, seed=seeds)
@example(shape=SHORT_LAST_BLOCK, batch=2, seq=5, seed=0)
def test_equals_the_oracle_in_value_and_gradient(
    make_model, make_tokens, source, mode, dtype, tolerance, shape, batch, seq, seed
):
    model = make_model(seed=seed, attnres_source=source, attnres_mode=mode, **shape)
    if dtype == torch.float64:
        model = to_double(model)
    input_ids = make_tokens(model, batch, seq, seed)
    outputs = model(input_ids, output_routing_weights=True)
    logits, routing_weights = oracle.forward(model, input_ids)

    assert outputs.logits.dtype == dtype
    assert_close(outputs.logits, logits, tolerance, "logits")
    assert isinstance(outputs.routing_weights, tuple)
    for index, (fast, naive) in enumerate(zip(outputs.routing_weights, routing_weights, strict=True)):
        assert fast.dtype == dtype
        assert_close(fast, naive, tolerance, f"routing weights of read {index}")
        if fast.shape[-1]:  # not the first read of an additive model, which has no sources
            torch.testing.assert_close(fast.sum(-1), torch.ones(batch, seq, dtype=dtype), atol=1e-6, rtol=0)
    direction = torch.randn_like(logits) / logits.numel() ** 0.5
    fast, naive = gradients(model, outputs.logits, direction), gradients(model, logits, direction)
    for name in naive:
        assert_close(fast[name], naive[name], tolerance, f"gradient of {name}")
    num_sources = [weights.shape[-1] for weights in routing_weights]
    if max(num_sources) > 1:  # else nothing is routed: one block_sum layer in full mode still has its final read
        routed = [name for name, grad in fast.items() if "_res_proj" in name and grad.any()]
        assert routed, "no query has a gradient: the comparison is empty"


def mask_and_renormalise(weights: Tensor, source: int) -> Tensor:
    weights = weights.clone()
    weights[..., source] = 0
    return weights / weights.sum(-1, keepdim=True)


@BOTH
@settings(max_examples=10)
@given(shape=shapes(), seed=seeds, data=st.data())
def test_intervened_weights_act_as_in_the_oracle(make_model, make_tokens, source, mode, shape, seed, data):
    model = make_model(seed=seed, attnres_source=source, attnres_mode=mode, **shape)
    input_ids = make_tokens(model, seed=seed)
    sizes = [weights.shape[-1] for weights in oracle.forward(model, input_ids)[1]]
    reads = [index for index, size in enumerate(sizes) if size > 1]
    assume(reads)  # an additive model of one block has none
    masked = {
        i: data.draw(st.integers(0, sizes[i] - 1)) for i in data.draw(st.sets(st.sampled_from(reads), min_size=1))
    }

    def intervention(read: Read) -> Read:
        if read.site.index not in masked:
            return read
        return read._replace(routing_weights=mask_and_renormalise(read.routing_weights, masked[read.site.index]))

    with torch.no_grad():
        outputs = model(input_ids, output_routing_weights=True, intervention=intervention)
        logits, routing_weights = oracle.forward(
            model, input_ids, {i: lambda w, v, n=n: (mask_and_renormalise(w, n), v) for i, n in masked.items()}
        )
    assert_close(outputs.logits, logits, 1e-5, "logits")
    for index, (fast, naive) in enumerate(zip(outputs.routing_weights, routing_weights, strict=True)):
        assert_close(fast, naive, 1e-5, f"routing weights of read {index}")


def identity(read: Read) -> Read:
    return read


def clones(read: Read) -> Read:
    return Read(read.site, read.routing_weights.clone(), tuple(source.clone() for source in read.sources))


@BOTH
@pytest.mark.parametrize("no_op", [identity, clones])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_op_intervention_changes_no_bit(make_model, make_tokens, source, mode, no_op, dtype):
    model = make_model(attnres_source=source, attnres_mode=mode, **SHORT_LAST_BLOCK).to(dtype)
    input_ids = make_tokens(model)
    with torch.no_grad():
        clean = model(input_ids, output_routing_weights=True)
        same = model(input_ids, output_routing_weights=True, intervention=no_op)
    assert torch.equal(same.logits, clean.logits)
    assert all(map(torch.equal, same.routing_weights, clean.routing_weights))


def tensors(state: DepthState) -> list[Tensor]:
    current = [] if state.current is None else [state.current]
    return [*state.completed, *current, *(logit for logits in state.completed_logits for logit in logits)]


def same_state(a: DepthState, b: DepthState) -> bool:
    same_shape = a.read_index == b.read_index and (a.current is None) == (b.current is None)
    return same_shape and len(tensors(a)) == len(tensors(b)) and all(map(torch.equal, tensors(a), tensors(b)))


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=["short_last_block", "even_blocks"])
def test_intervention_changes_what_follows_it_and_nothing_before(make_model, make_tokens, source, mode, shape):
    model = make_model(attnres_source=source, attnres_mode=mode, **shape)
    input_ids = make_tokens(model)
    noise = torch.randn(model.config.hidden_size)

    def run(intervention=None):
        return model.model(input_ids, output_routing_weights=True, output_depth_states=True, intervention=intervention)

    with torch.no_grad():
        clean = run()
        for index in range(len(clean.routing_weights)):
            if clean.routing_weights[index].shape[-1] == 0:
                continue
            # Sources, not weights: a read of one source has no other weights to be given.
            ablated = run(
                lambda read, index=index: (
                    read._replace(sources=tuple(s + noise for s in read.sources)) if read.site.index == index else read
                )
            )
            is_final = index == 2 * model.config.num_hidden_layers
            num_before = len(clean.depth_states) if is_final else index + 1
            for number, (a, b) in enumerate(zip(ablated.depth_states, clean.depth_states, strict=True)):
                assert same_state(a, b) == (number < num_before), (index, number)
            assert all(map(torch.equal, ablated.routing_weights[: index + 1], clean.routing_weights[: index + 1]))
            assert not torch.allclose(ablated.last_hidden_state, clean.last_hidden_state)
            # With delta_block sources nothing of the last block becomes one.
            last = (model.sites[-1].num_completed - 1) * model.config.layers_per_block
            becomes = (source, mode) != ("delta_block", "block") or index < 2 * last
            if becomes and index + 1 < len(clean.routing_weights) and clean.routing_weights[-1].shape[-1] > 1:
                later = zip(ablated.routing_weights[index + 1 :], clean.routing_weights[index + 1 :], strict=True)
                assert any(not torch.equal(a, b) for a, b in later)


@BOTH
@settings(max_examples=8)
@given(shape=shapes(), batch=batches, seq=seqs, seed=seeds)
@example(shape=SHORT_LAST_BLOCK, batch=2, seq=6, seed=0)
def test_resuming_from_any_state_gives_the_same_bits(make_model, make_tokens, source, mode, shape, batch, seq, seed):
    model = make_model(seed=seed, attnres_source=source, attnres_mode=mode, **shape)
    input_ids = make_tokens(model, batch, seq, seed)
    with torch.no_grad():
        full = model.model(input_ids, output_routing_weights=True, output_depth_states=True)
        logits = model(input_ids).logits
        assert len(full.depth_states) == 2 * shape["num_hidden_layers"] + 1
        for number, state in enumerate(full.depth_states):
            assert state.read_index == number
            resumed = model.model(depth_state=state, output_routing_weights=True, output_depth_states=True)
            assert torch.equal(resumed.last_hidden_state, full.last_hidden_state)
            assert len(resumed.depth_states) == len(full.depth_states) - number
            assert all(map(same_state, resumed.depth_states, full.depth_states[number:]))
            assert len(resumed.routing_weights) == len(full.routing_weights[number:])
            assert all(map(torch.equal, resumed.routing_weights, full.routing_weights[number:]))
            assert torch.equal(model(depth_state=state).logits, logits)


@BOTH
def test_stopping_and_resuming_elsewhere_gives_the_same_bits(make_model, make_tokens, source, mode):
    """Stop before any read, keep some sequences of the batch, go on: as if the others had never been there."""
    model = make_model(attnres_source=source, attnres_mode=mode, **SHORT_LAST_BLOCK)
    input_ids = make_tokens(model, batch=3)
    num_sublayers = 2 * model.config.num_hidden_layers
    with torch.no_grad():
        full = model.model(input_ids).last_hidden_state
        for stop in range(1, num_sublayers):
            stopped = model.model(input_ids, stop_before=stop, output_depth_states=True, output_routing_weights=True)
            assert stopped.last_hidden_state is None
            assert len(stopped.routing_weights) == stop
            state = stopped.depth_states[-1]
            assert state.read_index == stop
            kept = map_state(len(model.model.sites), state, lambda x: x[1:])
            torch.testing.assert_close(model.model(depth_state=kept).last_hidden_state, full[1:], rtol=0, atol=1e-6)
        for wrong in (-1, 0, num_sublayers):
            with pytest.raises(ValueError, match="stop_before must be a sublayer's read after 0, got"):
                model.model(input_ids, stop_before=wrong)


@BOTH
def test_resuming_keeps_mask_and_intervention(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode, **SHORT_LAST_BLOCK)
    input_ids = make_tokens(model)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0

    def intervention(read: Read) -> Read:  # acts in the last layer alone, so every earlier state is a clean one
        if read.site.layer_idx != model.config.num_hidden_layers - 1:
            return read
        return read._replace(routing_weights=read.routing_weights.flip(-1))

    with torch.no_grad():
        states = model.model(input_ids, attention_mask=attention_mask, output_depth_states=True).depth_states
        ablated = model(input_ids, attention_mask=attention_mask, intervention=intervention).logits
        assert not torch.equal(ablated, model(input_ids, attention_mask=attention_mask).logits)
        for state in states[:-2]:
            resumed = model(depth_state=state, attention_mask=attention_mask, intervention=intervention)
            assert torch.equal(resumed.logits, ablated)


@BOTH
def test_a_state_is_immutable(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode, **SHORT_LAST_BLOCK)
    seen: list[tuple[Tensor, Tensor]] = []

    def remember(read: Read) -> Read:
        seen.extend((source, source.clone()) for source in read.sources)
        return read

    with torch.no_grad():
        states = model.model(make_tokens(model), output_depth_states=True, intervention=remember).depth_states
        copies = copy.deepcopy(states)
        for state in states:
            model.model(depth_state=state)
    assert all(torch.equal(source, as_seen) for source, as_seen in seen)
    assert all(map(same_state, states, copies))
    with pytest.raises(AttributeError):
        states[0].current = None
    assert all(isinstance(value, tuple) for value in (states[0].completed, *states[0].completed_logits))


@BOTH
def test_no_state_outlives_a_call(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    alive: list[weakref.ref] = []

    def intervention(read: Read) -> Read:
        alive.extend(map(weakref.ref, (read.routing_weights, *read.sources)))
        return read._replace(sources=tuple(1 - source for source in read.sources))

    with torch.no_grad():
        first = model(input_ids, output_routing_weights=True)
        assert not torch.equal(model(input_ids, intervention=intervention).logits, first.logits)
        second = model(input_ids, output_routing_weights=True)
    assert torch.equal(second.logits, first.logits)
    assert all(map(torch.equal, second.routing_weights, first.routing_weights))
    gc.collect()
    assert alive
    assert not any(ref() is not None for ref in alive)
