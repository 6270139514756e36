"""Metrics of logits against loops in Python floats, and what a margin to a chosen distractor does to noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnres.tasks import IGNORE_INDEX
from probe.ablation.metrics import CleanRun
from probe.examples.examples import Examples
from probe.vocabulary import METRICS
from tests.support import naive_probe

VOCAB, LENGTH = 20, 12


def examples(longest: int, seed: int, num_sequences: int = 4) -> Examples:
    """Random tokens, three questions each, of answers of one to `longest` tokens; some values share their beginning."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(num_sequences):
        codes: list[list[int]] = []
        while len(codes) < 7:
            code = rng.integers(0, 5 if longest > 1 else VOCAB, rng.integers(1, longest + 1)).tolist()
            if not any(a[: len(b)] == b or b[: len(a)] == a for a, b in ((code, other) for other in codes)):
                codes.append(code)
        labels = torch.full((LENGTH,), IGNORE_INDEX)
        for start, code in zip((0, 4, 8), codes, strict=False):
            labels[start : start + len(code)] = torch.tensor(code)
        padded = torch.tensor([code + [-1] * (longest - len(code)) for code in codes])
        rows.append((torch.tensor(rng.integers(0, VOCAB, LENGTH)), labels, padded))
    return Examples.collate(rows)


def clean_run(inputs: Examples, logits: torch.Tensor) -> CleanRun:
    return CleanRun.from_logits(
        logits[inputs.queries], inputs.labels[inputs.queries], inputs.rivals, inputs.answer_rows
    )


@pytest.mark.parametrize(("longest", "seed"), [(1, 0), (2, 1), (3, 2), (3, 3)])
def test_metrics_equal_loops_over_queries(longest, seed):
    inputs = examples(longest, seed)
    clean, ablated = 3 * torch.randn(2, len(inputs), LENGTH, VOCAB)
    values = [[[token for token in code if token >= 0] for code in codes] for codes in inputs.candidates.tolist()]
    run = clean_run(inputs, clean)
    expected, chosen = naive_probe.metrics(clean, inputs.labels, values, None)
    expected_ablated, _ = naive_probe.metrics(ablated, inputs.labels, values, chosen)
    found = run.metrics(), run.metrics(ablated[inputs.queries])
    for metrics, naive in zip(found, (expected, expected_ablated), strict=True):
        assert tuple(metrics) == METRICS
        for name, per_query in naive.items():
            np.testing.assert_allclose(metrics[name], list(per_query.values()), atol=1e-5, err_msg=name)
    sizes = [float(clean[b, t].abs().max()) for (b, _), (t, _) in chosen.items()]
    np.testing.assert_allclose(run.logit_sizes, sizes)


@pytest.mark.parametrize("factor", [0.25, 4.0, 16.0])
def test_no_choice_depends_on_the_scale_of_the_logits(factor):
    """Neighbours a rounding apart, 30 below a sure answer: their log-probabilities are equal, or not, by the scale."""
    inputs = examples(3, seed=5, num_sequences=40)
    close = torch.arange(VOCAB).flip(0) * 2.0**-22  # units in the last place of 1 to 2
    logits = (1 + close).expand(len(inputs), LENGTH, VOCAB).clone()
    logits[inputs.queries, inputs.labels[inputs.queries]] += 30
    runs = [clean_run(inputs, scale * logits) for scale in (1.0, factor)]
    assert torch.equal(runs[0].distractors, runs[1].distractors)
    assert torch.equal(runs[0].decisive_rows, runs[1].decisive_rows)
    best = inputs.rivals.masked_fill(runs[0].rivals < 0, VOCAB).amin(1)  # the smallest token has the largest logit
    assert torch.equal(runs[0].distractors[best < VOCAB], best[best < VOCAB])


@pytest.mark.parametrize(("num_values", "signal"), [(4, 0.3), (4, 1.0), (4, 1.8), (16, 1.0), (16, 1.9), (16, 2.5)])
@pytest.mark.parametrize("left", [1.0, 0.5, 0.0])
def test_a_distractor_chosen_for_being_strongest_makes_noise_look_like_help(num_values, signal, left):
    """Values' logits are exchangeable noise, and the answer has `signal` more; the ablated run draws anew, of which
    `left` is left. It has lost `(1 - left) * signal`. The margin to the mean says so. The margin to the strongest finds
    its distractor back at the mean: it says less, by the expected maximum of the noise. That is why both are shown.
    """
    generator, queries = torch.Generator().manual_seed(num_values), 20_000
    clean, ablated = torch.randn(2, queries, num_values, generator=generator)
    clean[:, 0] += signal
    ablated[:, 0] += left * signal
    answers, values = torch.zeros(queries, dtype=torch.long), torch.arange(num_values).expand(queries, -1)
    run = CleanRun.from_logits(clean, answers, values)
    before, after = run.metrics(), run.metrics(ablated)
    assert 0.2 < before["accuracy"].mean() < 0.8
    harm = {name: before[name] - after[name] for name in ("logit_diff", "logit_diff_mean")}
    error = {name: float(values.std()) / queries**0.5 for name, values in harm.items()}
    lost = (1 - left) * signal
    assert float(harm["logit_diff_mean"].mean()) == pytest.approx(lost, abs=4 * error["logit_diff_mean"])
    maximum = float(torch.randn(200_000, num_values - 1, generator=generator).amax(1).mean())  # 0.8 of 3, 1.7 of 15
    assert float(harm["logit_diff"].mean()) == pytest.approx(lost - maximum, abs=5 * error["logit_diff"])
    assert harm["logit_diff"].mean() < harm["logit_diff_mean"].mean() - 0.8
