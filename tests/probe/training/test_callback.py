"""Probing must not perturb training, and must happen when the schedule says."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from attnres import read_sites
from attnres.tasks import MQAR
from probe import runner
from probe.analysis.effects import CELL_KEYS
from probe.files import tables as storage
from probe.settings import TrainingProbeSettings
from probe.training.callback import ProbeCallback, undisturbed
from train.recall.curriculum import CurriculumConfig
from train.recall.data import TaskDataModule
from train.recall.module import RetrievalModule
from train.run.callbacks import CurriculumCallback

STEPS = 120
TASK = MQAR(num_pairs=4, vocab_size=32)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "attnres_num_blocks": 3,
}


class Losses(Callback):
    """Every step's loss and a draw from each random stream, to the bit."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float, float]] = []
        self.modes: set[bool] = set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append((outputs["loss"].item(), torch.rand(()).item(), np.random.rand(), random.random()))  # noqa: NPY002
        self.modes.add(pl_module.model.training)


def probes(**settings) -> ProbeCallback:
    return ProbeCallback(TrainingProbeSettings(**settings))


def fit(directory: Path, probe: ProbeCallback | None, max_steps: int = STEPS, **model) -> Losses:
    seed_everything(0, verbose=False)
    module = RetrievalModule(**SHAPE, embedding_init_std=0.3, task=TASK, warmup_steps=5, **model)
    data = TaskDataModule(task=TASK, batch_size=32, num_validation_examples=64, curriculum=CurriculumConfig(kind="off"))
    losses = Losses()
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        val_check_interval=7,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[CurriculumCallback(), losses, *([probe] if probe else [])],
    )
    trainer.fit(module, data)
    return losses


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    callback = probes(
        every_n_steps=60,
        log_spaced=False,
        at_steps=[1, 8],
        accuracy_jump=0.03,
        num_resamples=50,
    )
    return directory, callback, fit(directory, callback)


def test_training_with_probes_is_bit_identical_to_training_without(probed, tmp_path):
    directory, callback, losses = probed
    steps = set(storage.read_effects(directory)["step"])
    jumps = {step for step in steps if not callback.schedule.names(step, STEPS)}
    assert jumps, "no probe was triggered by an accuracy jump"
    assert all(step % 7 == 0 for step in jumps)  # jumps are seen at validations
    assert losses.seen == fit(tmp_path, None).seen
    assert losses.modes == {True}


def test_the_table_has_every_scheduled_step(probed):
    directory, _, _ = probed
    effects = storage.read_effects(directory)
    steps = set(effects["step"])
    assert {0, 1, 8, 60, 120} <= steps
    scopes = effects.groupby("step")["scope"].agg(set)
    regions = {"early", "middle", "late", "all"}
    assert all(scopes[step] == regions for step in steps - {STEPS})
    assert scopes[STEPS] == {*regions, "layer:0", "layer:1", "layer:2"}
    assert effects["data_id"].nunique() == 1
    assert set(effects["n_sequences"]) == {256}  # the fewest that give 1,024 queries at 4 pairs
    assert set(effects["n_queries"]) == {1024}
    summary = json.loads((directory / "probe" / "summary.json").read_text())
    assert summary["step"] == STEPS
    assert summary["flip"]["n_queried"] > 0
    cost = summary["probe"]
    assert cost["n_probed"] == len(steps) - 1
    assert cost["fraction"] == pytest.approx(cost["in_training_seconds"] / cost["training_seconds"])
    assert min(cost[f"{name}_seconds"] for name in ("in_training", "training", "after_training")) > 0
    assert (cost["trail_seconds"], cost["n_of_trail"]) == (0, 0)
    assert summary["emergence"]["steps"] == sorted(steps)


def test_routing_is_uniform_at_step_zero(probed):
    """Queries start at zero and the bias too: each source of a read has the same weight."""
    directory, _, _ = probed
    effects = storage.read_effects(directory)
    first = effects[(effects["step"] == 0) & (effects["metric"] == "nll")].set_index(["sublayer", "scope", "family"])
    sites = read_sites(RetrievalModule(**SHAPE, task=TASK).model.config)
    for sublayer, region in itertools.product(("self_attn", "mlp"), ("early", "middle", "late")):
        reads = [site for site in sites if (site.sublayer, site.region) == (sublayer, region)]
        for family in ("embedding", "current", "prev_completed", "older"):
            expected = np.mean([site.families.count(family) / site.num_sources for site in reads])
            assert first.loc[(sublayer, region, family), "mass"] == pytest.approx(expected)


def test_a_vanilla_model_is_left_alone(tmp_path):
    fit(tmp_path, ProbeCallback(), max_steps=2, architecture="vanilla")
    assert not (tmp_path / "probe").exists()


def test_everything_comes_back_after_a_probe(make_model):
    model = make_model().train()
    model.model.layers[1].eval()  # a mixed mode has to survive too
    modes = [module.training for module in model.modules()]
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with undisturbed(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sequences": 10}, "num_sequences must be at least 64"),
        ({"families": ["embeding"]}, "family 'embeding' does not exist"),
        ({"positions": ["key"]}, "positions 'key' does not exist"),
        ({"every_n_steps": -1}, "every_n_steps must be at least 0, got -1"),
        ({"trail_probes": -1}, "trail_probes must be at least 0, got -1"),
        ({"settled_probes": 0}, "settled_probes must be at least 1, got 0"),
        ({"stop_when_settled": True, "mode": "integrated"}, "waits for motifs, which need exact"),
        ({"stop_when_settled": True, "scopes": ["early", "all"]}, "of early, middle and late"),
        ({"stop_when_settled": True, "positions": ["query"]}, "at all positions"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        probes(**options)


def test_too_few_queries_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="it must be at least 256"):
        fit(tmp_path, probes(num_sequences=64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scope", ["erly", "final", "layer:3"])
def test_scopes_that_the_model_lacks_are_refused_before_training(scope, tmp_path):
    with pytest.raises(
        ValueError, match=f"scope '{scope}' does not exist; choose from early, middle, late, all, layer:0"
    ):
        fit(tmp_path, probes(scopes=["early", scope]))
    assert not list(tmp_path.iterdir())


def test_scopes_without_reads_are_refused(make_model):
    message = "nothing to probe: a model of 2 layers has no read of self_attn, mlp in late"
    with pytest.raises(ValueError, match=message):
        probes(scopes=["late"]).check(MQAR(num_pairs=4, vocab_size=32), make_model(num_hidden_layers=2))


def test_integrated_probes_leave_training_alone_too(tmp_path):
    """Gradients are taken in the middle of training: no bit of it changes, none is left behind."""
    probe = probes(every_n_steps=3, accuracy_jump=0, mode="both", num_resamples=20, scopes=["late"])
    losses = fit(tmp_path / "probed", probe, max_steps=6)
    assert losses.seen == fit(tmp_path / "not", None, max_steps=6).seen
    effects = storage.read_effects(tmp_path / "probed")
    assert set(effects["kind"]) == {"mask_renormalise", "mask_renormalise_integrated"}
    assert set(effects["step"]) == {0, 1, 2, 3, 4, 6}
    scopes = effects.groupby(["step", "kind"])["scope"].agg(set)
    layers = {"early", "middle", "late", "all", "layer:0", "layer:1", "layer:2"}
    for step in (0, 3):
        assert scopes[step, "mask_renormalise"] == {"late"}
        assert scopes[step, "mask_renormalise_integrated"] == layers
    assert scopes[6, "mask_renormalise"] == scopes[6, "mask_renormalise_integrated"] == layers


def test_the_probe_after_training_is_exact_whatever_the_mode(tmp_path):
    callback = probes(every_n_steps=2, mode="integrated", num_resamples=20)
    fit(tmp_path, callback, max_steps=4)
    kinds = storage.read_effects(tmp_path).groupby("step")["kind"].agg(set)
    linear = "mask_renormalise_integrated"
    assert dict(kinds) == {0: {linear}, 1: {linear}, 2: {linear}, 4: {linear, "mask_renormalise"}}


def test_a_block_sum_model_is_probed_at_its_final_read_too(tmp_path):
    fit(tmp_path, probes(num_resamples=20), max_steps=1, attnres_source="block_sum")
    scopes = storage.read_effects(tmp_path).groupby("step")["scope"].agg(set)
    assert scopes[0] == {"early", "middle", "late", "all", "final"}
    assert scopes[1] == scopes[0] | {"layer:0", "layer:1", "layer:2"}


EVERY_4 = {"every_n_steps": 4, "log_spaced": False, "accuracy_jump": 0, "num_resamples": 20}


class TestSettled:
    """Motifs are planted in the summaries: what is tested is what happens then."""

    @pytest.fixture
    def motifs(self, monkeypatch):
        """One motif from step 8 on, and the task learned."""
        steps, probe_model = [], runner.probe_model

        def planted(*args, **kwargs):
            probe = probe_model(*args, **kwargs)
            steps.append(kwargs["step"])
            motif = {"sublayer": "self_attn", "scope": "late", "family": "older"}
            probe.summary["motifs"] = [motif] * (kwargs["step"] >= 8)
            probe.summary["clean"]["task_learned"] = True
            return probe

        monkeypatch.setattr("probe.training.shared.probe_model", planted)
        return steps

    def test_training_ends_when_they_are(self, motifs, tmp_path, caplog):
        callback = probes(**EVERY_4, stop_when_settled=True, settled_probes=3)
        with caplog.at_level("INFO"):
            losses = fit(tmp_path, callback, 40)
        assert len(losses.seen) == 16
        assert motifs == [0, 4, 8, 12, 16, 16]  # the last one whole
        effects = storage.read_effects(tmp_path)
        assert not effects.duplicated(CELL_KEYS).any()
        assert "layer:1" in set(effects.loc[effects["step"] == 16, "scope"])
        summary = json.loads((tmp_path / "probe" / "summary.json").read_text())
        assert (summary["step"], summary["probe"]["stopped_when_settled"]) == (16, 16)
        assert summary["probe"]["n_probed"] == 5
        assert "stopping at step 16 (probe.stop_when_settled)" in caplog.text
        assert "same at 3 probes in a row (older -> late attention)" in caplog.text

    @pytest.mark.slow
    def test_it_is_off_by_default(self, motifs, tmp_path):
        assert len(fit(tmp_path, probes(**EVERY_4), 28).seen) == 28
        summary = json.loads((tmp_path / "probe" / "summary.json").read_text())
        assert summary["probe"]["stopped_when_settled"] is None


def test_rows_of_later_steps_are_dropped(probed, tmp_path):
    shutil.copytree(probed[0] / "probe", tmp_path / "probe")
    steps = sorted(set(storage.read_effects(tmp_path)["step"]))
    paths = [tmp_path / "probe" / f"{name}.parquet" for name in ("effects", "clusters", "geometry")]
    before = {path: pd.read_parquet(path) for path in paths}
    for last in (60, 8, 8):
        storage.drop_steps_after(tmp_path / "probe", last)
        assert storage.probed_steps(tmp_path / "probe") == {step for step in steps if step <= last}
        for path, table in before.items():
            kept = table[table["step"] <= last].reset_index(drop=True)
            pd.testing.assert_frame_equal(pd.read_parquet(path), kept)
    storage.drop_steps_after(tmp_path / "nothing", 3)


def test_a_mode_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="mode 'linear' does not exist; choose from exact, integrated, both"):
        probes(mode="linear")
