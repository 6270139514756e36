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
def test_forward_hooks_and_nnsight_see_the_routing_weights(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    expected = reads(model, input_ids)
    traced, seen = nnsight.NNsight(model), []
    with traced.trace(input_ids, output_routing_weights=True):
        attention = nnsight.save(traced.model.layers[LAYER].output[1][0])
        mlp = nnsight.save(traced.model.layers[LAYER + 1].output.routing_weights[1])
        output = nnsight.save(traced.output)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.extend(output[1]))
    assert torch.equal(output.logits, model(input_ids).logits)
    assert torch.equal(attention, expected[LAYER, "self_attn"])
    assert torch.equal(mlp, expected[LAYER + 1, "mlp"])
    assert all(map(torch.equal, output.routing_weights, expected.values()))
    assert len(seen) == 2 * model.config.num_hidden_layers
    assert all(map(torch.equal, seen, expected.values()))


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
    changes = {"mlp": halve_the_output, "self_attn.o_proj": halve_the_output, "": halve_the_stream}
    if (source, mode) == ("block_sum", "full"):
        del changes[""]  # it has no running stream
    for name, change in changes.items():
        with traced.trace(input_ids):
            layer = traced.model.layers[LAYER - 1]
            envoy = layer.get(name) if name else layer
            envoy.output = change(None, None, envoy.output)
            logits = nnsight.save(traced.output.logits)
        module = model.model.layers[LAYER - 1].get_submodule(name)
        assert torch.equal(logits, logits_with_hook(model, input_ids, module, change)), name
        assert (logits - clean).abs().max() > 1e-3, name
    assert torch.equal(model(input_ids).logits, clean)


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
