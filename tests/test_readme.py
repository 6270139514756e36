"""The README's and the Makefile's commands do what they say, at a size that takes seconds."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from huggingface_hub import constants

from benchmarks.tables import TABLES
from tests.support.paths import ROOT

PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
TASK = ["--data.task.num_pairs", "4", "--data.task.vocab_size", "16", "--data.num_validation_examples", "8"]
TRAIN = ["--trainer.max_steps", "3", "--trainer.accelerator", "cpu", "--data.batch_size", "4", *TASK]
TRAIN += ["--model.hidden_size", "16", "--model.intermediate_size", "16", "--model.head_dim", "4"]
TRAIN += ["--model.num_hidden_layers", "4", "--model.attnres_num_blocks", "4", "--probe.num_resamples", "20"]
TRAIN += ["--trainer.val_check_interval", "1", "--trainer.log_every_n_steps", "1"]
PROBE = ["--num_sequences", "8", "--num_resamples", "20", "--device", "cpu"]


def small(command: str) -> list[str]:
    """The command with options appended that make it small."""
    program, *words = shlex.split(command)
    name = Path(program).name
    extra = {"fit": TRAIN, "estimate": TRAIN, "find_lr": [*TRAIN, "--num_steps", "20"], "run": PROBE, "baseline": PROBE}
    return [name, *words, *extra.get(words[0], [])]


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_names_only_targets_and_programs_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"demo", "test", "lint"} <= targets
    for command in readme_commands():
        words = shlex.split(command)
        known = words[0] == "make" and words[1] in targets
        assert known or Path(words[0]).name in ("attnres-train", "attnres-probe"), command
    assert {"make demo", "make test"} <= set(readme_commands())


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_wandb")
def test_readme_commands_run(tmp_path, monkeypatch):
    """In this process: that the programs start as processes of their own is tested below."""
    commands = [command for command in readme_commands() if "attnres-" in command]
    assert len(commands) >= 5
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        name, *words = small(command)
        assert not pkgutil.resolve_name(PROGRAMS[name])(words), command


@pytest.mark.slow
def test_make_demo_leaves_table_and_figures(tmp_path):
    """The demo's own command lines, end to end: train, probe through training, wrap, probe, report."""
    listed = subprocess.run(
        ["make", "--dry-run", "demo", "RUN=runs/demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = [line for line in listed.splitlines() if "attnres-" in line]
    assert len(commands) == 7
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}  # as for a newcomer
    for command in commands:
        name, *words = small(command)
        program = str(Path(sys.executable).parent / name)
        done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    report = done.stdout
    demo = tmp_path / "runs" / "demo"
    for line in ("cumulative (seed 0, step 3)", "block_sum (seed 0, step 3)", "wrapped (seed 0, step 3)"):
        assert line in report
    assert all(f"  {claim} " in report for claim in ("C1", "C2", "C3", "C4"))
    assert len(report.split("written:")[0].splitlines()) <= 26  # twenty of claims
    for file in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "hf/model.safetensors", "hf/task.json"):
        assert (demo / "cumulative" / file).is_file(), file
    for name in ("emergence", "heat_maps", "heat_maps_peak"):
        for suffix in ("png", "pdf"):
            path = demo / "cumulative" / "figures" / f"{name}.{suffix}"
            assert path.stat().st_size > 5_000
            assert str(path.relative_to(tmp_path)) in report
    effects = pd.read_parquet(demo / "cumulative" / "probe" / "effects.parquet")
    assert set(effects["step"]) == {0, 2, 3}
    assert list((demo / "cumulative" / "wandb").glob("offline-run-*/*.wandb"))
    final = pd.read_parquet(demo / "cumulative" / "probe" / "final" / "effects.parquet")
    wrapped = pd.read_parquet(demo / "wrapped" / "probe" / "effects.parquet")
    assert set(final["data_id"]) == set(wrapped["data_id"])  # paired: the same examples


@pytest.mark.parametrize("page", TABLES)
def test_documented_shares_are_the_recorded_ones(page):
    documented = (ROOT / "docs" / page).read_text().splitlines()
    for table in TABLES[page]:
        recorded = table()
        assert recorded
        start = documented.index(recorded[0])
        assert documented[start : start + len(recorded)] == recorded  # as a whole, and in order
        assert documented[start + len(recorded)] == ""


def test_the_study_probes_as_the_demo_does():
    makefile = (ROOT / "Makefile").read_text()
    study = yaml.safe_load((ROOT / "configs/study.yaml").read_text())
    (probe,) = re.findall(r"^PROBE := (.*)", makefile, re.M)
    assert shlex.split(probe) == shlex.split(study["probe"])
    assert f"baseline $(RUN)/vanilla {study['baseline']} " in makefile


@pytest.mark.parametrize("page", ["README.md", "docs/attnres.md"])
def test_python_of_the_documentation_runs(make_model, make_vanilla, make_hub, tmp_path, page, monkeypatch, capsys):
    make_model(num_hidden_layers=8, attnres_num_blocks=4, vocab_size=256).save_pretrained(
        tmp_path / "runs" / "mine" / "hf"
    )
    make_vanilla(num_hidden_layers=8).save_pretrained(tmp_path / "runs" / "vanilla" / "hf")
    cache = make_hub(make_vanilla(num_hidden_layers=8), "Qwen/Qwen3-0.6B")["HF_HUB_CACHE"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    exec("\n".join(["import torch", "input_ids = torch.arange(12).view(2, 6)", *blocks]), {})
    assert "embedding" in capsys.readouterr().out
