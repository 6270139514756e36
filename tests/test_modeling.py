"""The model around the reads: published checkpoints, initial values, loading, checkpointing, generation, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM, AttnResModel, Read
from tests.conftest import FIXTURES, MODES, SOURCES, small_config

BOTH = pytest.mark.parametrize(("source", "mode"), [(source, mode) for source in SOURCES for mode in MODES])
PUBLISHED = pytest.mark.parametrize("folder", [FIXTURES / "open_attnres" / f"cumulative_{mode}" for mode in MODES])


@PUBLISHED
@pytest.mark.parametrize("auto_class", [AttnResForCausalLM, AutoModelForCausalLM])
def test_published_checkpoint_gives_the_reference_logits(folder, auto_class):
    model = auto_class.from_pretrained(folder)
    reference = load_file(folder / "reference.safetensors")
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    assert type(model) is AttnResForCausalLM
    assert (logits - reference["logits"]).abs().max() <= 1e-5


@PUBLISHED
def test_published_checkpoint_is_loaded_name_by_name(folder):
    model, info = AttnResForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    published = load_file(folder / "model.safetensors")
    ours = dict(model.state_dict())
    assert ours.pop("lm_head.weight").data_ptr() == ours["model.embed_tokens.weight"].data_ptr()  # tied, not stored
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], published[name]) for name in published)
    biases = [published[name] for name in published if name.endswith("_res_bias")]
    assert len(biases) == 12
    assert all(biases)  # the configuration's initial value is 0: none of these has been overwritten by it


@pytest.mark.parametrize("source", SOURCES)
def test_names_in_the_state_dict(make_model, source):
    model = make_model(num_hidden_layers=3, attnres_num_blocks=2, attnres_source=source)
    hidden = model.config.hidden_size
    expected = {
        f"model.layers.{i}.{sublayer}_res_{name}": shape
        for i in range(3)
        for sublayer in ("attn", "mlp")
        for name, shape in (("proj.weight", (1, hidden)), ("norm.weight", (hidden,)), ("bias", ()))
    }
    if source == "block_sum":
        expected |= {"model.final_res_proj.weight": (1, hidden), "model.final_res_norm.weight": (hidden,)}
    state_dict = model.state_dict()
    assert {name: tuple(state_dict[name].shape) for name in state_dict if "_res_" in name} == expected
    assert model.routing_parameters().keys() == expected.keys()


def check_initial_routing(model: AttnResForCausalLM | AttnResModel) -> None:
    routing = model.routing_parameters()
    assert len(routing) >= 6 * model.config.num_hidden_layers
    for name, parameter in routing.items():
        value = 0.0 if "_proj" in name else 1.0 if "_norm" in name else model.config.attnres_recency_bias_init
        assert torch.equal(parameter, torch.full_like(parameter, value)), name


@BOTH
@pytest.mark.parametrize("bias", [0.0, 3, -1.5])
def test_initial_values(source, mode, bias):
    config = small_config(attnres_source=source, attnres_mode=mode, attnres_recency_bias_init=bias)
    for model in (AttnResForCausalLM(config), AttnResModel(config), AutoModelForCausalLM.from_config(config)):
        check_initial_routing(model)
    weights = model.model.layers[0].mlp.up_proj.weight
    assert 0.8 < weights.std() / config.initializer_range < 1.2
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))


@pytest.mark.parametrize("source", SOURCES)
def test_initial_values_survive_a_checkpoint(make_model, tmp_path, source):
    make_model(randomize=False, attnres_source=source, attnres_recency_bias_init=3).save_pretrained(tmp_path)
    check_initial_routing(AttnResForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("lacking", ["_res_", "_res_proj", "_res_norm", "_res_bias", "attn_res_bias"])
def test_routing_that_a_checkpoint_lacks_gets_its_initial_value(make_model, tmp_path, source, lacking):
    model = make_model(attnres_source=source, attnres_recency_bias_init=2)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if lacking not in k}, path, metadata={"format": "pt"})
    loaded, info = AttnResForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    lacks = {name for name in weights if lacking in name}
    assert set(info["missing_keys"]) == lacks
    for name, value in loaded.state_dict().items():
        initial = 0.0 if "_proj" in name else 1.0 if "_norm" in name else 2.0
        expected = torch.full_like(value, initial) if name in lacks else model.state_dict()[name]
        assert torch.equal(value, expected), name


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_round_trip(make_model, make_tokens, tmp_path, source, mode, dtype):
    made = make_model(attnres_source=source, attnres_mode=mode)
    made.save_pretrained(tmp_path / "made")
    # `.to(dtype)` would also round the rotary frequencies, which are no parameters; loading in a dtype does not.
    model = AttnResForCausalLM.from_pretrained(tmp_path / "made", dtype=dtype)
    assert all(torch.equal(tensor, made.state_dict()[name].to(dtype)) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    input_ids = make_tokens(model)
    for auto_class in (AttnResForCausalLM, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path / "again")
        assert type(loaded) is AttnResForCausalLM
        assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        with torch.no_grad():
            a = loaded(input_ids, output_routing_weights=True)
            b = model(input_ids, output_routing_weights=True)
        assert a.logits.dtype == dtype
        assert torch.equal(a.logits, b.logits)
        assert all(map(torch.equal, a.routing_weights, b.routing_weights))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("routing", ["learned", "frozen"])
def test_frozen_routing_takes_no_gradient(make_model, make_tokens, tmp_path, source, routing):
    made = make_model(attnres_source=source, attnres_routing=routing)
    made.save_pretrained(tmp_path)
    models = {
        "constructed": made,
        "from_config": AutoModelForCausalLM.from_config(made.config),
        "loaded": AttnResForCausalLM.from_pretrained(tmp_path),
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
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_tokens, source, mode):
    shape = {"num_hidden_layers": 5, "attnres_num_blocks": 2, "use_cache": False}
    model = make_model(attnres_source=source, attnres_mode=mode, **shape).train()
    input_ids = make_tokens(model)
    reads: list[int] = []

    def count(read: Read) -> Read:
        reads.append(read.site.index)
        return read

    def run() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        reads.clear()
        model(input_ids, labels=input_ids, intervention=count).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, num_plain = run(), len(reads)
    model.activation_checkpointing_enable()
    checkpointed, num_checkpointed = run(), len(reads)
    assert num_checkpointed == num_plain + 2 * 5  # each read of a layer happened once more
    for name, grad in plain.items():
        assert (grad is None) == (checkpointed[name] is None), name
        if grad is not None:
            torch.testing.assert_close(checkpointed[name], grad, rtol=0, atol=1e-7, msg=name)


@BOTH
def test_routing_weights_only_on_request(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    with torch.no_grad():
        plain = model(input_ids)
        routed = model(input_ids, output_routing_weights=True)
        body = model.model(input_ids, output_routing_weights=True)
    assert plain.routing_weights is None
    assert torch.equal(routed.logits, plain.logits)
    assert len(routed.routing_weights) == 2 * model.config.num_hidden_layers + (source == "block_sum")
    assert all(map(torch.equal, routed.routing_weights, body.routing_weights))


def test_loss_is_the_shifted_cross_entropy(make_model, make_tokens):
    model = make_model()
    input_ids = make_tokens(model)
    labels = input_ids.masked_fill(input_ids < 10, -100)
    outputs = model(input_ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def test_logits_to_keep(make_model, make_tokens):
    model = make_model()
    input_ids = make_tokens(model)
    with torch.no_grad():
        full = model(input_ids).logits
        torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, full[:, -2:])
        positions = torch.tensor([4, 1])
        torch.testing.assert_close(model(input_ids, logits_to_keep=positions).logits, full[:, positions])


@BOTH
def test_later_tokens_and_padding_are_not_seen(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model, batch=2, seq=9)
    changed = input_ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % model.config.vocab_size
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, :3] = 0
    with torch.no_grad():
        logits = model(input_ids).logits
        torch.testing.assert_close(model(changed).logits[:, :5], logits[:, :5], atol=1e-6, rtol=0)
        assert not torch.allclose(model(changed).logits[:, 5:], logits[:, 5:])
        padded = model(input_ids, attention_mask=attention_mask, position_ids=attention_mask.cumsum(-1) - 1).logits
        torch.testing.assert_close(padded[:, 3:], model(input_ids[:, 3:]).logits, atol=1e-5, rtol=0)


@BOTH
def test_embeddings_can_be_given_in_place_of_tokens(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    with torch.no_grad():
        by_embedding = model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits
        assert torch.equal(by_embedding, model(input_ids).logits)


@BOTH
def test_cached_greedy_generation_equals_uncached(make_model, make_tokens, source, mode):
    model = make_model(num_hidden_layers=5, attnres_num_blocks=2, attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model, batch=3, seq=6)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :2] = 0  # left padding, as in a batch of prompts of several lengths
    options = {"attention_mask": attention_mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids, use_cache=False, **options))
    assert cached.shape == (3, 18)
    assert cached[:, 6:].unique().numel() > 3  # not one token over and over, where a broken cache would not show


@BOTH
def test_cached_steps_give_the_logits_and_routing_of_one_pass(make_model, make_tokens, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model, seq=8)
    with torch.no_grad():
        full = model(input_ids, output_routing_weights=True)
        head = model(input_ids[:, :5], use_cache=True)
        tail = model(
            input_ids[:, 5:], past_key_values=head.past_key_values, use_cache=True, output_routing_weights=True
        )
    torch.testing.assert_close(tail.logits, full.logits[:, 5:], atol=1e-5, rtol=0)
    for cached, whole in zip(tail.routing_weights, full.routing_weights, strict=True):
        torch.testing.assert_close(cached, whole[:, 5:], atol=1e-5, rtol=0)


def test_attention_implementations_agree(make_model, make_tokens):
    model = make_model()
    input_ids = make_tokens(model)
    logits = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(input_ids).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=0)


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
    tokens = make_tokens(model)
    with pytest.raises(TypeError, match="interventon"):
        model(tokens, interventon=lambda read: read)
    with pytest.raises(ValueError, match="output_hidden_states is not supported"):
        model(tokens, output_hidden_states=True)
