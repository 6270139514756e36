"""Checkpoints of the codes that share a model type: told apart, read as they are, written back, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel
from attnres.formats import DELTA_MODES, FORMATS, GATES, OTHER_DELTA_MODES
from tests.attnres.test_loading import edit_config, edit_weights, refuse
from tests.conftest import BOTH, small_config
from tests.support import oracle
from tests.support.paths import FIXTURES

DELTA = FIXTURES / "delta"
EACH_MODE = pytest.mark.parametrize("mode", DELTA_MODES)
NAMES = ("delta_sublayer", "delta_centered", "delta_centered_block", "delta_avg_block", "delta_replace_block", "blok")
"""What its training script offers, and its model runs as something else; and one that is misspelt."""


def copied(mode: str, folder: Path) -> Path:
    return Path(shutil.copytree(DELTA / mode, folder / mode))


def held(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@EACH_MODE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_delta_checkpoint_gives_the_reference_logits_and_routing_weights(mode, dtype):
    model, info = AutoModelForCausalLM.from_pretrained(DELTA / mode, dtype=dtype, output_loading_info=True)
    assert type(model) is AttnResForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.attnres_source, model.config.attnres_mode) == DELTA_MODES[mode]
    reference = load_file(DELTA / mode / "reference.safetensors")
    outputs = model(reference["input_ids"], output_routing_weights=True)
    assert (outputs.logits - reference["logits"]).abs().max() <= 1e-5
    expected = [reference[name] for name in sorted(reference) if name.startswith("routing_weights.")]
    for weights, theirs, site in zip(outputs.routing_weights, expected, model.sites, strict=True):
        assert weights.shape == theirs.shape == (2, 16, site.num_sources)
        assert weights.numel() == 0 or (weights - theirs).abs().max() <= 1e-5
    biases = [value for name, value in model.named_parameters() if name.endswith("_res_bias")]
    assert len(biases) == (12 if model.config.attnres_source == "block_sum" else 0)
    assert not any(map(bool, biases))
    naive, _ = oracle.forward(model, reference["input_ids"])
    assert (naive - reference["logits"]).abs().max() <= 1e-5


@EACH_MODE
def test_a_delta_checkpoint_is_written_back_bit_for_bit(tmp_path, mode):
    model = AutoModelForCausalLM.from_pretrained(DELTA / mode)
    model.save_pretrained(tmp_path, format="delta")
    assert (tmp_path / "model.safetensors").read_bytes() == (DELTA / mode / "model.safetensors").read_bytes()
    version = {"transformers_version": held(tmp_path)["transformers_version"]}
    assert held(tmp_path) == held(DELTA / mode) | version
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is AttnResModel
    input_ids = torch.arange(12)[None]
    assert torch.equal(body(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)


@pytest.mark.parametrize("mode", ["block", "full"])
def test_an_open_attnres_checkpoint_is_written_back_bit_for_bit(tmp_path, mode):
    folder = FIXTURES / "open_attnres" / f"cumulative_{mode}"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, format="open_attnres")
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    version = {"transformers_version": held(tmp_path)["transformers_version"]}
    assert held(tmp_path) == held(folder) | version


@BOTH
@pytest.mark.parametrize("format", FORMATS)
def test_a_format_holds_a_model_or_refuses_it(make_model, make_tokens, tmp_path, source, mode, format):
    model = make_model(attnres_source=source, attnres_mode=mode, num_hidden_layers=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_res_bias") and format == "delta":
                parameter.zero_()
    fits = {"attnres": True, "open_attnres": source == "cumulative", "delta": source != "cumulative"}[format]
    if not fits:
        with pytest.raises(ValueError, match=f"format '{format}' cannot hold attnres_source '{source}', only "):
            model.save_pretrained(tmp_path, format=format)
        assert not list(tmp_path.iterdir())
        return
    model.save_pretrained(tmp_path, format=format)
    loaded, input_ids = AutoModelForCausalLM.from_pretrained(tmp_path), make_tokens(model)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    other = {"_name_or_path": "", "architectures": []}  # the other codes' name of the class
    assert loaded.config.to_dict() | other == model.config.to_dict() | other
    assert ("attnres_source" in held(tmp_path)) == (format == "attnres")


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(make_model, tmp_path):
    model = make_model(attnres_source="block_sum")
    with pytest.raises(ValueError, match=r"'delta' has no recency biases, and model\.layers\.0\.attn_res_bias and 7 m"):
        model.save_pretrained(tmp_path, format="delta")
    for name in ("delta", "open_attnres"):
        source = "cumulative" if name == "open_attnres" else "delta_block"
        frozen = make_model(attnres_source=source, attnres_routing="frozen")
        with pytest.raises(ValueError, match=f"'{name}' cannot hold attnres_routing 'frozen': set model.config"):
            frozen.save_pretrained(tmp_path, format=name)
    with pytest.raises(ValueError, match="format 'dleta' does not exist; choose from attnres, open_attnres, delta"):
        model.save_pretrained(tmp_path, format="dleta")
    assert not list(tmp_path.iterdir())


@BOTH
def test_blocks_of_other_sources_than_cumulative_are_no_number_to_other_codes(make_model, tmp_path, source, mode):
    """Both others compute the layers of a block of `attnres_num_blocks`, before they load a tensor."""
    make_model(attnres_source=source, attnres_mode=mode).save_pretrained(tmp_path)
    layers, blocks = held(tmp_path)["num_hidden_layers"], held(tmp_path)["attnres_num_blocks"]
    if source == "cumulative":
        assert (layers + blocks - 1) // blocks == 2
    else:
        assert blocks == f"2 ({source})"
        with pytest.raises(TypeError):
            (layers + blocks - 1) // blocks


@pytest.mark.parametrize("mode", ["block", "full", "delta_block", "delta"])
def test_a_delta_checkpoint_is_read_as_no_other_model(tmp_path, mode):
    folder = copied(mode, tmp_path)
    config = AttnResConfig.from_pretrained(folder)
    others = {"attnres_source": ["cumulative", "block_sum", "delta_block"], "attnres_mode": ["block", "full"]}
    for key, values in others.items():
        for value in values:
            if value == getattr(config, key):
                AttnResForCausalLM.from_pretrained(folder, **{key: value})
            else:
                with pytest.raises(
                    ValueError, match=f"^{key} '{value}' is not what .* attnres_mode '{mode}' was trained"
                ):
                    AttnResForCausalLM.from_pretrained(folder, **{key: value})


def test_the_configuration_of_a_model_that_was_read_is_like_any_other(tmp_path):
    model = AttnResForCausalLM.from_pretrained(copied("block", tmp_path / "delta"))
    model.save_pretrained(tmp_path / "ours")
    again = AttnResForCausalLM.from_pretrained(tmp_path / "ours", config=model.config)
    assert AttnResConfig.from_pretrained(tmp_path / "ours").to_json_string() == again.config.to_json_string()


@pytest.mark.parametrize("source", ["cumulative", "block_sum"])
def test_old_exports_of_ours_load(make_model, make_tokens, tmp_path, source):
    model = make_model(attnres_source=source)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, attnres_num_blocks=2)  # a plain number, as it was written for every source
    input_ids = make_tokens(model)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("number", ["2", "2 (delta_block)", "2 (block_sum) ", "(block_sum)", "-2 (block_sum)", "x"])
def test_a_number_of_blocks_that_contradicts_the_sources_is_refused(make_model, tmp_path, number):
    make_model(attnres_source="block_sum").save_pretrained(tmp_path)
    edit_config(tmp_path, attnres_num_blocks=number)
    refuse(tmp_path, r"attnres_num_blocks must be a number.*in brackets, got '.*' with attnres_source 'block_sum'")


def test_more_blocks_than_layers_are_blocks_of_one_layer(tmp_path):
    """There it is no error, and means the same."""
    folder = copied("delta_block", tmp_path)
    edit_config(folder, attnres_num_blocks=9)
    loaded = AttnResForCausalLM.from_pretrained(folder)
    assert (loaded.config.attnres_num_blocks, loaded.config.layers_per_block) == (6, 1)


@pytest.mark.parametrize("mode", [*OTHER_DELTA_MODES, *NAMES])
def test_a_mode_that_is_not_supported_is_refused_by_its_name(tmp_path, mode):
    folder = copied("block", tmp_path)
    edit_config(folder, attnres_mode=mode)
    refuse(folder, rf"^attnres_mode '{mode}' of Delta Attention.*\(.+\); choose from block, full, delta_block, delta$")


@EACH_MODE
def test_what_is_not_supported_of_a_mode_is_refused_by_its_field(tmp_path, mode):
    folder = copied(mode, tmp_path)
    edit_config(folder, attnres_use_null_source=True)
    refuse(folder, rf"^attnres_use_null_source True of Delta.*attnres_mode '{mode}'.*only false")
    for gate in (*GATES, "none"):
        edit_config(folder, attnres_use_null_source=False, attnres_gate_type=gate)
        refuse(folder, rf"^attnres_gate_type '{gate}' of Delta.*attnres_mode '{mode}'.*must be 'bias'")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attnres_source": "block_sum"}, "field of Delta Attention Residuals, attnres_source one of attnres"),
        ({"attnres_routing": "learned"}, "field of Delta Attention Residuals, attnres_routing one of attnres"),
        ({"attnres_recency_bias_init": 0.0}, r"open-attention-residuals' second file .* not supported"),
        (
            {"attnres_use_null_source": ...},
            r"12 missing tensors: .*_res_bias.*has no recency biases: .* attnres_use_null_source",
        ),
        ({"attnres_blocks": 3}, "attnres_blocks is not a field"),
    ],
)
def test_fields_of_two_codes_are_refused(tmp_path, fields, message):
    folder = copied("block", tmp_path)
    edit_config(folder, **fields)
    refuse(folder, message)


def test_a_mode_of_the_delta_code_without_its_field_is_referred_to_ours(tmp_path):
    folder = copied("delta", tmp_path)
    edit_config(folder, attnres_use_null_source=...)
    refuse(folder, r"attnres_mode 'delta' is not supported.*attnres_source 'delta_block' with attnres_mode 'full'")


def test_a_bias_given_beside_a_delta_checkpoint_is_refused():
    for load in (AttnResConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match="attnres_recency_bias_init must be 0"):
            load(DELTA / "block", attnres_recency_bias_init=1.0)


@EACH_MODE
def test_tensors_that_are_not_the_formats_are_refused(tmp_path, mode):
    layer = "model.layers.2."
    for name, extra, message in (
        ("bias", {f"{layer}attn_res_bias": torch.zeros(())}, "attn_res_bias"),
        ("null", {f"{layer}attn_null_source": torch.zeros(32)}, "1 unexpected tensor: .*attn_null_source"),
        ("value", {f"{layer}v_res_proj.weight": torch.zeros(1, 32)}, r"1 unexpected tensor: .*v_res_proj\.weight"),
        ("gate", {f"{layer}attn_res_gate_logit": torch.zeros(())}, "1 unexpected tensor: .*attn_res_gate_logit"),
    ):
        folder = copied(mode, tmp_path / name)
        edit_weights(folder, lambda weights, extra=extra: weights | extra)
        refuse(folder, message)
    folder = copied(mode, tmp_path / "missing")
    edit_weights(folder, lambda weights: {n: v for n, v in weights.items() if n != f"{layer}mlp_res_norm.weight"})
    refuse(folder, r"1 missing tensor: model\.layers\.2\.mlp_res_norm\.weight$")
    if mode in ("block", "full"):
        folder = copied(mode, tmp_path / "final")
        edit_weights(folder, lambda weights: {n: v for n, v in weights.items() if "final_res" not in n})
        refuse(folder, r"2 missing tensors: model\.final_res_norm\.weight, model\.final_res_proj\.weight")


OTHER_TENSORS = ("attn_res_bias", "mlp_res_bias", "attn_null_source", "attn_res_gate_logit", "v_res_proj.weight")


def meaning(fields: dict[str, Any]) -> tuple[str, str, bool] | None:
    """Source, mode, and whether there are biases, by the documented rules; None where the fields mean nothing."""
    if fields["attnres_gate_type"] != "bias":
        return None
    if "attnres_use_null_source" in fields:
        is_delta = fields["attnres_use_null_source"] is False and fields["attnres_mode"] in [*DELTA_MODES]
        if not is_delta or {"attnres_source", "attnres_recency_bias_init"} & fields.keys():
            return None
        return (*DELTA_MODES[fields["attnres_mode"]], False)
    source, mode = fields.get("attnres_source", "cumulative"), fields["attnres_mode"]
    if mode not in ("block", "full") or (source == "delta_block" and fields.get("attnres_recency_bias_init")):
        return None
    return source, mode, source != "delta_block"


@settings(max_examples=100)
@given(
    tensors=st.sampled_from(list(DELTA_MODES)),
    mode=st.sampled_from([*DELTA_MODES, *DELTA_MODES, *OTHER_DELTA_MODES, *NAMES, None, ["block"], {}, 1]),
    gate=st.sampled_from(["bias"] * 5 + [*GATES, "other", None]),
    null=st.sampled_from([False, False, ..., ..., True, None]),
    bias=st.sampled_from([..., ..., 0.0, 3.0]),
    source=st.sampled_from([..., ..., "cumulative", "block_sum", "delta_block"]),
    added=st.sets(st.sampled_from(OTHER_TENSORS), max_size=1),
    dropped=st.sets(st.sampled_from(["attn_res_proj", "mlp_res_norm", "final_res"]), max_size=1),
    all_biases=st.booleans(),
)
@torch.no_grad()
def test_nothing_is_accepted_silently(
    tmp_path_factory, tensors, mode, gate, null, bias, source, added, dropped, all_biases
):
    """Whatever fields and tensors are put together: what is loaded is what they mean, or all is refused in one line."""
    folder = copied(tensors, tmp_path_factory.mktemp("checkpoint"))
    fields = {"attnres_mode": mode, "attnres_gate_type": gate, "attnres_use_null_source": null}
    fields |= {"attnres_recency_bias_init": bias, "attnres_source": source}
    edit_config(folder, **fields)
    biases = [f"model.layers.{i}.{name}_res_bias" for i in range(6) for name in ("attn", "mlp")]
    extra = {f"model.layers.1.{name}" for name in added} | set(biases if all_biases else ())

    def edit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: value for name, value in weights.items() if not any(part in name for part in dropped)}
        return {name: torch.zeros(()) for name in extra} | kept

    before = load_file(folder / "model.safetensors").keys()
    edit_weights(folder, edit)
    now, found = load_file(folder / "model.safetensors").keys(), meaning(held(folder))
    needed = {name for name in before if "final_res" not in name}
    if found is not None and found[0] == "block_sum":
        needed |= {"model.final_res_norm.weight", "model.final_res_proj.weight"}
    if found is not None and found[2]:
        needed |= set(biases)
    if found is None or needed != now:
        refuse(folder, "attnres_|missing tensor|unexpected tensor")
        return
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.attnres_source, model.config.attnres_mode) == found[:2]
    reference = load_file(folder / "reference.safetensors")
    is_reference = (model(reference["input_ids"]).logits - reference["logits"]).abs().max() <= 1e-5
    assert is_reference == (found[:2] == DELTA_MODES[tensors])


def test_a_configuration_of_additive_routing():
    config = small_config(attnres_source="delta_block")
    assert config.is_additive
    assert not small_config().is_additive
    with pytest.raises(ValueError, match="recency_bias_init must be 0 with attnres_source 'delta_block', got 3"):
        small_config(attnres_source="delta_block", attnres_recency_bias_init=3)
    names = dict(AttnResForCausalLM(config).named_parameters())
    assert not any(name.endswith("_res_bias") or "final_res" in name for name in names)
