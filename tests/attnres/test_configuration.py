"""The configuration: what it refuses, how it says so, and that it survives a round trip."""

from __future__ import annotations

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3Config

from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel
from tests.conftest import SMALL_SHAPE, SOURCES, small_config
from tests.support.paths import FIXTURES

CHOICES = {
    "attnres_source": list(SOURCES),
    "attnres_mode": ["block", "full"],
    "attnres_routing": ["learned", "frozen"],
    "attnres_gate_type": ["bias"],
}


def refuse(*parts: str, **fields) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (all of the message is checked)
        small_config(**fields)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("key", CHOICES)
def test_choices(key):
    for value in ("nonsense", "", None, 3):
        refuse(key, repr(value).strip("'"), *CHOICES[key], **{key: value})
    for value in CHOICES[key]:
        assert getattr(small_config(**{key: value}), key) == value


SIZES = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
SIZES += ["head_dim", "vocab_size", "max_position_embeddings", "attnres_num_blocks"]
WRONG = [(key, value, "positive integer") for key in SIZES for value in (0, -2)]
WRONG += [("attnres_num_blocks", value, "positive integer") for value in ("2", 2.5, None, True)]
WRONG += [("rms_norm_eps", value, "positive") for value in (0.0, -1e-6)]
WRONG += [("initializer_range", value, "zero or more") for value in (-0.02, math.inf)]
WRONG += [("attention_dropout", value, "in [0, 1)") for value in (1.0, -0.1)]
WRONG += [("sliding_window", 0, "positive or None"), ("hidden_act", "siluu", "one of ")]
WRONG += [("attnres_recency_bias_init", value, "a finite number") for value in (-math.inf, math.nan, "3", None, True)]


@pytest.mark.parametrize(("key", "value", "right"), WRONG)
def test_value_out_of_range(key, value, right):
    refuse(f"{key} must be ", right, repr(value), **{key: value, "use_sliding_window": True})


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size"])
@pytest.mark.parametrize("value", ["2", "two", 2.5, None])
def test_inherited_size_of_a_wrong_type_is_refused_by_transformers_own_check(key, value):
    with pytest.raises(StrictDataclassError, match=f"Field '{key}' expected int"):
        small_config(**{key: value})


def test_counts_that_do_not_fit():
    refuse("attnres_num_blocks (5)", "num_hidden_layers (4)", attnres_num_blocks=5)
    refuse("num_attention_heads (3)", "num_key_value_heads (2)", num_attention_heads=3, num_key_value_heads=2)


def test_misspelt_field():
    # Qwen3's own configuration keeps fields it does not know; one of ours that is misspelt must not vanish like that.
    refuse("attnres_num_block is not a field", "attnres_num_blocks", attnres_num_block=2)


def test_defaults():
    config = AttnResConfig()
    assert isinstance(config, Qwen3Config)
    assert config.model_type == "qwen3_attnres"
    assert (config.attnres_source, config.attnres_mode, config.attnres_routing) == ("cumulative", "block", "learned")
    assert (config.attnres_gate_type, config.attnres_num_blocks, config.attnres_recency_bias_init) == ("bias", 8, 0.0)


@given(num_layers=st.integers(1, 40), data=st.data(), source=st.sampled_from(SOURCES))
def test_blocks_partition_the_layers(num_layers, data, source):
    num_blocks = data.draw(st.integers(1, num_layers))
    fields = {"num_hidden_layers": num_layers, "attnres_num_blocks": num_blocks, "attnres_source": source}
    config = small_config(**fields)
    ends = [i for i in range(num_layers) if config.closes_block(i, "mlp")]
    sizes = [end - start for start, end in zip([-1, *ends], ends, strict=False)]
    assert sum(sizes) == num_layers
    assert len(sizes) <= num_blocks
    assert set(sizes[:-1]) <= {config.layers_per_block}
    assert 1 <= sizes[-1] <= config.layers_per_block == math.ceil(num_layers / num_blocks)
    assert not any(config.closes_block(i, "self_attn") for i in range(num_layers))
    full = small_config(**(fields | {"attnres_mode": "full", "attnres_num_blocks": 99}))  # blocks play no part in it
    assert all(full.closes_block(i, sublayer) for i in range(num_layers) for sublayer in ("self_attn", "mlp"))


@given(
    choices=st.fixed_dictionaries({key: st.sampled_from(values) for key, values in CHOICES.items()}),
    num_blocks=st.integers(1, 4),
    bias=st.floats(-10, 10) | st.integers(-10, 10),
)
def test_dict_and_json_round_trip(choices, num_blocks, bias):
    bias = 0 if choices["attnres_source"] == "delta_block" else bias  # it has none
    fields = {"attnres_num_blocks": num_blocks, "attnres_recency_bias_init": bias, **choices}
    config = small_config(**fields)
    for again in (AttnResConfig(**config.to_dict()), AttnResConfig.from_dict(json.loads(config.to_json_string()))):
        assert again.to_dict() == config.to_dict()
        assert {key: getattr(again, key) for key in fields} == fields


def test_folder_round_trip(tmp_path):
    config = small_config(attnres_source="block_sum", attnres_routing="frozen", attnres_num_blocks=3)
    config.save_pretrained(tmp_path)
    for again in (AttnResConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is AttnResConfig
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("name", ["cumulative_block", "cumulative_full"])
def test_published_config(name):
    config = AutoConfig.from_pretrained(FIXTURES / "open_attnres" / name)
    assert type(config) is AttnResConfig
    assert config.attnres_mode == name.rpartition("_")[2]
    assert (config.attnres_source, config.attnres_num_blocks, config.layers_per_block) == ("cumulative", 3, 2)


def test_auto_classes_are_registered():
    config = AutoConfig.for_model("qwen3_attnres", **SMALL_SHAPE, attnres_num_blocks=2)
    assert type(config) is AttnResConfig
    assert type(AutoModelForCausalLM.from_config(config)) is AttnResForCausalLM
    assert type(AutoModel.from_config(config)) is AttnResModel
