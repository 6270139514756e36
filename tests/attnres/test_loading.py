"""Checkpoints: published ones and our own load as they are; whatever is not that is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel
from tests.attnres.test_modeling import check_initial_routing
from tests.conftest import BOTH, MODES, SOURCES, small_config
from tests.support import oracle
from tests.support.paths import FIXTURES

PUBLISHED = pytest.mark.parametrize("folder", [FIXTURES / "open_attnres" / f"cumulative_{mode}" for mode in MODES])
EVERYONE = pytest.mark.parametrize("auto_class", [AttnResForCausalLM, AutoModelForCausalLM])


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def edit_config(folder: Path, **fields) -> None:
    """Set fields of config.json; those set to `...` are taken out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    """What transformers says of the tensors it loads."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "handlers", [handler])
    return messages


@PUBLISHED
@EVERYONE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_checkpoint_gives_the_reference_logits(folder, auto_class, dtype):
    model = auto_class.from_pretrained(folder, dtype=dtype)
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_layers", "num_blocks"), [(7, 3), (5, 4), (3, 3), (4, 1)])
def test_published_format_with_uneven_blocks(make_model, make_tokens, tmp_path, mode, num_layers, num_blocks):
    shape = {"num_hidden_layers": num_layers, "attnres_num_blocks": num_blocks, "attnres_mode": mode}
    model = make_model(tie_word_embeddings=True, **shape)
    model.save_pretrained(tmp_path)
    # As others publish them: none of our own fields, their name of the class.
    edit_config(
        tmp_path, attnres_source=..., attnres_routing=..., architectures=["Qwen3AttnResForCausalLM"], dtype="float32"
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = make_tokens(model)
    with torch.no_grad():
        expected, _ = oracle.forward(model, input_ids)
        assert (loaded(input_ids).logits - expected).abs().max() <= 1e-5


def test_keys_of_early_published_configurations_are_known(make_model, make_tokens, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, attnres_init_bias=3.0, attnres_gate_init=0.5)  # of before training; the tensors hold the rest
    input_ids = make_tokens(model)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("source", SOURCES)
def test_initial_values_survive_a_checkpoint(make_model, tmp_path, source):
    make_model(randomize=False, attnres_source=source, attnres_recency_bias_init=3).save_pretrained(tmp_path)
    check_initial_routing(AttnResForCausalLM.from_pretrained(tmp_path))


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


@pytest.mark.parametrize("tied", [False, True])
def test_shards(make_model, make_tokens, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = make_tokens(model)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_a_head_that_is_stored_though_it_is_tied(make_model, make_tokens, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    loaded = AttnResForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    input_ids = make_tokens(model)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_body_of_a_checkpoint_with_a_head(make_model, make_tokens, tmp_path, source, tied):
    model = make_model(attnres_source=source, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    input_ids = make_tokens(model)
    for auto_class in (AttnResModel, AutoModel):
        body = auto_class.from_pretrained(tmp_path / "whole")
        assert type(body) is AttnResModel
        assert torch.equal(model.lm_head(body(input_ids).last_hidden_state), model(input_ids).logits)
    body.save_pretrained(tmp_path / "body")
    if tied:
        whole = AttnResForCausalLM.from_pretrained(tmp_path / "body")
        assert torch.equal(whole(input_ids).logits, model(input_ids).logits)
    else:
        with pytest.raises(ValueError, match=r"1 missing tensor: lm_head\.weight$"):
            AttnResForCausalLM.from_pretrained(tmp_path / "body")


@EVERYONE
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "lacking",
    ["layers.2.mlp_res_bias", "attn_res_proj", "_res_norm", "model.norm", "layers.1.self_attn", "embed_tokens"],
)
def test_a_missing_tensor_is_an_error_that_lists_it(make_model, tmp_path, logged, auto_class, source, lacking):
    make_model(attnres_source=source).save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if lacking in name}
    edit_weights(tmp_path, lambda weights: {name: value for name, value in weights.items() if name not in names})
    with pytest.raises(ValueError, match=f"{len(names)} missing tensor") as error:
        auto_class.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)
    assert logged == []  # such as that they were "newly initialized"


@EVERYONE
def test_a_tensor_of_another_shape_is_an_error_that_lists_it(make_model, tmp_path, logged, auto_class):
    model = make_model()
    model.save_pretrained(tmp_path)
    name, other = "model.layers.1.mlp_res_bias", "model.norm.weight"
    edit_weights(tmp_path, lambda weights: {**weights, name: torch.zeros(1), other: torch.zeros(8)})
    message = rf"2 misshapen tensors: {name} \[1\] for \[\], {other} \[8\] for \[16\]$"
    with pytest.raises(ValueError, match=message):
        auto_class.from_pretrained(tmp_path)
    assert logged == []
    loaded = auto_class.from_pretrained(tmp_path, ignore_mismatched_sizes=True)  # then it is said, as in transformers
    assert len(logged) == 1
    assert loaded.model.layers[1].mlp_res_bias == 0
    assert torch.equal(loaded.model.norm.weight, torch.ones(16))
    assert torch.equal(loaded.model.layers[0].attn_res_proj.weight, model.model.layers[0].attn_res_proj.weight)


@EVERYONE
def test_an_unexpected_tensor_is_an_error_that_lists_it(make_model, tmp_path, auto_class):
    make_model().save_pretrained(tmp_path)
    extra = {"model.layers.0.attn_res_gate.weight": torch.ones(16), "model.layers.9.mlp_res_bias": torch.ones(())}
    edit_weights(tmp_path, lambda weights: weights | extra)
    with pytest.raises(ValueError, match=f"2 unexpected tensors: {', '.join(extra)}$"):
        auto_class.from_pretrained(tmp_path)


def test_a_line_of_very_many_names_is_cut(make_model, make_vanilla, tmp_path):
    config = small_config(num_hidden_layers=6)
    make_vanilla(num_hidden_layers=6).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"36 missing tensors.* and 12 more.*attnres\.wrap_qwen3") as error:
        AttnResForCausalLM.from_pretrained(tmp_path, config=config)
    assert str(error.value).count("_res_") == 24


@EVERYONE
def test_a_final_read_without_a_source_is_refused(make_model, tmp_path, auto_class):
    make_model(attnres_source="block_sum").save_pretrained(tmp_path)
    auto_class.from_pretrained(tmp_path)
    edit_config(tmp_path, attnres_source=...)
    with pytest.raises(ValueError, match=r"model\.final_res_norm\.weight, model\.final_res_proj.*'block_sum'"):
        auto_class.from_pretrained(tmp_path)


@EVERYONE
@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("attnres_mode", "delta", "block, full"),
        ("attnres_mode", "delta_block", "block, full"),
        ("attnres_gate_type", "sigmoid_scalar", "bias"),
        ("attnres_gate_type", None, "bias"),
        ("attnres_source", "delta", "cumulative, block_sum"),
    ],
)
def test_an_unsupported_variant_is_refused_by_name(tmp_path, auto_class, key, value, supported):
    folder = shutil.copytree(FIXTURES / "open_attnres" / "cumulative_block", tmp_path / "copy")
    edit_config(folder, **{key: value})
    with pytest.raises(ValueError, match=f"{key} '{value}' is not supported; choose from {supported}$"):
        auto_class.from_pretrained(folder)


def test_a_vanilla_checkpoint_is_referred_to_the_wrapper(make_vanilla, tmp_path):
    make_vanilla().save_pretrained(tmp_path)
    for load in (AttnResForCausalLM.from_pretrained, AttnResModel.from_pretrained, AttnResConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"is a 'qwen3' model, not 'qwen3_attnres'.*attnres\.wrap_qwen3"):
            load(tmp_path)


@pytest.mark.parametrize("load", [AttnResConfig.from_pretrained, AutoConfig.from_pretrained])
def test_fields_given_beside_a_checkpoint_are_checked_too(tmp_path, load):
    small_config().save_pretrained(tmp_path)
    assert load(tmp_path, attnres_num_blocks=4).attnres_num_blocks == 4
    for fields, message in (
        ({"attnres_num_blocks": 5}, "attnres_num_blocks .5. exceeds"),
        ({"attnres_mode": "delta"}, "attnres_mode 'delta' is not supported"),
        ({"attnres_blocks": 2}, "attnres_blocks is not a field"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **fields)


def test_a_model_is_neither_built_nor_saved_with_fields_set_wrong_later(make_model, tmp_path):
    model = make_model()
    model.config.attnres_gate_type = "sigmoid"
    with pytest.raises(ValueError, match="attnres_gate_type 'sigmoid' is not supported"):
        model.save_pretrained(tmp_path)
    config = small_config()
    config.attnres_num_blocks = 9
    with pytest.raises(ValueError, match=r"attnres_num_blocks .9. exceeds num_hidden_layers .4."):
        AttnResForCausalLM(config)


def test_frozen_routing_comes_back_frozen_with_loading_info(make_model, tmp_path):
    make_model(attnres_routing="frozen").save_pretrained(tmp_path)
    model, _ = AttnResForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(parameter.requires_grad for parameter in model.routing_parameters().values())
