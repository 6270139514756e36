"""Every effect against one plain forward with a hook for each ablation; cost, choice of pairs, and what is refused."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
import torch

from attnres import wrap_qwen3
from attnres.tasks import MQAR, Pointer, Task
from probe.ablation.metrics import CleanRun
from probe.analysis.inference import Inference
from probe.examples.examples import Examples
from probe.heads import KINDS, Head, measure_heads, plan
from tests.support.naive_heads import NaiveHeads

TASK = MQAR(num_pairs=3, vocab_size=24)
FEW = Inference(num_resamples=50)
MODELS = {
    "cumulative": {"attnres_source": "cumulative"},
    "cumulative, full": {"attnres_source": "cumulative", "attnres_mode": "full"},
    "block_sum": {"attnres_source": "block_sum"},
    "block_sum, full": {"attnres_source": "block_sum", "attnres_mode": "full"},
    "vanilla": None,
    "wrapped": None,
    "with biases": {"attention_bias": True},
}
PAIRS = [((0, 1), (0, 0)), ((0, 0), (2, 1)), ((1, 1), (2, 0)), ((2, 0), (2, 1))]


def examples_of(count: int = 4, task: Task = TASK) -> Examples:
    return Examples.from_batch(task.batch("probe", range(count)))


@pytest.fixture
def build(make_model, make_vanilla):
    def make(name: str, **fields):
        sizes = {"vocab_size": 24, "num_hidden_layers": 3, **fields}
        if name == "vanilla":
            return make_vanilla(**sizes)
        if name == "wrapped":
            return wrap_qwen3(make_vanilla(**sizes), num_blocks=3, recency_bias=1.0).eval()
        return make_model(**sizes | MODELS[name])

    return make


def naive_margins(logits, clean, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """(sequences,) margins to the strongest distractor of the clean run, and to the mean one, summed over answers."""
    found = np.zeros((2, len(examples)))
    for b, t in examples.queries.nonzero().tolist():
        answer = int(examples.labels[b, t])
        others = [c for c in examples.candidates[b, :, 0].tolist() if c != answer]
        strongest = max(others, key=lambda c: float(clean[b, t, c]))
        found[0, b] += float(logits[b, t, answer] - logits[b, t, strongest])
        found[1, b] += float(logits[b, t, answer] - logits[b, t, others].mean())
    return found[0], found[1]


@pytest.mark.parametrize("name", MODELS)
def test_effects_are_those_of_a_plain_loop_with_hooks(build, name):
    model, examples = build(name), examples_of()
    found = measure_heads(model, examples, pairs=PAIRS, batch_size=3, tokens_per_pass=60, seed=2)
    naive = NaiveHeads(model, examples.input_ids, examples.lengths.tolist(), examples.partners(2).tolist())
    clean = naive_margins(naive.clean, naive.clean, examples)
    for metric, values in zip(("logit_diff", "logit_diff_mean"), clean, strict=True):
        np.testing.assert_allclose(found.clean[metric], values, atol=1e-5)
    ablations = [(kind, (head,)) for kind in KINDS for head in found.heads]
    ablations += [(each.kind, each.heads) for each in found.pair_ablations]
    assert len(ablations) == 3 * (6 + 4)
    measured = {m: np.concatenate([found.singles[m].reshape(18, -1), found.pairs[m]]) for m in found.singles}
    sizes = []
    for number, (kind, heads) in enumerate(ablations):
        margins = naive_margins(naive.logits(kind, heads), naive.clean, examples)
        for i, metric in enumerate(("logit_diff", "logit_diff_mean")):
            expected = margins[i] - clean[i]
            np.testing.assert_allclose(measured[metric][number], expected, atol=2e-5, err_msg=f"{kind} {heads}")
            sizes.append(np.abs(expected).max())
    assert np.min(sizes) > 1e-3  # each of them does something


def test_sequences_of_many_lengths_and_answers_of_several_tokens(make_model):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 9, 5, 9, 7, 7):
        ids = torch.randint(0, 40, (length,), generator=generator)
        labels = torch.full((length,), -100)
        labels[-2:] = torch.tensor([3, 4])
        ids[-1] = 3
        rows.append((ids, labels, torch.tensor([[3, 4], [3, 5], [6, 7]])))
    examples = Examples.collate(rows)
    model = make_model(num_hidden_layers=2)
    found = measure_heads(model, examples, pairs=[((0, 0), (1, 1))], batch_size=4)
    naive = NaiveHeads(model, examples.input_ids, examples.lengths.tolist(), examples.partners().tolist())
    queries = examples.queries
    run = CleanRun.from_logits(naive.clean[queries], examples.labels[queries], examples.rivals, examples.answer_rows)
    for k, kind in enumerate(KINDS):
        both = [each.kind for each in found.pair_ablations].index(kind)
        measured = [*found.singles["logit_diff"][k], found.pairs["logit_diff"][both]]
        for heads, values in zip([*((head,) for head in found.heads), ((0, 0), (1, 1))], measured, strict=True):
            ablated = run.metrics(naive.logits(kind, heads)[queries])["logit_diff"]
            expected = (ablated - run.metrics()["logit_diff"]).numpy()
            np.testing.assert_allclose(values, expected, atol=1e-5, err_msg=f"{kind} {heads}")


@pytest.mark.parametrize("name", ["cumulative", "block_sum", "vanilla"])
def test_what_is_put_in_the_place_of_itself_changes_nothing(build, name):
    """Of equal sequences, the mean head and the head of another sequence are the head that is there."""
    examples = examples_of(1).take([0, 0, 0, 0])
    examples = Examples(**vars(examples) | {"clusters": torch.arange(4)})
    found = measure_heads(build(name), examples, ("mean", "resample"), pairs=PAIRS)
    for values in (*found.singles.values(), *found.pairs.values()):
        assert np.abs(values).max() < 1e-5


@pytest.mark.parametrize("name", ["cumulative", "block_sum", "vanilla"])
def test_neither_model_nor_hooks_are_left_changed(build, name):
    model, examples = build(name), examples_of()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(examples.input_ids).logits
    measure_heads(model, examples, pairs=PAIRS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(examples.input_ids).logits, logits)


@pytest.mark.parametrize("name", ["cumulative", "vanilla"])
def test_no_number_depends_on_how_work_is_split(build, name):
    model, examples = build(name), examples_of(9)
    found = [measure_heads(model, examples, pairs=3, batch_size=b, tokens_per_pass=t) for b, t in ((2, 1), (9, 10**6))]
    assert found[0].pair_ablations == found[1].pair_ablations
    for metric in found[0].singles:
        np.testing.assert_allclose(found[0].singles[metric], found[1].singles[metric], atol=1e-5)
        np.testing.assert_allclose(found[0].pairs[metric], found[1].pairs[metric], atol=1e-5)
    np.testing.assert_allclose(found[0].attention_to_value, found[1].attention_to_value, atol=1e-6)


@pytest.mark.parametrize("kinds", [KINDS, ("mean",), ("zero",)])
@pytest.mark.parametrize("pairs", [0, PAIRS, 100])
def test_the_cost_is_known_in_advance(build, kinds, pairs):
    model, examples = build("block_sum"), examples_of(5)
    planned = plan(model, examples, kinds, pairs, batch_size=2)
    seen = []
    found = measure_heads(model, examples, kinds, pairs, batch_size=2, on_progress=lambda *at: seen.append(at))
    assert found.forward_passes == pytest.approx(planned.forward_passes)
    assert planned.pairs == {0: 0, 100: 15}.get(pairs if isinstance(pairs, int) else 1, 4)
    assert planned.naive == 1 + len({"mean", "resample"} & set(kinds)) + len(kinds) * (6 + planned.pairs)
    assert planned.forward_passes < planned.naive
    assert seen[-1][0] == seen[-1][1] == 3 * len(kinds) * (6 + planned.pairs)
    assert found.tested.all()


def test_pairs_are_chosen_on_other_sequences_than_they_are_tested_on(build):
    model, examples = build("cumulative"), examples_of(10)
    found = measure_heads(model, examples, pairs=3, seed=5)
    assert found.tested.sum() == 5
    for metric in found.pairs:
        assert np.isfinite(found.pairs[metric][:, found.tested]).all()
        assert np.isnan(found.pairs[metric][:, ~found.tested]).all()
    for number, kind in enumerate(KINDS):
        harm = -found.singles["logit_diff"][number][:, ~found.tested].sum(1)
        best = sorted(found.heads[i] for i in np.argsort(-harm)[:3])
        assert [each.heads for each in found.pair_ablations if each.kind == kind] == list(combinations(best, 2))
    planned = plan(model, examples, pairs=3, seed=5)
    assert found.forward_passes <= planned.forward_passes < planned.naive
    table = found.pair_table(FEW)
    assert set(table["n_sequences"]) == {5}
    assert set(found.table(FEW)["n_sequences"]) == {10}


def test_the_halves_are_of_clusters(build):
    examples = examples_of(12)
    examples = Examples(**vars(examples) | {"clusters": torch.arange(12) // 3})
    found = measure_heads(build("vanilla"), examples, ("zero",), pairs=2)
    assert found.tested.reshape(4, 3).all(1).sum() == 2
    assert found.tested.sum() == 6
    assert set(found.pair_table(FEW)["n_clusters"]) == {2}
    assert set(found.table(FEW)["n_clusters"]) == {4}


@pytest.mark.parametrize("name", ["cumulative", "vanilla"])
def test_the_plan_of_a_model_without_weights(build, name):
    examples = examples_of()
    expected = plan(build(name), examples, pairs=PAIRS)
    assert plan(build(name).to("meta"), examples, pairs=PAIRS, tokens_per_pass=4096) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kinds": ["none"]}, "kind 'none' does not exist; choose from zero, mean, resample"),
        ({"kinds": []}, "kinds must be some of zero, mean, resample, each once"),
        ({"kinds": ["zero", "zero"]}, "each once"),
        ({"pairs": 1}, "pairs_among must be 0, for no pairs, or at least 2, got 1"),
        ({"pairs": -1}, "pairs_among must be"),
        ({"pairs": [((0, 0), (3, 0))]}, "layer 3 head 0 does not exist: layers are 0 to 2, heads 0 to 1"),
        ({"pairs": [((0, -1), (1, 0))]}, "layer 0 head -1 does not exist"),
        ({"pairs": [((0, 0), (0, 0))]}, "a pair is of two heads and is named once"),
        ({"pairs": [((0, 0), (1, 0)), ((1, 0), (0, 0))]}, "a pair is of two heads and is named once"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tokens_per_pass": 0}, "tokens_per_pass must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"examples": examples_of(1)}, "has no partner"),
        ({"examples": examples_of(3), "pairs": 2}, "4 clusters are needed, there are 3"),
        ({"examples": examples_of(2, Pointer(1, 67))}, "the model's vocabulary is 24"),
        ({"examples": examples_of(4, MQAR(1, 24))}, "with one there is no distractor"),
        ({"model": torch.nn.Linear(2, 2)}, "got Linear"),
    ],
)
def test_bad_input_is_refused_in_one_line(build, arguments, words):
    arguments = {"model": build("cumulative"), "examples": examples_of(), "pairs": 2} | arguments
    for function in (plan, measure_heads):
        with pytest.raises(ValueError, match=re.escape(words)) as raised:
            function(**arguments)
        assert "\n" not in str(raised.value)


def test_logits_that_are_not_finite_are_refused(build):
    model = build("vanilla")
    torch.nn.init.constant_(model.lm_head.weight, torch.inf)
    with pytest.raises(ValueError, match="the model's logits are not finite: it overflows in float32"):
        measure_heads(model, examples_of(), pairs=0)


def test_heads_are_named_as_people_do():
    assert str(Head(5, 2)) == "layer 5 head 2"
