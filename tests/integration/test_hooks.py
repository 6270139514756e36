"""Reading and changing a model from outside: forward hooks, and nnsight, which is made of them."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import BOTH, SOURCES

nnsight = pytest.importorskip("nnsight")

LAYER = 1


def halve_the_output(module, args, output):
    return 0.5 * output


def halve_the_stream(module, args, output):
    state = output.states[-1]
    return output._replace(states=(*output.states[:-1], state._replace(current=0.5 * state.current)))


def reads(model, input_ids) -> dict[tuple[int | None, str], torch.Tensor]:
    """Routing weights by layer and sublayer, as an intervention that changes nothing sees them."""
    seen = {}

    def watch(read):
        seen[read.site.layer_idx, read.site.sublayer] = read.routing_weights
        return read

    routing_weights = model(input_ids, output_routing_weights=True, intervention=watch).routing_weights
    assert all(map(torch.equal, seen.values(), routing_weights))
    return seen


@BOTH
@torch.no_grad()
def test_a_forward_hook_sees_the_routing_weights(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    expected = reads(model, input_ids)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model(input_ids)
    assert len(seen) == model.config.num_hidden_layers
    for i, (attention, mlp) in enumerate(seen):
        assert torch.equal(attention, expected[i, "self_attn"])
        assert torch.equal(mlp, expected[i, "mlp"])


@BOTH
@torch.no_grad()
def test_nnsight_sees_the_routing_weights(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    expected = reads(model, input_ids)
    traced = nnsight.NNsight(model)
    with traced.trace(input_ids):
        attention = nnsight.save(traced.model.layers[LAYER].output[1][0])
        mlp = nnsight.save(traced.model.layers[LAYER + 1].output.routing_weights[1])
        logits = nnsight.save(traced.output.logits)
    with traced.trace(input_ids, output_routing_weights=True):
        routing_weights = nnsight.save(traced.output.routing_weights)
    assert torch.equal(attention, expected[LAYER, "self_attn"])
    assert torch.equal(mlp, expected[LAYER + 1, "mlp"])
    assert torch.equal(logits, model(input_ids).logits)
    for weights, other in zip(routing_weights, expected.values(), strict=True):
        assert torch.equal(weights, other)


def logits_with_hook(model, input_ids, module, hook) -> torch.Tensor:
    handle = module.register_forward_hook(hook)
    try:
        return model(input_ids).logits
    finally:
        handle.remove()


@BOTH
@torch.no_grad()
def test_nnsight_changes_what_a_hook_changes(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    clean = model(input_ids).logits
    traced = nnsight.NNsight(model)
    layer = model.model.layers[LAYER]
    for module, name in ((layer.mlp, "mlp"), (layer.self_attn.o_proj, "self_attn.o_proj")):
        with traced.trace(input_ids):
            envoy = traced.model.layers[LAYER].get(name)
            envoy.output = 0.5 * envoy.output
            logits = nnsight.save(traced.output.logits)
        assert torch.equal(logits, logits_with_hook(model, input_ids, module, halve_the_output)), name
        assert (logits - clean).abs().max() > 1e-3, name
    assert torch.equal(model(input_ids).logits, clean)


@torch.no_grad()
def test_nnsight_changes_the_stream_that_a_layer_hands_on(make_model, make_tokens):
    model = make_model()
    input_ids = make_tokens(model)
    traced = nnsight.NNsight(model)
    with traced.trace(input_ids):
        layer = traced.model.layers[LAYER - 1]
        layer.output = halve_the_stream(None, None, layer.output)
        logits = nnsight.save(traced.output.logits)
    assert torch.equal(logits, logits_with_hook(model, input_ids, model.model.layers[LAYER - 1], halve_the_stream))
    assert (logits - model(input_ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_nnsight_on_prompts_of_several_lengths(make_model, tokenizer, save, source):
    """From a folder and from text: nnsight pads the prompts of one trace on the left."""
    model = make_model(attnres_source=source)
    traced = nnsight.TransformersModel(save(model), task="text-generation", dispatch=True)
    prompts = ["w1 w2 w3 w4 w5", "w6 w7"]
    seen = []
    with traced.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                read = traced.model.layers[LAYER].output.routing_weights[1]
                seen.append(nnsight.save((read, traced.output.logits)))
    for prompt, (weights, logits) in zip(prompts, seen, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = model(**inputs, output_routing_weights=True)
        length = inputs["input_ids"].shape[1]
        torch.testing.assert_close(weights[:, -length:], alone.routing_weights[2 * LAYER + 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[:, -length:], alone.logits, atol=1e-5, rtol=0)
