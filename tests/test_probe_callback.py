"""Probing must not perturb training, and must happen when the schedule says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from attnres import read_sites
from probe import storage
from probe.callback import ProbeCallback, undisturbed
from train.callbacks import CurriculumCallback
from train.curriculum import CurriculumConfig
from train.data import MQARDataModule
from train.module import RetrievalModule

STEPS = 120
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


def fit(directory: Path, probe: ProbeCallback | None, max_steps: int = STEPS, **model) -> Losses:
    seed_everything(0, verbose=False)
    module = RetrievalModule(**SHAPE, embedding_init_std=0.3, num_pairs=4, vocab_size=32, warmup_steps=5, **model)
    data = MQARDataModule(
        num_pairs=4, vocab_size=32, batch_size=32, num_validation_examples=64, curriculum=CurriculumConfig(kind="off")
    )
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
    callback = ProbeCallback(every_n_steps=60, log_spaced=False, at_steps=[1, 8], accuracy_jump=0.03, num_resamples=50)
    return directory, callback, fit(directory, callback)


def test_training_with_probes_is_bit_identical_to_training_without(probed, tmp_path):
    directory, callback, losses = probed
    steps = set(storage.read_effects(directory)["step"])
    jumps = {step for step in steps if not callback.is_scheduled(step, STEPS)}
    assert jumps, "no probe was triggered by an accuracy jump"
    assert all(step % 7 == 0 for step in jumps)  # jumps are seen at validations
    assert losses.seen == fit(tmp_path, None).seen
    assert losses.modes == {True}


def test_the_table_has_every_scheduled_step(probed):
    directory, _, _ = probed
    effects = storage.read_effects(directory)
    steps = set(effects["step"])
    assert {0, 1, 8, 60, 120} <= steps
    cells = effects.groupby("step").size()
    assert cells.nunique() == 1
    assert effects["data_id"].nunique() == 1
    assert set(effects["n_sequences"]) == {256}  # the fewest that give 1,024 queries at 4 pairs
    assert set(effects["n_queries"]) == {1024}
    summary = json.loads((directory / "probe" / "summary.json").read_text())
    assert summary["step"] == STEPS
    assert summary["probe"]["in_training_seconds"] > 0
    assert summary["probe"]["training_seconds"] > 0


def test_routing_is_uniform_at_step_zero(probed):
    """Queries start at zero and the bias too: each source of a read has the same weight."""
    directory, _, _ = probed
    effects = storage.read_effects(directory)
    first = effects[(effects["step"] == 0) & (effects["metric"] == "nll")].set_index(["sublayer", "scope", "family"])
    module = RetrievalModule(**SHAPE, num_pairs=4, vocab_size=32)
    for site in read_sites(module.model.config):
        for family in ("embedding", "current", "prev_completed", "older"):
            expected = site.families.count(family) / site.num_sources
            assert first.loc[(site.sublayer, f"layer:{site.layer_idx}", family), "mass"] == pytest.approx(expected)


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
    ("options", "expected"),
    [
        ({"every_n_steps": 0, "log_spaced": False}, {0, 20}),
        ({"every_n_steps": 8, "log_spaced": False}, {0, 8, 16, 20}),
        ({"every_n_steps": 0}, {0, 1, 2, 4, 8, 16, 20}),
        ({"every_n_steps": 0, "log_spaced": False, "at_steps": [3, 5]}, {0, 3, 5, 20}),
    ],
)
def test_schedule(options, expected):
    callback = ProbeCallback(**options)
    assert {step for step in range(21) if callback.is_scheduled(step, 20)} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sequences": 10}, "num_sequences must be at least 64"),
        ({"families": ["embeding"]}, "family 'embeding' does not exist"),
        ({"positions": ["key"]}, "positions 'key' does not exist"),
        ({"every_n_steps": -1}, "every_n_steps must not be negative"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ProbeCallback(**options)


def test_too_few_queries_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="it must be at least 256"):
        fit(tmp_path, ProbeCallback(num_sequences=64))
    assert not list(tmp_path.iterdir())


def test_first_order_probes_leave_training_alone_too(tmp_path):
    """Gradients are taken in the middle of training: no bit of it changes, none is left behind."""
    probe = ProbeCallback(every_n_steps=3, accuracy_jump=0, mode="both", num_resamples=20)
    losses = fit(tmp_path / "probed", probe, max_steps=6)
    assert losses.seen == fit(tmp_path / "not", None, max_steps=6).seen
    effects = storage.read_effects(tmp_path / "probed")
    assert set(effects["kind"]) == {"mask_renormalise", "mask_renormalise_first_order"}
    assert set(effects["step"]) == {0, 1, 2, 3, 4, 6}


def test_a_mode_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="mode must be one of exact, first_order, both, got 'linear'"):
        ProbeCallback(mode="linear")
