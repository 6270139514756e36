"""The flip test on models whose behaviour is known by construction."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnres.tasks import MQAR
from probe.examples.examples import Examples
from probe.examples.flip import FlipResult, flip_outcomes, recall_accuracy

TASK = MQAR(num_pairs=4, vocab_size=40)
EXAMPLES = TASK.batch("probe", range(32))


class Scripted(torch.nn.Module):
    """A model that answers each query by `rule(keys, values, query)`, read off the tokens."""

    device = torch.device("cpu")

    def __init__(self, rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, input_ids, logits_to_keep, use_cache):
        keys, values = input_ids[:, :8:2], input_ids[:, 1:8:2]
        queries = input_ids[:, 8:]
        answers = torch.stack([self.rule(keys, values, queries[:, i]) for i in range(queries.shape[1])], 1)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(answers, TASK.vocab_size).float())


def flip_test(*args, **kwargs) -> FlipResult:
    return FlipResult.of(flip_outcomes(*args, **kwargs))


def lookup(keys, values, query):
    return values.gather(1, (keys == query[:, None]).long().argmax(1, keepdim=True)).squeeze(1)


def newest(keys, values, query):
    return values[:, -1]


def test_a_lookup_follows_the_queried_key_only():
    result = flip_test(Scripted(lookup), TASK, EXAMPLES)
    assert (result.follows_queried, result.follows_other) == (1.0, 0.0)
    assert (result.n_queried, result.n_other) == (32 * 4, 32 * 4 * 3)
    assert recall_accuracy(Scripted(lookup), Examples.from_batch(EXAMPLES)) == 1.0


def test_a_model_that_copies_the_last_value_is_found_out():
    """It follows a change of the last pair whatever is asked: 1/4 of the changes, queried or not."""
    result = flip_test(Scripted(newest), TASK, EXAMPLES)
    assert result.follows_queried == result.follows_other == 0.25
    assert recall_accuracy(Scripted(newest), Examples.from_batch(EXAMPLES)) == 0.25


def test_batches_do_not_matter():
    assert flip_test(Scripted(newest), TASK, EXAMPLES) == flip_test(Scripted(newest), TASK, EXAMPLES, batch_size=5)


def test_errors():
    full = MQAR(num_pairs=4, vocab_size=8)
    with pytest.raises(ValueError, match="not in the context"):
        flip_test(Scripted(lookup), full, full.batch("probe", range(2)))
