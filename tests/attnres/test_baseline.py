"""The wrapped baseline: routing that no input changes and that equals its analytic schedule."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM, read_sites, recency_schedule, wrap_qwen3
from tests.conftest import MODES, SMALL_SHAPE, SOURCES, small_config

# Shape of Qwen3-0.6B in depth; the width plays no part in the schedule.
DEEP = {"num_hidden_layers": 28, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4}
DEEP_CURRENT = [0.953, 0.909, 0.870, 0.834, 0.801, 0.770, 0.742]


def measure(model: AttnResForCausalLM, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(input_ids, output_routing_weights=True).routing_weights


@settings(max_examples=25)
@given(
    num_layers=st.integers(1, 9),
    data=st.data(),
    recency_bias=st.floats(-5, 12),
    batch=st.integers(1, 3),
    seq=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_measured_weights_equal_the_schedule(
    make_vanilla, make_tokens, num_layers, data, recency_bias, batch, seq, seed
):
    num_blocks = data.draw(st.integers(1, num_layers))
    vanilla = make_vanilla(seed=seed, num_hidden_layers=num_layers)
    model = wrap_qwen3(vanilla, num_blocks=num_blocks, recency_bias=recency_bias)
    schedule = recency_schedule(model)
    measured = measure(model, make_tokens(model, batch, seq, seed))
    assert len(schedule) == len(measured) == 2 * num_layers
    size = math.ceil(num_layers / num_blocks)
    for read, (weights, expected) in enumerate(zip(measured, schedule, strict=True)):
        n = 2 + read // 2 // size  # embedding, completed blocks, current
        rest = 1 / (math.exp(recency_bias) + n - 1)
        analytic = torch.tensor([rest] * (n - 1) + [math.exp(recency_bias) * rest], dtype=torch.float64)
        torch.testing.assert_close(expected, analytic, atol=1e-6, rtol=0)  # the model keeps b in float32
        assert weights.shape == (batch, seq, n)
        assert (weights - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("routing", ["learned", "frozen"])
def test_schedule_of_any_model_with_zero_queries(make_model, make_tokens, source, mode, routing):
    model = make_model(
        randomize=False,
        num_hidden_layers=5,
        attnres_num_blocks=2,
        attnres_source=source,
        attnres_mode=mode,
        attnres_routing=routing,
        attnres_recency_bias_init=1.25,
    )
    measured = measure(model, make_tokens(model))
    for schedule in (recency_schedule(model), recency_schedule(model.config)):
        assert len(schedule) == len(measured)
        for weights, expected in zip(measured, schedule, strict=True):
            assert (weights - expected).abs().max() <= 1e-6


def test_schedule_uses_a_models_own_biases(make_model, make_tokens):
    model = make_model(randomize=False)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.routing_parameters().items()):
            if "_bias" in name:
                parameter.fill_(number / 4 - 2)
            elif "_norm" in name:
                parameter.normal_()  # a gain on a zero query changes nothing
    schedule = recency_schedule(model)
    assert not any(map(torch.allclose, schedule, recency_schedule(model.config)))
    for weights, expected in zip(measure(model, make_tokens(model)), schedule, strict=True):
        assert (weights - expected).abs().max() <= 1e-6


def test_study_numbers(make_vanilla, make_tokens):
    model = wrap_qwen3(make_vanilla(**DEEP))  # the defaults are the study's: 8 blocks, b = 3
    measured = measure(model, make_tokens(model, batch=3, seq=11))
    sites = read_sites(model.config)
    for sublayer in ("self_attn", "mlp"):
        reads = [site.index for site in sites if site.sublayer == sublayer]
        current = torch.stack([measured[index][..., -1] for index in reads])  # (28, B, T)
        assert abs(current.mean().item() - 0.8397) <= 1e-4
        blocks = current.unflatten(0, (7, 4))
        expected = torch.tensor(DEEP_CURRENT)[:, None, None, None].expand_as(blocks)
        torch.testing.assert_close(blocks, expected, atol=5e-4, rtol=0)
        schedule = recency_schedule(model)
        assert abs(sum(schedule[index][-1].item() for index in reads) / len(reads) - 0.8397) <= 1e-4


def test_28_layers_in_8_blocks_are_7_blocks():
    config = AttnResConfig(**{**SMALL_SHAPE, **DEEP}, attnres_num_blocks=8, attnres_recency_bias_init=3)
    schedule = recency_schedule(config)
    assert {len(weights) for weights in schedule} == set(range(2, 9))  # embedding, up to 6 completed blocks, current
    torch.testing.assert_close(
        torch.stack([weights[-1] for weights in schedule[::8]]).float(), torch.tensor(DEEP_CURRENT), atol=5e-4, rtol=0
    )


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_infinite_bias_is_the_vanilla_model(make_vanilla, make_tokens, tie_word_embeddings):
    vanilla = make_vanilla(tie_word_embeddings=tie_word_embeddings)
    input_ids = make_tokens(vanilla, batch=3, seq=12)
    with torch.no_grad():
        expected = vanilla(input_ids).logits
        near = (wrap_qwen3(vanilla, num_blocks=2, recency_bias=40)(input_ids).logits - expected).abs().max()
        far = (wrap_qwen3(vanilla, num_blocks=2, recency_bias=3)(input_ids).logits - expected).abs().max()
    assert near <= 1e-4
    assert far > 1e-3  # else the line above says nothing


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_parameters_are_shared(make_vanilla, tie_word_embeddings):
    vanilla = make_vanilla(tie_word_embeddings=tie_word_embeddings)
    wrapped = wrap_qwen3(vanilla, num_blocks=2)
    theirs = {name: p.data_ptr() for name, p in vanilla.named_parameters(remove_duplicate=False)}
    ours = {name: p.data_ptr() for name, p in wrapped.named_parameters(remove_duplicate=False) if "_res_" not in name}
    assert ours == theirs
    assert (ours["lm_head.weight"] == ours["model.embed_tokens.weight"]) == tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(make_vanilla, make_tokens, dtype):
    vanilla = make_vanilla().to(dtype)
    wrapped = wrap_qwen3(vanilla, num_blocks=2, recency_bias=2.7)  # in bfloat16 this is 2.703125
    assert {p.dtype for p in wrapped.parameters()} == {dtype}
    input_ids = make_tokens(wrapped)
    with torch.no_grad():
        assert wrapped(input_ids).logits.dtype == dtype
    for weights, expected in zip(measure(wrapped, input_ids), recency_schedule(wrapped), strict=True):
        assert (weights - expected).abs().max() <= 1e-6


def test_routing_is_frozen(make_vanilla, make_tokens):
    wrapped = wrap_qwen3(make_vanilla(), num_blocks=2)
    assert wrapped.config.attnres_routing == "frozen"
    assert wrapped.config.attnres_source == "cumulative"
    assert not any(p.requires_grad for p in wrapped.routing_parameters().values())
    input_ids = make_tokens(wrapped)
    wrapped(input_ids, labels=input_ids).loss.backward()
    assert all(p.grad is None for p in wrapped.routing_parameters().values())


def test_a_schedule_that_is_trained_on_request(make_vanilla, make_tokens, tmp_path):
    vanilla = make_vanilla()
    wrapped = wrap_qwen3(vanilla, num_blocks=2, trainable=True)
    assert wrapped.config.attnres_routing == "learned"
    input_ids = make_tokens(wrapped)
    fixed = wrap_qwen3(vanilla, num_blocks=2)
    assert torch.equal(wrapped(input_ids).logits, fixed(input_ids).logits)  # until a step is taken
    wrapped(input_ids, labels=input_ids).loss.backward()
    for name, parameter in wrapped.routing_parameters().items():
        # The gain of a zero query has none; the first read sees one tensor twice, whatever its weights.
        moves = "_norm" not in name and "layers.0.attn" not in name
        assert bool(parameter.grad.any()) == moves, name
    wrapped.save_pretrained(tmp_path)
    assert all(p.requires_grad for p in AttnResForCausalLM.from_pretrained(tmp_path).routing_parameters().values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_vanilla_model_is_left_as_it_was(make_vanilla, make_tokens, training, requires_grad):
    vanilla = make_vanilla().train(training).requires_grad_(requires_grad)
    input_ids = make_tokens(vanilla)
    with torch.no_grad():
        logits = vanilla(input_ids).logits
    config, weights = vanilla.config.to_dict(), copy.deepcopy(vanilla.state_dict())
    parameters, modules = dict(vanilla.named_parameters()), list(vanilla.modules())
    wrapped = wrap_qwen3(vanilla, num_blocks=2)
    with torch.no_grad():
        wrapped(input_ids)
        assert torch.equal(vanilla(input_ids).logits, logits)
    assert vanilla.config.to_dict() == config
    assert vanilla.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vanilla.state_dict().items())
    assert all(parameters[name] is parameter for name, parameter in vanilla.named_parameters())
    assert list(map(id, vanilla.modules())) == list(map(id, modules))
    assert wrapped.training == vanilla.training == training
    assert {p.requires_grad for p in vanilla.parameters()} == {requires_grad}


@pytest.mark.parametrize("kind", [str, None])
def test_a_saved_folder_is_wrapped(make_vanilla, make_tokens, tmp_path, kind):
    vanilla = make_vanilla()
    vanilla.save_pretrained(tmp_path)
    input_ids = make_tokens(vanilla)
    from_folder = wrap_qwen3(kind(tmp_path) if kind else tmp_path, num_blocks=2)
    with torch.no_grad():
        assert torch.equal(from_folder(input_ids).logits, wrap_qwen3(vanilla, num_blocks=2)(input_ids).logits)


def test_a_hub_id_is_wrapped(make_vanilla, make_hub):
    """By the real path: the hub's own cache, holding a small model under the name of a large one."""
    vanilla = make_vanilla(tie_word_embeddings=True).to(torch.bfloat16)
    vanilla.generation_config.update(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[7, 9])
    environment = make_hub(vanilla, "Qwen/Qwen3-0.6B")
    script = """
import attnres
wrapped = attnres.wrap_qwen3("Qwen/Qwen3-0.6B", num_blocks=2)
assert type(wrapped) is attnres.AttnResForCausalLM
print(wrapped.dtype, wrapped.generation_config.top_k, wrapped.generation_config.eos_token_id)
print(wrapped.lm_head.weight is wrapped.model.embed_tokens.weight)
try:
    attnres.wrap_qwen3("Qwen/Qwen3-none")
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "torch.bfloat16 20 [7, 9]",
        "True",
        "wrap_qwen3: Qwen/Qwen3-none is neither a folder with a model nor a model on the hub",
    ]


def test_the_shape_of_qwen3_06b_on_a_cpu():
    """Random weights; 12 GiB is what wrapping may take, two copies of the float32 weights and more would not fit."""
    script = """
import resource, torch, attnres
from transformers import Qwen3Config, Qwen3ForCausalLM
config = Qwen3Config(
    num_hidden_layers=28, hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True,
)
vanilla = Qwen3ForCausalLM(config).eval()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wrapped = attnres.wrap_qwen3(vanilla)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    routing_weights = wrapped(torch.arange(64)[None], output_routing_weights=True).routing_weights
measured = torch.stack([weights[..., -1].mean() for weights in routing_weights]).mean()
schedule = torch.stack([weights[-1] for weights in attnres.recency_schedule(wrapped)]).mean()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(p.numel() for p in vanilla.parameters()), float(measured), float(schedule), after - before, peak)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    parameters, measured, schedule, wrapping_kib, peak_kib = map(float, result.stdout.split())
    assert parameters == 596_049_920
    assert abs(measured - 0.8397) <= 5e-5
    assert abs(schedule - 0.8397) <= 5e-5
    assert wrapping_kib < 64 * 1024  # no second copy of 2.2 GiB
    assert peak_kib < 12 * 1024**2


def test_a_folder_whose_tensors_are_not_a_vanilla_models(make_vanilla, tmp_path):
    make_vanilla().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file({**weights, "model.layers.1.foo": torch.ones(1)}, path, metadata={"format": "pt"})
    message = r"1 missing tensor: model\.layers\.1\.mlp\.up_proj\.weight; 1 unexpected tensor: model\.layers\.1\.foo$"
    with pytest.raises(ValueError, match=message):
        wrap_qwen3(tmp_path, num_blocks=2)
    path.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} has a config.json but no weights"):
        wrap_qwen3(tmp_path, num_blocks=2)


def test_a_wrapped_model_can_be_saved(make_vanilla, make_tokens, tmp_path):
    wrapped = wrap_qwen3(make_vanilla(), num_blocks=2)
    wrapped.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path)
    input_ids = make_tokens(wrapped)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, wrapped(input_ids).logits)
    assert all(map(torch.equal, recency_schedule(loaded), recency_schedule(wrapped)))


def one_line(error: pytest.ExceptionInfo[ValueError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"num_blocks": 5}, ["attnres_num_blocks", "5", "num_hidden_layers", "4"]),
        ({"num_blocks": 0}, ["attnres_num_blocks", "positive", "0"]),
        ({"recency_bias": math.inf}, ["attnres_recency_bias_init", "finite", "inf"]),
        ({"recency_bias": math.nan}, ["attnres_recency_bias_init", "finite", "nan"]),
    ],
)
def test_bad_arguments(make_vanilla, arguments, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (all of the message is checked)
        wrap_qwen3(make_vanilla(), **{"num_blocks": 2, **arguments})
    one_line(error, *parts)


def test_only_a_vanilla_qwen3_is_wrapped(make_vanilla, make_model):
    for other in (make_model(), make_vanilla().model, None):
        with pytest.raises(ValueError, match=f"takes a Qwen3ForCausalLM, got {type(other).__name__}"):
            wrap_qwen3(other, num_blocks=2)


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (all of the message is checked)
        wrap_qwen3(tmp_path / "missing", num_blocks=2)
    one_line(error, str(tmp_path / "missing"))


@pytest.mark.parametrize("other", ["attnres", "llama"])
def test_a_folder_of_another_architecture(make_model, tmp_path, other):
    model = make_model() if other == "attnres" else LlamaForCausalLM(LlamaConfig(**SMALL_SHAPE))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (all of the message is checked)
        wrap_qwen3(tmp_path, num_blocks=2)
    one_line(error, "qwen3", model.config.model_type)


def test_no_schedule_for_learned_queries(make_model, make_vanilla):
    with pytest.raises(ValueError, match="learned queries"):
        recency_schedule(make_model())
    model = make_model(randomize=False, attnres_source="block_sum")
    recency_schedule(model)
    with torch.no_grad():
        model.model.final_res_proj.weight[0, 0] = 1e-3  # one number in the last query is enough
    with pytest.raises(ValueError, match="learned queries"):
        recency_schedule(model)
    vanilla = make_vanilla()
    for other in (vanilla, vanilla.config, model.model, 3):
        with pytest.raises(ValueError, match="needs an AttnResForCausalLM or its config, got"):
            recency_schedule(other)


def test_no_schedule_for_a_bias_that_is_not_finite(make_model):
    model = make_model(randomize=False)
    with torch.no_grad():
        model.model.layers[1].mlp_res_bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        recency_schedule(model)


def test_the_generation_config_is_kept(make_vanilla):
    vanilla = make_vanilla()
    vanilla.generation_config.update(eos_token_id=[3, 5], repetition_penalty=1.1)
    wrapped = wrap_qwen3(vanilla, num_blocks=2)
    assert wrapped.generation_config.to_dict() == vanilla.generation_config.to_dict()
    assert wrapped.generation_config is not vanilla.generation_config


def test_schedule_of_a_config_takes_its_initial_bias():
    schedule = recency_schedule(small_config(attnres_recency_bias_init=0.0))
    assert all(torch.allclose(weights, torch.full_like(weights, 1 / len(weights))) for weights in schedule)
