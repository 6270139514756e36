"""The wrapped baseline: routing that no input changes and that equals its analytic schedule."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from attnres import AttnResForCausalLM, recency_schedule, wrap_qwen3
from tests.conftest import BOTH, SMALL_SHAPE, with_bias

# Shape of Qwen3-0.6B in depth; the width plays no part in the schedule.
DEEP = {"num_hidden_layers": 28, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4}
DEEP_CURRENT = [0.953, 0.909, 0.870, 0.834, 0.801, 0.770, 0.742]


def measure(model: AttnResForCausalLM, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(input_ids, output_routing_weights=True).routing_weights


def assert_as_scheduled(model: AttnResForCausalLM, input_ids: torch.Tensor, schedule) -> None:
    for weights, expected in zip(measure(model, input_ids), schedule, strict=True):
        assert weights.shape == (*input_ids.shape, len(expected))
        torch.testing.assert_close(weights.double(), expected.expand_as(weights), atol=1e-6, rtol=0)


@settings(max_examples=15)
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
    model = wrap_qwen3(make_vanilla(seed=seed, num_hidden_layers=num_layers), num_blocks, recency_bias)
    schedule = recency_schedule(model)
    assert_as_scheduled(model, make_tokens(model, batch, seq, seed), schedule)
    size = math.ceil(num_layers / num_blocks)
    for read, weights in enumerate(schedule):
        n = 2 + read // 2 // size  # embedding, completed blocks, current
        rest = 1 / (math.exp(recency_bias) + n - 1)
        analytic = torch.tensor([rest] * (n - 1) + [math.exp(recency_bias) * rest], dtype=torch.float64)
        torch.testing.assert_close(weights, analytic, atol=1e-6, rtol=0)  # the model keeps b in float32


@BOTH
@pytest.mark.parametrize("routing", ["learned", "frozen"])
def test_schedule_of_any_model_with_zero_queries(make_model, make_tokens, source, mode, routing):
    shape = {"num_hidden_layers": 5, "attnres_mode": mode, "attnres_routing": routing}
    model = make_model(randomize=False, **with_bias(source, 1.25), **shape)
    input_ids = make_tokens(model)
    assert_as_scheduled(model, input_ids, recency_schedule(model))
    assert_as_scheduled(model, input_ids, recency_schedule(model.config))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.routing_parameters().items()):
            if "_bias" in name:
                parameter.fill_(number / 4 - 2)
            elif "_norm" in name:
                parameter.normal_()  # a gain on a zero query changes nothing
    schedule = recency_schedule(model)
    assert_as_scheduled(model, input_ids, schedule)
    if any(site.has_current for site in model.sites):  # the model's own biases count, not the configuration's
        assert not all(map(torch.allclose, schedule, recency_schedule(model.config)))


def test_study_numbers(make_vanilla, make_tokens):
    model = wrap_qwen3(make_vanilla(**DEEP))  # the defaults are the study's: 8 blocks, b = 3
    input_ids = make_tokens(model, batch=3, seq=11)
    for routing_weights in (measure(model, input_ids), recency_schedule(model)):
        current = torch.stack([weights[..., -1].double().mean() for weights in routing_weights])
        for reads in (current[::2], current[1::2]):  # attention, MLP
            assert abs(reads.mean().item() - 0.8397) <= 1e-4
            expected = torch.tensor(DEEP_CURRENT).double()[:, None].expand(7, 4)  # 28 layers in 8 blocks: 7 of 4
            torch.testing.assert_close(reads.view(7, 4), expected, atol=5e-4, rtol=0)
    assert_as_scheduled(model, input_ids, recency_schedule(model))


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
    wrapped = wrap_qwen3(make_vanilla().to(dtype), num_blocks=2, recency_bias=2.7)  # in bfloat16 this is 2.703125
    assert {p.dtype for p in wrapped.parameters()} == {dtype}
    input_ids = make_tokens(wrapped)
    assert wrapped(input_ids).logits.dtype == dtype
    assert_as_scheduled(wrapped, input_ids, recency_schedule(wrapped))


def test_the_schedule_is_trained_only_on_request(make_vanilla, make_tokens, tmp_path):
    vanilla = make_vanilla()
    fixed, trainable = wrap_qwen3(vanilla, num_blocks=2), wrap_qwen3(vanilla, num_blocks=2, trainable=True)
    assert (fixed.config.attnres_source, fixed.config.attnres_routing) == ("cumulative", "frozen")
    assert trainable.config.attnres_routing == "learned"
    input_ids = make_tokens(vanilla)
    assert torch.equal(trainable(input_ids).logits, fixed(input_ids).logits)  # until a step is taken
    for model in (fixed, trainable):
        model(input_ids, labels=input_ids).loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in fixed.routing_parameters().values())
    for name, parameter in trainable.routing_parameters().items():
        # The gain of a zero query has none; the first read sees one tensor twice, whatever its weights.
        moves = "_norm" not in name and "layers.0.attn" not in name
        assert bool(parameter.grad.any()) == moves, name
    trainable.save_pretrained(tmp_path)
    assert all(p.requires_grad for p in AttnResForCausalLM.from_pretrained(tmp_path).routing_parameters().values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_vanilla_model_is_left_as_it_was(make_vanilla, make_tokens, training, requires_grad):
    vanilla = make_vanilla().train(training).requires_grad_(requires_grad)
    vanilla.generation_config.update(eos_token_id=[3, 5], repetition_penalty=1.1)
    input_ids = make_tokens(vanilla)
    logits = vanilla(input_ids).logits
    config, weights = vanilla.config.to_dict(), copy.deepcopy(vanilla.state_dict())
    parameters, modules = dict(vanilla.named_parameters()), list(vanilla.modules())
    wrapped = wrap_qwen3(vanilla, num_blocks=2)
    wrapped(input_ids)
    assert torch.equal(vanilla(input_ids).logits, logits)
    assert vanilla.config.to_dict() == config
    assert vanilla.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vanilla.state_dict().items())
    assert all(parameters[name] is parameter for name, parameter in vanilla.named_parameters())
    assert list(map(id, vanilla.modules())) == list(map(id, modules))
    assert wrapped.training == vanilla.training == training
    assert {p.requires_grad for p in vanilla.parameters()} == {requires_grad}
    assert wrapped.generation_config.to_dict() == vanilla.generation_config.to_dict()
    assert wrapped.generation_config is not vanilla.generation_config


@torch.no_grad()
def test_a_saved_folder_is_wrapped_and_saved_again(make_vanilla, make_tokens, tmp_path):
    vanilla = make_vanilla()
    wrapped = wrap_qwen3(vanilla, num_blocks=2)
    vanilla.save_pretrained(tmp_path / "vanilla")
    wrapped.save_pretrained(tmp_path / "wrapped")
    input_ids = make_tokens(vanilla)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "wrapped")
    for again in (loaded, *(wrap_qwen3(kind(tmp_path / "vanilla"), num_blocks=2) for kind in (str, type(tmp_path)))):
        assert torch.equal(again(input_ids).logits, wrapped(input_ids).logits)
        assert all(map(torch.equal, recency_schedule(again), recency_schedule(wrapped)))


def test_a_hub_id_is_wrapped(make_vanilla, make_hub, monkeypatch):
    """By the real path: the hub's own cache, holding a small model under the name of a large one."""
    vanilla = make_vanilla(tie_word_embeddings=True).to(torch.bfloat16)
    vanilla.generation_config.update(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[7, 9])
    cache = make_hub(vanilla, "Qwen/Qwen3-0.6B")["HF_HUB_CACHE"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    wrapped = wrap_qwen3("Qwen/Qwen3-0.6B", num_blocks=2)
    assert type(wrapped) is AttnResForCausalLM
    assert wrapped.dtype == torch.bfloat16
    assert (wrapped.generation_config.top_k, wrapped.generation_config.eos_token_id) == (20, [7, 9])
    assert wrapped.lm_head.weight is wrapped.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"Qwen/Qwen3-none is neither a folder with a model nor a model on the hub$"):
        wrap_qwen3("Qwen/Qwen3-none")


@pytest.mark.slow
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
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(p.numel() for p in vanilla.parameters()), float(measured), after - before, peak)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    parameters, measured, wrapping_kib, peak_kib = map(float, result.stdout.split())
    assert parameters == 596_049_920
    assert abs(measured - 0.8397) <= 5e-5
    assert wrapping_kib < 64 * 1024  # no second copy of 2.2 GiB
    assert peak_kib < 12 * 1024**2


def refuse(model_or_path, *parts: str, **arguments) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (all of the message is checked)
        wrap_qwen3(model_or_path, **({"num_blocks": 2} | arguments))
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_bad_arguments(make_vanilla, make_model, tmp_path):
    vanilla = make_vanilla()
    refuse(vanilla, "attnres_num_blocks", "5", "num_hidden_layers", "4", num_blocks=5)
    refuse(vanilla, "attnres_num_blocks", "positive", "0", num_blocks=0)
    refuse(vanilla, "attnres_recency_bias_init", "finite", "inf", recency_bias=math.inf)
    for dtype, bias in ((torch.float16, -70000.0), (torch.float32, 1e39)):  # infinite there
        refuse(make_vanilla().to(dtype), f"recency_bias {bias:g}", "float", "largest is", recency_bias=bias)
    for other in (make_model(), vanilla.model, None):
        refuse(other, f"takes a Qwen3ForCausalLM, got {type(other).__name__}")
    refuse(tmp_path / "missing", str(tmp_path / "missing"))
    for other in (make_model(), LlamaForCausalLM(LlamaConfig(**SMALL_SHAPE))):
        other.save_pretrained(tmp_path / "other")
        refuse(tmp_path / "other", "qwen3", f"'{other.config.model_type}' model")


def test_a_folder_whose_tensors_are_not_a_vanilla_models(make_vanilla, tmp_path):
    make_vanilla().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file({**weights, "model.layers.1.foo": torch.ones(1)}, path, metadata={"format": "pt"})
    missing, unexpected = "model.layers.1.mlp.up_proj.weight", "model.layers.1.foo"
    refuse(tmp_path, f"1 missing tensor: {missing}; 1 unexpected tensor: {unexpected}")
    path.unlink()
    refuse(tmp_path, f"{tmp_path} has a config.json but no weights")


@torch.no_grad()
def test_no_schedule(make_model, make_vanilla):
    def refuse_schedule(of, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            recency_schedule(of)

    model = make_model(randomize=False, attnres_source="block_sum")
    for other in (make_vanilla(), make_vanilla().config, model.model, 3):
        refuse_schedule(other, "needs an AttnResForCausalLM or its config, got")
    model.model.layers[1].mlp_res_bias.fill_(torch.inf)
    refuse_schedule(model, "not finite")
    model.model.final_res_proj.weight[0, 0] = 1e-3  # one number in the last query is enough
    refuse_schedule(model, "learned queries")
