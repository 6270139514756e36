"""The engine against a naive forward per ablation (tests/support/naive_probe.py), for all kinds, scopes and sources."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attnres import AttnResForCausalLM
from attnres.tasks import IGNORE_INDEX, MQAR
from probe.ablation.engine import Engine
from probe.ablation.grid import Cell, Kind, build_grid
from probe.ablation.interventions import Ablation, Context, MaskRenormalise, grid_kinds
from probe.ablation.metrics import CleanRun
from probe.analysis.coalitions import coalition_cells
from probe.examples.examples import Examples
from probe.runner import measure
from probe.vocabulary import METRICS
from tests.conftest import MODES, SOURCES
from tests.support.naive_probe import NaiveProbe, metrics

TASK = MQAR(num_pairs=4, vocab_size=40)
INPUTS = Examples.from_batch(TASK.batch("probe", range(6)))
CONDITIONS = [(s, m) for s in SOURCES for m in MODES]
SEED = 3


def grid(model: AttnResForCausalLM, kinds=("mask_renormalise",), **names) -> tuple[Cell, ...]:
    classes = [Ablation.known[kind] for kind in kinds]
    cells = [build_grid(model.model.sites, Kind(cls), families=cls.labels, **names) for cls in classes]
    return tuple(cell for part in cells for cell in part)


def probe(model, cells=None, inputs=INPUTS, positions=("all", "query"), **settings):
    return Engine(model, grid(model) if cells is None else cells, positions, seed=SEED, **settings).run(inputs)


def kinds_for(model) -> list[str]:
    return [kind for kind in grid_kinds() if kind != "increment" or model.config.attnres_source == "cumulative"]


def assert_equals_naive(model, cells, inputs=INPUTS, atol=1e-5, positions=("all", "query")) -> int:
    """Every cell of the engine against a full forward with loops; returns how many were compared."""
    result = probe(model, cells, inputs, positions, batch_size=4)
    labels = inputs.labels
    draws = np.stack(
        [
            np.random.default_rng((SEED, i)).random(
                (len(result.sites), max(s.num_sources for s in result.sites)), np.float32
            )
            for i in range(len(inputs))
        ]
    )
    naive = NaiveProbe(model, inputs.input_ids, labels, inputs.partners(SEED).tolist(), draws)
    values = [[[x for x in code if x >= 0] for code in codes] for codes in inputs.candidates.tolist()]
    clean, distractors = metrics(naive.logits, labels, values, None)
    queries = inputs.starts.sum(1).numpy()

    def mean_by_sequence(per_query) -> np.ndarray:
        rows = [[value for (b, _), value in per_query.items() if b == row] for row in range(len(labels))]
        return np.array([np.mean(row) for row in rows])

    names = [name for name in METRICS if name != "kl"]
    for name in names:
        np.testing.assert_allclose(result.clean[name] / queries, mean_by_sequence(clean[name]), atol=atol)
    for (index, where), effects in result.effects.items():
        cell = result.cells[index]
        mask = torch.ones_like(labels, dtype=torch.bool) if where == "all" else labels != IGNORE_INDEX
        about = (cell.families, cell.reads, mask, cell.with_aliases, cell.route.sublayer)
        logits = naive.logits_under(cell.intervention.kind, *about)
        ablated, _ = metrics(logits, labels, values, distractors)
        for name in names:
            change = mean_by_sequence(ablated[name]) - mean_by_sequence(clean[name])
            np.testing.assert_allclose(effects[name] / queries, change, atol=atol, err_msg=f"{cell} {where} {name}")
        p, q = naive.logits.double().log_softmax(-1), logits.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        expected = [float(kl[b][labels[b] != IGNORE_INDEX].sum() / queries[b]) for b in range(len(labels))]
        np.testing.assert_allclose(effects["kl"] / queries, expected, atol=atol, err_msg=f"{cell} {where} kl")
    return len(result.effects)


@pytest.mark.parametrize(("source", "mode"), CONDITIONS)
def test_masking_equals_a_naive_full_forward_at_every_scope(make_model, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode, num_hidden_layers=3, attnres_num_blocks=2)
    few = (source, mode) == ("delta_block", "block")  # two blocks have at most two sources
    assert assert_equals_naive(model, grid(model)) >= (20 if few else 50)


@pytest.mark.parametrize("kind", [*grid_kinds(), "coalition"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_equals_a_naive_full_forward(make_model, source, kind):
    if source != "cumulative" and kind == "increment":
        return  # refused, see below
    model = make_model(attnres_source=source, num_hidden_layers=4, attnres_num_blocks=2)
    scopes = ("late", "all", "layer:0", "layer:2", *(("final",) if source == "block_sum" else ()))
    if kind == "coalition":
        cells = coalition_cells(model.model.sites, ["self_attn", "both"], ["all", "late"])
    else:
        cells = grid(model, [kind], scopes=scopes, with_aliases=(False, True))
    assert assert_equals_naive(model, cells) > 10


@pytest.mark.parametrize("kind", ["keep_only", "keep_random", "silence", "rescue"])
@pytest.mark.parametrize(("source", "mode"), [condition for condition in CONDITIONS if condition[1] == "full"])
def test_keeping_equals_a_naive_full_forward_where_each_write_is_a_source(make_model, source, mode, kind):
    model = make_model(attnres_source=source, attnres_mode=mode, num_hidden_layers=3, attnres_num_blocks=2)
    scopes = ("early", "late", "all", "layer:1", *(("final",) if source == "block_sum" else ()))
    cells = grid(model, [kind], scopes=scopes, sublayers=["mlp", "both"], with_aliases=(False, True))
    inputs = INPUTS.take(range(4))
    assert assert_equals_naive(model, cells, inputs) >= (24 if kind == "silence" else 40)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_trained_models_too(trained_model, source):
    """All kinds and all scopes on a model that has learned something."""
    model = trained_model(source)
    inputs = Examples.from_batch(trained_model.task.batch("probe", range(4)))
    cells = grid(model, kinds_for(model), sublayers=["self_attn", "mlp"])
    assert assert_equals_naive(model, cells, inputs) > 150


def many_token_inputs(num_sequences: int = 5) -> Examples:
    """Random tokens with two questions each, of answers of two and three tokens; values share tokens as they come."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(num_sequences):
        ids = torch.randint(8, 40, (11,), generator=generator)
        a, b, c, d, e, f = torch.randperm(8, generator=generator)[:6].tolist()
        codes = [[a, b], [a, c, d], [a, c, e], [d, b], [b, a, c], [c, f]]
        labels = torch.full((11,), IGNORE_INDEX)
        for position, answer in ((3, codes[0]), (7, codes[1])):
            labels[position : position + len(answer)] = torch.tensor(answer)
            ids[position + 1 : position + len(answer)] = torch.tensor(answer[:-1])
        rows.append((ids, labels, torch.tensor([code + [-1] * (3 - len(code)) for code in codes])))
    return Examples.collate(rows)


@pytest.mark.parametrize("source", SOURCES)
def test_answers_of_several_tokens(make_model, source):
    model = make_model(attnres_source=source)
    cells = grid(
        model,
        ["mask_renormalise", "patch_weights", "keep_only"],
        scopes=("late", "layer:0"),
        sublayers=["self_attn", "mlp"],
    )
    assert assert_equals_naive(model, cells, many_token_inputs(3)) > 20


def test_answers_of_several_tokens_do_not_depend_on_batching(make_model, monkeypatch):
    """Also where logits are made a few positions at a time, so that answers are cut in two."""
    model, inputs = make_model(), many_token_inputs()
    cells = grid(model, scopes=["all", "layer:1"])
    whole = probe(model, cells, inputs)
    assert whole.counts.tolist() == [2] * 5
    monkeypatch.setattr("probe.ablation.metrics.LOGITS_PER_PASS", 1)
    other = probe(model, cells, inputs, batch_size=2)
    for key, effects in whole.effects.items():
        for metric in METRICS:
            np.testing.assert_allclose(effects[metric], other.effects[key][metric], atol=2e-5)


def test_an_answer_of_several_tokens_is_worth_its_tokens(make_model):
    """NLL and KL: those of its tokens asked for one by one; logit difference: that of its decisive token alone.

    In exact and in linear effects."""
    model, inputs = make_model(), many_token_inputs()
    cells = (
        *grid(model, scopes=["all", "layer:1"]),
        *build_grid(model.model.sites, Kind(MaskRenormalise, integrated=True)),
    )
    together = probe(model, cells, inputs, positions=("all",))
    values = inputs.labels[inputs.queries]
    one_by_one = replace(inputs, candidates=values.view(5, 5, 1), starts=inputs.queries)
    logits = model(inputs.input_ids).logits.detach()[inputs.queries]
    run = CleanRun.from_logits(logits, values, inputs.rivals, inputs.answer_rows)
    decisive = []
    for question in range(2):
        rows = []
        for b, row in enumerate(run.decisive_rows.view(5, 2)[:, question].tolist()):
            labels = torch.full((11,), IGNORE_INDEX)
            labels[inputs.queries[b].nonzero()[row - 5 * b]] = run.answers[row]
            rows.append((inputs.input_ids[b], labels, torch.stack((run.answers[row], run.distractors[row]))))
        decisive.append(probe(model, cells, Examples.collate(rows), positions=("all",)))
    alone = probe(model, cells, one_by_one, positions=("all",))
    assert (run.decisive_rows != run.answer_rows[:, 0]).any()
    for key, effects in together.effects.items():
        for metric in {"nll", "kl"} & effects.keys():
            np.testing.assert_allclose(effects[metric], alone.effects[key][metric], atol=1e-5)
        expected = sum(part.effects[key]["logit_diff"] for part in decisive)
        np.testing.assert_allclose(effects["logit_diff"], expected, atol=1e-5)


def test_sliding_window_layers(make_model):
    """Keys and values reused from the clean run must not be those that a window has let go."""
    model = make_model(
        **{"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "num_hidden_layers": 3},
    )
    assert "sliding_attention" in model.config.layer_types
    full = probe(model, positions=("query",))
    states = [
        model(INPUTS.input_ids, intervention=cell.ablation(Context(INPUTS.queries))).logits[INPUTS.queries].detach()
        for cell in full.cells
    ]
    clean = model(INPUTS.input_ids).logits[INPUTS.queries].detach()
    answers = INPUTS.labels[INPUTS.queries]
    for (index, _), effects in full.effects.items():
        nll = torch.nn.functional.cross_entropy(states[index], answers, reduction="sum")
        change = nll - torch.nn.functional.cross_entropy(clean, answers, reduction="sum")
        assert effects["nll"].sum() == pytest.approx(float(change), abs=1e-4)


def test_effects_do_not_depend_on_batching(make_model):
    model = make_model()
    cells = grid(model, kinds_for(model), scopes=["all", "late", "layer:1"])
    whole = probe(model, cells)
    for settings in ({"batch_size": 4}, {"tokens_per_pass": 1}, {"batch_size": 2, "tokens_per_pass": 10**6}):
        other = probe(model, cells, **settings)
        assert whole.effects.keys() == other.effects.keys()
        for key, effects in whole.effects.items():
            for metric in METRICS:
                np.testing.assert_allclose(effects[metric], other.effects[key][metric], atol=2e-5)
        np.testing.assert_allclose(whole.routing.mass["all"], other.routing.mass["all"], atol=1e-6)
        for key, dose in whole.routing.dose.items():
            np.testing.assert_allclose(dose, other.routing.dose[key], atol=1e-3)


def test_sequences_of_different_lengths(make_model):
    """Padding changes nothing: the same numbers as sequence by sequence, for kinds that need partners and means too."""
    model = make_model()
    parts = [TASK.batch("probe", range(4), pairs) for pairs in (2, 4, 3)]
    rows = [(part.input_ids[i], part.labels[i], part.values[i]) for part in parts for i in range(len(part.keys))]
    inputs = Examples.collate(rows)
    assert inputs.lengths.tolist() == [6] * 4 + [12] * 4 + [9] * 4
    cells = grid(
        model,
        [k for k in kinds_for(model) if Ablation.known[k].needs is None],
        scopes=["all", "layer:2"],
    )
    together = probe(model, cells, inputs, batch_size=12)
    for first, part in zip((0, 4, 8), parts, strict=True):
        alone = probe(model, cells, Examples.from_batch(part))
        for key, effects in alone.effects.items():
            for metric in METRICS:
                np.testing.assert_allclose(together.effects[key][metric][first : first + 4], effects[metric], atol=1e-5)
        np.testing.assert_allclose(
            together.routing.mass["all"][first : first + 4], alone.routing.mass["all"], atol=1e-6
        )
    everything = probe(model, grid(model, ["mean", "resample", "patch_weights"], scopes=["all"]), inputs)
    assert all(np.isfinite(effects["nll"]).all() for effects in everything.effects.values())
    partners = inputs.partners(0)
    assert (inputs.lengths[partners] == inputs.lengths).all()
    assert sorted(partners) == list(range(12))
    assert (partners != np.arange(12)).all()


def test_a_sequence_without_a_partner_is_named():
    rows = [
        (part.input_ids[0], part.labels[0], part.values[0]) for part in (TASK.batch("probe", [0], p) for p in (2, 3))
    ]
    with pytest.raises(ValueError, match="sequence 0 has no partner"):
        Examples.collate(rows).partners()


@pytest.mark.parametrize(
    ("labels", "candidates", "message"),
    [
        ([-100, -100], [1, 2], "at least one answer"),
        ([-100, 3], [1, 2], "hold every answer"),
        ([3], [3, 4], "as long"),
        ([-100, 3], [3, 3], "one value more"),
        ([3, 4], [[3, 5], [4, 3]], "hold every answer"),
        ([-100, 3], [[3, 4], [5, 6]], "hold every answer"),
        ([-100, 3], [[3, -1], [3, 4]], "no candidate may be the beginning of another"),
    ],
)
def test_sequences_that_cannot_be_probed_are_named(labels, candidates, message):
    row = (torch.tensor([5, 6]), torch.tensor(labels), torch.tensor(candidates))
    with pytest.raises(ValueError, match=f"sequence 0: .*{message}"):
        Examples.collate([row])


def test_in_half_precision_the_engine_is_the_naive_loop_to_its_rounding(make_model):
    model = make_model().to(torch.bfloat16).requires_grad_(False)
    cells = grid(model, ["mask_renormalise", "zero"], scopes=["all", "layer:2"])
    result = probe(model, cells, positions=("all",))
    clean = model(INPUTS.input_ids).logits[INPUTS.queries].float()
    run = CleanRun.from_logits(clean, INPUTS.labels[INPUTS.queries], INPUTS.rivals)
    for (index, _), effects in result.effects.items():
        cell = result.cells[index]
        logits = model(INPUTS.input_ids, intervention=cell.ablation()).logits[INPUTS.queries]
        change = (run.metrics(logits)["nll"] - run.metrics()["nll"]).sum()
        assert effects["nll"].sum() == pytest.approx(float(change), abs=0.15)
        assert np.isfinite(effects["kl"]).all()


def test_less_is_run_than_one_forward_per_ablation(make_model):
    result = probe(make_model(num_hidden_layers=6, attnres_num_blocks=3))
    assert 1 < result.forward_passes < 0.5 * len(result.effects)
    assert result.forward_passes_saved == pytest.approx(len(result.effects) - result.forward_passes)


def test_progress_reaches_its_total(make_model):
    seen: list[tuple[int, int]] = []
    probe(make_model(), batch_size=4, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_kind_that_means_nothing_on_a_model_is_refused(make_model):
    model = make_model(attnres_source="block_sum")
    with pytest.raises(ValueError, match="'increment' is for cumulative sources; this model's are block_sum"):
        Engine(model, grid(model, ["increment"]))


def test_metrics_of_a_run_against_itself(make_model):
    model = make_model()
    with torch.no_grad():
        logits = model(INPUTS.input_ids).logits[INPUTS.queries]
    run = CleanRun.from_logits(logits, INPUTS.labels[INPUTS.queries], INPUTS.rivals)
    assert (run.distractors != run.answers).all()
    same = run.metrics(logits)
    assert same["kl"].abs().max() < 1e-6
    other = run.metrics(torch.randn_like(logits))
    assert (other["kl"] > 0).all()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"families": ["embeding"]}, "family 'embeding' does not exist; choose from embedding, current"),
        ({"sublayers": ["attention"]}, "sublayer 'attention' does not exist; choose from self_attn, mlp, both"),
        ({"scopes": ["layer:9"]}, "scope 'layer:9' does not exist; choose from early"),
    ],
)
def test_names_that_do_not_exist(make_model, grid, message):
    with pytest.raises(ValueError, match=message):
        build_grid(make_model().model.sites, Kind(MaskRenormalise), **grid)


def test_a_single_pair_cannot_be_probed(make_model):
    with pytest.raises(ValueError, match="num_pairs of at least 2"):
        measure(make_model(), Examples.from_batch(MQAR(num_pairs=1, vocab_size=40).batch("probe", range(2))))
