"""The model around the reads: names, initial values, frozen routing, arguments."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM, AttnResModel, read_sites
from tests.conftest import BOTH, SOURCES, small_config, with_bias


@pytest.mark.parametrize("source", SOURCES)
def test_names_in_the_state_dict(make_model, source):
    model = make_model(num_hidden_layers=3, attnres_num_blocks=2, attnres_source=source)
    hidden = model.config.hidden_size
    expected = {
        f"model.layers.{i}.{sublayer}_res_{name}": shape
        for i in range(3)
        for sublayer in ("attn", "mlp")
        for name, shape in (("proj.weight", (1, hidden)), ("norm.weight", (hidden,)), ("bias", ()))
        if name != "bias" or source != "delta_block"
    }
    if source == "block_sum":
        expected |= {"model.final_res_proj.weight": (1, hidden), "model.final_res_norm.weight": (hidden,)}
    state_dict = model.state_dict()
    assert {name: tuple(state_dict[name].shape) for name in state_dict if "_res_" in name} == expected
    assert model.routing_parameters().keys() == expected.keys()


def check_initial_routing(model: AttnResForCausalLM | AttnResModel) -> None:
    routing = model.routing_parameters()
    assert len(routing) >= (4 if model.config.is_additive else 6) * model.config.num_hidden_layers
    for name, parameter in routing.items():
        value = 0.0 if "_proj" in name else 1.0 if "_norm" in name else model.config.attnres_recency_bias_init
        assert torch.equal(parameter, torch.full_like(parameter, value)), name


@BOTH
@pytest.mark.parametrize("bias", [0.0, 3, -1.5])
def test_initial_values(source, mode, bias):
    config = small_config(attnres_mode=mode, **with_bias(source, bias))
    for model in (AttnResForCausalLM(config), AttnResModel(config), AutoModelForCausalLM.from_config(config)):
        check_initial_routing(model)
    weights = model.model.layers[0].mlp.up_proj.weight
    assert 0.8 < weights.std() / config.initializer_range < 1.2
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))


@BOTH
def test_no_parameter_is_left_as_uninitialised_memory(source, mode):
    config = small_config(attnres_mode=mode, attention_bias=True, **with_bias(source, 2))
    with torch.device("meta"):
        model = AttnResForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    check_initial_routing(model)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("routing", ["learned", "frozen"])
def test_frozen_routing_takes_no_gradient(make_model, make_tokens, tmp_path, source, routing):
    made = make_model(attnres_source=source, attnres_routing=routing)
    made.save_pretrained(tmp_path)
    models = {
        "constructed": made,
        "from_config": AutoModelForCausalLM.from_config(made.config),
        "loaded": AttnResForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[0],
    }
    for how, model in models.items():
        names = model.routing_parameters().keys()
        learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learns.isdisjoint(names) if routing == "frozen" else learns.issuperset(names), how
        assert learns >= dict(model.named_parameters()).keys() - names, how
        input_ids = make_tokens(model)
        model(input_ids, labels=input_ids).loss.backward()
        assert any(p.grad is not None for p in model.routing_parameters().values()) == (routing == "learned"), how


@BOTH
@torch.no_grad()
def test_routing_weights_of_every_read_on_request(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    plain = model(input_ids)
    routed, body = (each(input_ids, output_routing_weights=True) for each in (model, model.model))
    assert plain.routing_weights is None
    assert torch.equal(routed.logits, plain.logits)
    assert all(map(torch.equal, routed.routing_weights, body.routing_weights))
    assert model.sites == model.model.sites == read_sites(model.config)
    assert [weights.shape[-1] for weights in routed.routing_weights] == [site.num_sources for site in model.sites]


def test_exactly_one_input(make_model, make_tokens):
    model = make_model()
    input_ids = make_tokens(model)
    embeddings = model.get_input_embeddings()(input_ids)
    state = model.model(input_ids, output_depth_states=True).depth_states[1]
    inputs = {"input_ids": input_ids, "inputs_embeds": embeddings, "depth_state": state}
    for names in ([], ["input_ids", "inputs_embeds"], ["input_ids", "depth_state"], list(inputs)):
        for module in (model, model.model):
            with pytest.raises(ValueError, match="exactly one of input_ids, inputs_embeds or depth_state"):
                module(**{name: inputs[name] for name in names})


def test_misspelt_arguments_are_refused(make_model, make_tokens):
    model = make_model()
    with pytest.raises(TypeError, match="interventon"):
        model(make_tokens(model), interventon=lambda read: read)
