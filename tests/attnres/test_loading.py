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
from tests.conftest import BOTH, MODES, SOURCES, small_config, with_bias
from tests.support import oracle
from tests.support.paths import FIXTURES

PUBLISHED = pytest.mark.parametrize("folder", [FIXTURES / "open_attnres" / f"cumulative_{mode}" for mode in MODES])


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
    monkeypatch.setattr(logger, "level", logging.WARNING)  # whatever others have set for its parents
    logger.manager._clear_cache()
    return messages


@PUBLISHED
@pytest.mark.parametrize("auto_class", [AttnResForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_published_checkpoint_gives_the_reference_logits(folder, auto_class, dtype):
    model = auto_class.from_pretrained(folder, dtype=dtype)
    reference = load_file(folder / "reference.safetensors")
    assert type(model) is AttnResForCausalLM
    assert (model(reference["input_ids"]).logits - reference["logits"]).abs().max() <= 1e-5


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
@pytest.mark.parametrize(("num_layers", "num_blocks"), [(7, 3), (4, 1)])
@torch.no_grad()
def test_published_format_with_uneven_blocks(make_model, make_tokens, tmp_path, mode, num_layers, num_blocks):
    shape = {"num_hidden_layers": num_layers, "attnres_num_blocks": num_blocks, "attnres_mode": mode}
    model = make_model(tie_word_embeddings=True, **shape)
    model.save_pretrained(tmp_path)
    # As others publish them: none of our own fields, their name of the class, and early keys of no use after training.
    others = {"architectures": ["Qwen3AttnResForCausalLM"], "attnres_init_bias": 3.0, "attnres_gate_init": 0.5}
    edit_config(tmp_path, attnres_source=..., attnres_routing=..., dtype="float32", **others)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = make_tokens(model)
    assert (loaded(input_ids).logits - oracle.forward(model, input_ids)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("source", SOURCES)
def test_initial_values_survive_a_checkpoint(make_model, tmp_path, source):
    make_model(randomize=False, **with_bias(source, 3)).save_pretrained(tmp_path)
    check_initial_routing(AttnResForCausalLM.from_pretrained(tmp_path))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_save_and_load_round_trip(make_model, make_tokens, tmp_path, source, mode, dtype):
    made = make_model(attnres_source=source, attnres_mode=mode)
    made.save_pretrained(tmp_path / "made")
    # `.to(dtype)` would also round the rotary frequencies, which are no parameters; loading in a dtype does not.
    model = AttnResForCausalLM.from_pretrained(tmp_path / "made", dtype=dtype)
    assert all(torch.equal(tensor, made.state_dict()[name].to(dtype)) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(loaded) is AttnResForCausalLM
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    a, b = (each(make_tokens(model), output_routing_weights=True) for each in (loaded, model))
    assert a.logits.dtype == dtype
    assert torch.equal(a.logits, b.logits)
    assert all(map(torch.equal, a.routing_weights, b.routing_weights))


def test_shards_and_a_head_that_is_stored_though_it_is_tied(make_model, make_tokens, tmp_path):
    model = make_model(tie_word_embeddings=True)
    input_ids = make_tokens(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "head")
    head = model.lm_head.weight.detach().clone()
    edit_weights(tmp_path / "head", lambda weights: {**weights, "lm_head.weight": head})
    for folder in ("shards", "head"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
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


def refuse(folder: Path, message: str, **options) -> str:
    """By our class and by the Auto class alike; returns what is said."""
    for auto_class in (AttnResForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message) as error:
            auto_class.from_pretrained(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "lacking",
    ["layers.2.mlp_res_bias", "attn_res_proj", "_res_norm", "final_res", "layers.1.self_attn", "embed_tokens"],
)
def test_a_missing_tensor_is_an_error_that_lists_it(make_model, tmp_path, logged, lacking):
    make_model(attnres_source="block_sum").save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if lacking in name}
    edit_weights(tmp_path, lambda weights: {name: value for name, value in weights.items() if name not in names})
    said = refuse(tmp_path, f"^{tmp_path}: {len(names)} missing tensor")
    assert names
    assert all(name in said for name in names)
    assert logged == []  # such as that they were "newly initialized"


def test_a_tensor_of_another_shape_is_an_error_that_lists_it(make_model, tmp_path, logged):
    model = make_model()
    model.save_pretrained(tmp_path)
    name, other = "model.layers.1.mlp_res_bias", "model.norm.weight"
    edit_weights(tmp_path, lambda weights: {**weights, name: torch.zeros(1), other: torch.zeros(8)})
    refuse(tmp_path, rf"2 misshapen tensors: {name} \[1\] for \[\], {other} \[8\] for \[16\]$")
    assert logged == []
    loaded = AttnResForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert len(logged) == 1  # then it is said, as in transformers
    assert loaded.model.layers[1].mlp_res_bias == 0
    assert torch.equal(loaded.model.norm.weight, torch.ones(16))
    assert torch.equal(loaded.model.layers[0].attn_res_proj.weight, model.model.layers[0].attn_res_proj.weight)


def test_an_unexpected_tensor_is_an_error_that_lists_it(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    extra = {"model.layers.0.attn_res_gate.weight": torch.ones(16), "model.layers.9.mlp_res_bias": torch.ones(())}
    edit_weights(tmp_path, lambda weights: weights | extra)
    refuse(tmp_path, f"2 unexpected tensors: {', '.join(extra)}$")


def test_a_line_of_very_many_names_is_cut(make_vanilla, tmp_path):
    make_vanilla(num_hidden_layers=6).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"36 missing tensors.* and 12 more.*attnres\.wrap_qwen3") as error:
        AttnResForCausalLM.from_pretrained(tmp_path, config=small_config(num_hidden_layers=6))
    assert str(error.value).count("_res_") == 24


def test_a_final_read_without_a_source_is_refused(make_model, tmp_path):
    make_model(attnres_source="block_sum").save_pretrained(tmp_path)
    edit_config(tmp_path, attnres_source=..., attnres_num_blocks=2)
    refuse(tmp_path, r"model\.final_res_norm\.weight, model\.final_res_proj.*'block_sum'")


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("attnres_mode", "blocks", "block, full"),
        ("attnres_gate_type", None, "bias"),
        ("attnres_source", "delta", "cumulative, block_sum, delta_block"),
    ],
)
def test_an_unsupported_variant_is_refused_by_name(tmp_path, key, value, supported):
    folder = shutil.copytree(FIXTURES / "open_attnres" / "cumulative_block", tmp_path / "copy")
    edit_config(folder, **{key: value})
    refuse(folder, f"^{key} '{value}' is not supported; choose from {supported}$")


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
