"""transformers' own text-generation pipeline, from a folder."""

from __future__ import annotations

import pytest
from transformers import pipeline

from attnres import AttnResForCausalLM
from tests.conftest import SOURCES

PROMPTS = ["w1 w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w30 w31"]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize("source", SOURCES)
def test_a_pipeline_continues_as_generate_does(make_model, tokenizer, save, source):
    model = make_model(attnres_source=source)
    generator = pipeline("text-generation", model=save(model), device="cpu")
    assert isinstance(generator.model, AttnResForCausalLM)
    generated = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        sequence = model.generate(**inputs, **GREEDY, pad_token_id=tokenizer.pad_token_id)[0]
        (answer,) = generator(prompt, return_tensors=True, **GREEDY)
        assert answer["generated_token_ids"] == sequence.tolist()
        continuation = sequence[inputs["input_ids"].shape[1] :]
        (answer,) = generator(prompt, return_full_text=False, **GREEDY)
        assert answer["generated_text"] == tokenizer.decode(continuation, skip_special_tokens=True)
        generated += continuation.tolist()
    assert len(set(generated)) > 3  # not one token over and over, where a fault would not show


@pytest.mark.parametrize("source", SOURCES)
def test_prompts_of_several_lengths_continue_as_each_does_alone(make_model, save, source):
    generator = pipeline("text-generation", model=save(make_model(attnres_source=source)), device="cpu")
    alone = [generator(prompt, **GREEDY) for prompt in PROMPTS]
    shapes = []
    generator.model.get_input_embeddings().register_forward_hook(lambda _, args, output: shapes.append(args[0].shape))
    assert generator(PROMPTS, batch_size=3, **GREEDY) == alone
    assert shapes == [(3, 6)] + [(3, 1)] * 11  # one padded batch, and a token of each prompt at a time
