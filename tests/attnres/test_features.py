"""What transformers' users know from other models: each feature against vanilla Qwen3, or against itself without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, Qwen3ForCausalLM

from attnres import AttnResForCausalLM, Read, wrap_qwen3
from tests.conftest import BOTH, SOURCES

INFINITE = 40  # as good as: in float64 the other sources have 1e-17 of the weight
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}


def left_padded(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A mask with one, two, … places of padding, and the positions that `generate` would derive from it."""
    mask = torch.ones_like(input_ids)
    for row in range(len(mask)):
        mask[row, : row + 1] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


CALLS: dict[str, Callable[[PreTrainedModel, torch.Tensor], dict]] = {
    "plain": lambda model, ids: {"input_ids": ids},
    "embeddings": lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids)},
    "padding": lambda model, ids: {"input_ids": ids, **left_padded(ids)},
    "positions": lambda model, ids: {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None] * 2 + 3},
    "mask": lambda model, ids: {
        "input_ids": ids,
        "attention_mask": torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril(1),  # sees one ahead
    },
    "packed": lambda model, ids: {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
    "hidden_states": lambda model, ids: {"input_ids": ids, "output_hidden_states": True},
    "attentions": lambda model, ids: {"input_ids": ids, "output_attentions": True},
    "logits_to_keep": lambda model, ids: {"input_ids": ids, "logits_to_keep": 3},
    "positions_to_keep": lambda model, ids: {"input_ids": ids, "logits_to_keep": torch.tensor([4, 1])},
    "labels": lambda model, ids: {"input_ids": ids, "labels": ids.masked_fill(ids < 10, -100)},
    "shift_labels": lambda model, ids: {"input_ids": ids, "labels": ids, "shift_labels": ids},
    "token_type_ids": lambda model, ids: {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)},
    "no_cache": lambda model, ids: {"input_ids": ids, "use_cache": False},
    "num_items_in_batch": lambda model, ids: {"input_ids": ids, "labels": ids, "num_items_in_batch": 50},
}
FIELDS = {
    "": {},
    "tied": {"tie_word_embeddings": True},
    "sliding": SLIDING,
    "biases": {"attention_bias": True},
    "theta": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
}


def assert_outputs_are_close(ours, theirs, tolerance: float) -> None:
    assert set(ours.keys()) == set(theirs.keys())
    for name in theirs.keys() - {"past_key_values"}:
        a, b = ours[name], theirs[name]
        for x, y in zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]:
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@DTYPES
@pytest.mark.parametrize("fields", FIELDS)
@torch.no_grad()
def test_as_vanilla_at_infinite_bias(make_vanilla, make_tokens, dtype, tolerance, fields):
    vanilla = make_vanilla(**FIELDS[fields]).to(dtype)
    input_ids = make_tokens(vanilla, batch=3, seq=9)
    far = wrap_qwen3(vanilla, num_blocks=2, recency_bias=3)
    assert (far(input_ids).logits - vanilla(input_ids).logits).abs().max() > 1e-3  # else all below says nothing
    for name, call in CALLS.items():
        vanilla.set_attn_implementation("eager" if name in ("attentions", "mask") else "sdpa")
        wrapped = wrap_qwen3(vanilla, num_blocks=2, recency_bias=INFINITE)
        ours = wrapped(**call(wrapped, input_ids))
        assert_outputs_are_close(ours, vanilla(**call(vanilla, input_ids)), tolerance)
        if name in ("plain", "embeddings", "labels", "token_type_ids"):
            continue
        without = "labels" if name in ("num_items_in_batch", "shift_labels") else "plain"
        plain = wrapped(**CALLS[without](wrapped, input_ids))
        assert plain.keys() != ours.keys() or any(  # the option has its effect
            plain[key].shape != ours[key].shape or not torch.allclose(plain[key], ours[key])
            for key in plain.keys() - {"past_key_values"}
        ), name


@BOTH
def test_hidden_states_are_the_stream_after_each_layer(make_model, make_tokens, source, mode):
    model = make_model(num_hidden_layers=5, attnres_num_blocks=2, attnres_source=source, attnres_mode=mode)
    input_ids = make_tokens(model)
    with torch.no_grad():
        output = model(input_ids, output_hidden_states=True)
        body = model.model(input_ids, output_depth_states=True)
    assert len(output.hidden_states) == 6
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(input_ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    for hidden_states, state in zip(output.hidden_states[:-1], body.depth_states[::2], strict=False):
        expected = state.completed[-1] if state.current is None else state.current
        assert torch.equal(hidden_states, expected)


def test_what_a_call_leaves_open_the_configuration_says(make_model, make_tokens):
    model = make_model(use_cache=False)
    input_ids = make_tokens(model)
    plain = model(input_ids)
    assert plain.hidden_states is None
    assert plain.past_key_values is None
    assert model(input_ids, use_cache=True).past_key_values is not None
    model.config.output_hidden_states = True
    assert len(model(input_ids).hidden_states) == 5
    assert model(input_ids, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    model.config.return_dict = False
    assert torch.equal(model(input_ids)[0], plain.logits)
    assert torch.equal(model(input_ids, return_dict=True).logits, plain.logits)


def test_outputs_that_a_call_cannot_give_are_refused(make_model, make_tokens):
    model = make_model()
    input_ids = make_tokens(model)
    with pytest.raises(ValueError, match=r"stop_before leaves no logits: give it to model\.model"):
        model(input_ids, stop_before=3)
    model.set_attn_implementation("eager")
    assert len(model(input_ids, output_attentions=True).attentions) == 4
    for by_config in (False, True):
        model.config._attn_implementation = "eager"
        model.config.output_attentions = by_config
        model.config._attn_implementation = "sdpa"
        with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager', got 'sdpa'"):
            model(input_ids, **({} if by_config else {"output_attentions": True}))
    assert model(input_ids, output_attentions=False).attentions is None


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
    checkpoint(model)
    checkpointed, num_checkpointed = run(), len(reads)
    assert num_checkpointed == num_plain + 2 * 5  # each read of a layer happened once more
    for name, grad in plain.items():
        assert (grad is None) == (checkpointed[name] is None), name
        if grad is not None:
            torch.testing.assert_close(checkpointed[name], grad, rtol=0, atol=1e-7, msg=name)


def checkpoint(model: PreTrainedModel, *args) -> None:
    """Newer releases of transformers have renamed it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*args)


def test_reentrant_checkpointing_is_refused(make_model):
    """It would lose the gradients of all that is in a DepthState."""
    model = make_model()
    with pytest.raises(ValueError, match="use_reentrant=True is not supported"):
        checkpoint(model, {"use_reentrant": True})
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpoint(model, {"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


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
@pytest.mark.parametrize("sliding", [False, True])
def test_attention_implementations_agree(make_model, make_tokens, source, mode, sliding):
    model = make_model(attnres_source=source, attnres_mode=mode, **(SLIDING if sliding else {}))
    input_ids = make_tokens(model, batch=3, seq=9)
    padding = left_padded(input_ids)
    real = padding["attention_mask"].bool()
    logits = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(input_ids, **padding).logits[real]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=0)


def test_sliding_layers_do_not_look_beyond_their_window(make_model, make_tokens):
    """One layer with a window of 3: the last token sees itself and two before it."""
    model = make_model(num_hidden_layers=1, attnres_num_blocks=1, **{**SLIDING, "max_window_layers": 0})
    assert model.config.layer_types == ["sliding_attention"]
    input_ids = make_tokens(model, seq=9)
    for position, is_seen in ((5, False), (6, True)):
        changed = input_ids.clone()
        changed[:, position] += 1
        changed %= model.config.vocab_size
        with torch.no_grad():
            same = torch.equal(model(changed).logits[:, -1], model(input_ids).logits[:, -1])
        assert same != is_seen


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(make_model, make_tokens, tmp_path, source, tied):
    model = make_model(attnres_source=source, tie_word_embeddings=tied)
    input_ids = make_tokens(model)
    logits = model(input_ids).logits
    model.resize_token_embeddings(48, mean_resizing=False)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(model.lm_head.weight) == 48
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    resized = model(input_ids, labels=input_ids)
    torch.testing.assert_close(resized.logits[..., :40], logits, atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(AttnResForCausalLM.from_pretrained(tmp_path)(input_ids).logits, resized.logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)")  # torch, of itself
@BOTH
def test_compiled_without_graph_breaks(make_model, make_tokens, source, mode):
    """`fullgraph=True` raises at a graph break."""
    model = make_model(num_hidden_layers=3, attnres_source=source, attnres_mode=mode, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids = make_tokens(model)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(input_ids, labels=input_ids, output_routing_weights=True, output_hidden_states=True)
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        gradients[-1] |= {"logits": output.logits, **dict(enumerate(output.routing_weights))}
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=0, msg=str(name))


def test_a_wrapped_model_trains_as_the_vanilla_one_at_infinite_bias(make_vanilla, make_tokens):
    """Gradients reach the shared parameters, so a wrapped model can be fine-tuned."""
    vanilla: Qwen3ForCausalLM = make_vanilla()
    wrapped = wrap_qwen3(vanilla, num_blocks=2, recency_bias=INFINITE)
    input_ids = make_tokens(vanilla)
    vanilla(input_ids, labels=input_ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in vanilla.named_parameters()}
    vanilla.zero_grad()
    wrapped(input_ids, labels=input_ids).loss.backward()
    for name, parameter in vanilla.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)
