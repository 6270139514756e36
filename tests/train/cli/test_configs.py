"""The configurations in configs/: each runs, at a size that takes seconds, and comes back from a run's config.yaml."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from attnres import AttnResForCausalLM
from attnres.tasks import MQAR
from tests.support.paths import ROOT
from tests.train.cli.test_fit import TINY
from train.cli import main
from train.recall.module import RetrievalModule
from train.recall.optim import RoutingLearningRates

pytestmark = pytest.mark.usefixtures("quiet_wandb")

FOLDER = ROOT / "configs"
STUDIES = [
    *FOLDER.glob("*study.yaml"),
    FOLDER / "additive.yaml",
    FOLDER / "motifs.yaml",
    FOLDER / "sweep.yaml",
]  # of many runs: tests/train/study
SIZES = sorted(set(FOLDER.glob("*.yaml")) - set(STUDIES))
CONDITIONS = sorted((FOLDER / "conditions").glob("*.yaml"))
LAUNCH = sorted((FOLDER / "launch").glob("*.yaml"))  # those for several devices run in test_train_ddp
PARAMETERS = {"20m": (19e6, 21e6), "100m": (95e6, 105e6), "0.6b": (596e6, 597e6)}
OF_RECALL = ("--data.task.num_pairs", "--data.task.vocab_size")
SMALL = [*TINY, "--trainer.max_steps=2", "--trainer.precision=32-true", "--data.num_workers=0"]

stem = pytest.mark.parametrize("config", SIZES, ids=lambda path: path.stem)


def settings(run: Path) -> dict:
    """What a run did, but for where."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["run_dir"]
    return config


@stem
@pytest.mark.parametrize(
    "condition",
    [None, *(pytest.param(path, marks=pytest.mark.slow) for path in CONDITIONS)],
    ids=lambda path: path.stem if path else "as it is",
)
def test_it_runs_and_comes_back_from_the_saved_configuration(config, condition, tmp_path):
    files = [f"--config={path}" for path in (config, condition) if path]
    task = yaml.safe_load(config.read_text())["data"]["task"]["class_path"]
    options = [option for option in SMALL if "MQAR" in task or not option.startswith(OF_RECALL)]
    main(["fit", *files, f"--run_dir={tmp_path / 'run'}", *options])
    main(["fit", f"--config={tmp_path / 'run' / 'config.yaml'}", f"--run_dir={tmp_path / 'again'}"])
    assert settings(tmp_path / "run") == settings(tmp_path / "again")
    first, second = ((tmp_path / name / "hf/model.safetensors").read_bytes() for name in ("run", "again"))
    assert first == second
    if condition:
        saved = settings(tmp_path / "run")["model"]
        for key, value in yaml.safe_load(condition.read_text())["model"].items():
            assert saved[key] == value


def test_the_full_sizes_are_what_their_names_say():
    for name, (least, most) in PARAMETERS.items():
        content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        options = {**content["model"], "betas": tuple(content["model"]["betas"])}
        options["routing_learning_rates"] = RoutingLearningRates(**options["routing_learning_rates"])
        with torch.device("meta"):
            module = RetrievalModule(**options, task=MQAR(64, content["data"]["task"]["init_args"]["vocab_size"]))
        model = module.model
        assert isinstance(model, AttnResForCausalLM)
        routing = sum(parameter.numel() for parameter in model.routing_parameters().values())
        assert least <= sum(parameter.numel() for parameter in model.parameters()) - routing <= most, name


def test_06b_is_qwen3s_shape():
    """Hidden size, heads and so on of Qwen3-0.6B."""
    model = yaml.safe_load((FOLDER / "0.6b.yaml").read_text())["model"]
    data = yaml.safe_load((FOLDER / "0.6b.yaml").read_text())["data"]
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    shape |= {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "attnres_num_blocks": 8}
    assert {key: model[key] for key in shape} == shape
    assert data["task"]["init_args"]["vocab_size"] == 151936


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_launch_file_for_one_says_so(tmp_path, capsys):
    files = [f"--config={FOLDER / name}" for name in ("demo.yaml", "launch/one_gpu.yaml")]
    with pytest.raises(SystemExit):
        main(["fit", *files, f"--run_dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "trainer.accelerator is gpu, and there is none here" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_launch_scripts_can_be_started(script):
    assert os.access(FOLDER / "launch" / script, os.X_OK)


@pytest.mark.parametrize("config", [*SIZES, *CONDITIONS, *LAUNCH, *STUDIES], ids=lambda path: path.stem)
def test_every_key_is_commented(config):
    assert yaml.safe_load(config.read_text())
    lines = [line for line in config.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert [line for line in lines if "#" not in line and not re.fullmatch(r"\s*\w+:", line)] == []
