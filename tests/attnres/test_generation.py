"""Generation: sources are per token, so a KV cache is all the state there is between steps."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from attnres import AttnResForCausalLM, Read, wrap_qwen3
from tests.attnres.test_features import SLIDING
from tests.conftest import BOTH

METHODS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam search": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}
CACHES = {
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


def prompts(model, make_tokens) -> dict[str, torch.Tensor]:
    """A batch of prompts of 6, 4 and 3 tokens, padded on the left."""
    input_ids = make_tokens(model, batch=3, seq=6)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :2] = 0
    attention_mask[2, :3] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def generate(model, inputs: dict[str, torch.Tensor], **options):
    torch.manual_seed(0)
    defaults = {"max_new_tokens": 8, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **(defaults | options))


def make(make_model, source: str, mode: str, **fields) -> AttnResForCausalLM:
    return make_model(num_hidden_layers=5, attnres_num_blocks=2, attnres_source=source, attnres_mode=mode, **fields)


def assert_same(a, b, tolerance: float) -> None:
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


@BOTH
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_every_method_gives_the_same_with_and_without_a_cache(
    make_model, make_tokens, source, mode, sliding, dtype, tolerance
):
    model = make(make_model, source, mode, **(SLIDING if sliding else {})).to(dtype)
    inputs = prompts(model, make_tokens)
    for method, options in METHODS.items():
        cached = generate(model, inputs, **options)
        assert cached.sequences.shape == (6 if method == "beam search" else 3, 14)
        assert cached.sequences[:, 6:].unique().numel() > 3  # not one token over and over, where a fault would not show
        assert_same(generate(model, inputs, use_cache=False, **options), cached, tolerance)
    for options in CACHES.values() if not sliding else ():
        assert_same(generate(model, inputs, **options), generate(model, inputs), tolerance)


@BOTH
@pytest.mark.parametrize("sliding", [False, True])
def test_a_padded_prompt_continues_as_it_does_alone(make_model, make_tokens, source, mode, sliding):
    model = make(make_model, source, mode, **(SLIDING if sliding else {}))
    inputs = prompts(model, make_tokens)
    together = generate(model, inputs)
    for row, length in enumerate((6, 4, 3)):
        alone = generate(model, {name: value[row : row + 1, -length:] for name, value in inputs.items()})
        assert torch.equal(alone.sequences[0], together.sequences[row, 6 - length :])
        for x, y in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(x[0], y[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, SLIDING])
def test_as_vanilla_at_infinite_bias(make_vanilla, make_tokens, fields):
    vanilla = make_vanilla(**fields)
    wrapped = wrap_qwen3(vanilla, num_blocks=2, recency_bias=40)
    inputs = prompts(vanilla, make_tokens)
    for options in (METHODS | CACHES).values():
        assert_same(generate(wrapped, inputs, **options), generate(vanilla, inputs, **options), 1e-4)


@BOTH
@pytest.mark.parametrize("chunks", [[5, 3], [1] * 8, [2, 3, 3]])
@torch.no_grad()
def test_chunks_give_the_logits_and_routing_of_one_pass(make_model, make_tokens, source, mode, chunks):
    model = make(make_model, source, mode).double()
    input_ids = make_tokens(model, seq=8)
    outputs = {"output_routing_weights": True, "output_hidden_states": True}
    full = model(input_ids, **outputs)
    cache = DynamicCache(config=model.config)
    parts = [model(chunk, past_key_values=cache, **outputs) for chunk in input_ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), full.logits, atol=1e-12, rtol=0)
    for name in ("routing_weights", "hidden_states"):
        for pieces, whole in zip(zip(*(part[name] for part in parts), strict=True), full[name], strict=True):
            torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-12, rtol=0)


@BOTH
def test_the_cache_is_all_the_state_there_is(make_model, make_tokens, source, mode):
    """What one model has cached, another model of the same weights continues from, in any order, with the same bits."""
    model = make(make_model, source, mode)
    stranger = make(make_model, source, mode)
    input_ids = make_tokens(model, seq=8)
    other_ids = make_tokens(model, seq=8, seed=1)
    with torch.no_grad():
        cache = model(input_ids[:, :5], use_cache=True).past_key_values
        saved = copy.deepcopy(cache)
        expected = model(input_ids[:, 5:], past_key_values=cache).logits
        model(other_ids, use_cache=True)  # leaves nothing behind
        stranger(other_ids, use_cache=True)
        for continues in (model, stranger):
            again = continues(input_ids[:, 5:], past_key_values=copy.deepcopy(saved)).logits
            assert torch.equal(again, expected)
    # Keys and values of each layer for each token, as in Qwen3, and nothing more.
    assert len(saved.layers) == 5
    for layer in saved.layers:
        tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        assert [tensor.shape for tensor in tensors] == [(2, 1, 5, 8)] * 2
        assert {tensor.data_ptr() for tensor in tensors} == {layer.keys.data_ptr(), layer.values.data_ptr()}
    assert all("rotary_emb" in name for name, _ in model.named_buffers())


@BOTH
def test_generation_from_embeddings(make_model, make_tokens, source, mode):
    model = make(make_model, source, mode)
    inputs = prompts(model, make_tokens)
    by_embedding = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    assert torch.equal(generate(model, by_embedding).sequences, generate(model, inputs).sequences[:, 6:])


def test_hidden_states_and_attentions_of_every_step(make_model, make_tokens):
    model = make_model()
    model.set_attn_implementation("eager")
    output = generate(
        model, prompts(model, make_tokens), max_new_tokens=3, output_hidden_states=True, output_attentions=True
    )
    assert [len(states) for states in output.hidden_states] == [5, 5, 5]
    assert [states[-1].shape for states in output.hidden_states] == [(3, 6, 16), (3, 1, 16), (3, 1, 16)]
    assert [weights[0].shape[-2:] for weights in output.attentions] == [(6, 6), (1, 7), (1, 8)]


def even(read: Read) -> Read:
    return read._replace(routing_weights=torch.full_like(read.routing_weights, 1 / max(1, read.site.num_sources)))


@BOTH
def test_interventions_act_at_every_step(make_model, make_tokens, source, mode):
    model = make(make_model, source, mode)
    input_ids = make_tokens(model, seq=6)
    sequences = input_ids
    with torch.no_grad():
        for _ in range(8):
            logits = model(sequences, intervention=even).logits[:, -1]
            sequences = torch.cat([sequences, logits.argmax(-1, keepdim=True)], 1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    ablated = generate(model, inputs, intervention=even)
    assert torch.equal(ablated.sequences, sequences)
    torch.testing.assert_close(ablated.logits[-1], logits, atol=1e-5, rtol=0)
    assert (generate(model, inputs).logits[-1] - logits).abs().max() > 1e-3
