"""What a run records of itself: every start, the code it ran, the hardware; and nothing about the person."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import wandb
from packaging.requirements import Requirement

from attnres import versions
from attnres.versions import code_version, package_versions
from tests.support.paths import ROOT
from tests.train.cli.test_fit import fit
from train.loggers import wandb_files
from train.run import provenance

pytestmark = pytest.mark.usefixtures("quiet_wandb")


def segments(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "provenance.json").read_text())["segments"]


def test_a_run_records_its_start(tmp_path, monkeypatch):
    command = ["/usr/bin/attnres-train", "fit", "--config", "configs/demo.yaml"]
    monkeypatch.setattr(sys, "argv", command)
    (segment,) = segments(fit(tmp_path / "run", "--trainer.max_steps=1", "--seed_everything=7"))
    assert (segment["from_step"], segment["seed"]) == (0, 7)
    assert segment["command"] == ["attnres-train", *command[1:]]
    assert segment["code"] == code_version()
    assert segment["versions"] == package_versions()
    assert segment["python"] == sys.version.split()[0]
    assert segment["hardware"]["threads"] == torch.get_num_threads()
    assert segment["hardware"]["usable_cores"] <= segment["hardware"]["cores"] == os.cpu_count()
    assert segment["hardware"]["cpu"]
    assert 2**29 < segment["hardware"]["memory_bytes"] < 2**45
    assert len(segment["hardware"]["gpus"]) == torch.cuda.device_count()
    assert segment["devices"]["world_size"] == segment["devices"]["num_nodes"] == 1
    assert segment["devices"]["accelerator"] == "CPUAccelerator"
    assert segment["started"].endswith("+00:00")


def test_a_run_resumed_on_other_code_shows_both(tmp_path, monkeypatch):
    first = segments(fit(tmp_path / "run", "--trainer.max_steps=2"))
    monkeypatch.setattr(provenance, "code_version", lambda: {"commit": "another"})
    both = segments(fit(tmp_path / "run", "--trainer.max_steps=4", "--ckpt_path=last"))
    assert both[0] == first[0]
    assert [segment["from_step"] for segment in both] == [0, 2]
    assert both[0]["code"] == code_version()
    assert both[1]["code"] == {"commit": "another"}


def test_a_run_that_was_killed_early_starts_anew_and_shows_both(tmp_path):
    run = fit(tmp_path / "run", "--trainer.max_steps=1", "--trainer.logger=false")
    (run / "hf/attnres_run.json").unlink()  # as if killed in the export: nothing to go on from
    (run / "checkpoints/last.ckpt").unlink()
    (run / "provenance.json.part").touch()
    fit(run, "--trainer.max_steps=1", "--ckpt_path=last")
    assert [segment["from_step"] for segment in segments(run)] == [0, 0]


def test_the_configuration_is_hashed_wherever_the_run_lies(tmp_path):
    texts = {
        "one": "seed_everything: 0\nrun_dir: a\nckpt_path: null\nmodel:\n  hidden_size: 8\n",
        "moved": "model: {hidden_size: 8}\nckpt_path: last\nrun_dir: b\nseed_everything: 0\n",
        "seed": "seed_everything: 1\nrun_dir: a\nckpt_path: null\nmodel:\n  hidden_size: 8\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    one, moved, seed = (provenance.config_hash(tmp_path / name) for name in texts)
    assert one == moved != seed


def test_nothing_about_the_person_is_recorded(tmp_path, monkeypatch):
    home = tmp_path / "home" / "somebody"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    monkeypatch.setattr("socket.gethostname", lambda: "somebodys-laptop")
    files = [f"--config={home / 'a.yaml'}", str(home / "runs" / "b"), "--x=~/c.yaml", "~somebody/d"]
    monkeypatch.setattr(sys, "argv", [str(home / "bin" / "attnres-train"), "fit", *files])
    run = fit(home / "runs" / "mine", "--trainer.max_steps=1")
    text = (run / "provenance.json").read_text()
    assert "somebody" not in text
    assert "s3cret" not in text
    assert str(tmp_path) not in text
    assert segments(run)[0]["command"][2:] == ["--config=.../a.yaml", ".../b", "--x=.../c.yaml", ".../d"]


ARGUMENTS = {
    "inside the working directory": ("--config={cwd}/configs/a.yaml", "--config=configs/a.yaml"),
    "relative": ("runs/b", "runs/b"),
    "outside": ("--x=/else/where/c", "--x=.../c"),
    "a number": ("1e-3", "1e-3"),
    "up and away": ("../../home/somebody/secret/a.yaml", ".../a.yaml"),
    "an option's, up and away": ("--run_dir=../../home/somebody/r", "--run_dir=.../r"),
    "through the working directory": ("--x=runs/../../somebody/r", "--x=.../r"),
    "in a mapping": ("--data={x: /home/somebody/q}", "--data={x: .../q}"),
    "in a list": ("--x=['/home/somebody/q','~somebody/r', 3]", "--x=['.../q','.../r', 3]"),
    "with blanks": ("--x=/home/some body/of us/q", "--x=.../q"),
    "two in a row": ("--x=a /home/somebody/q ../somebody/r", "--x=a .../q .../r"),
    "no path": ("--probe.kinds=[a, b]", "--probe.kinds=[a, b]"),
}


@pytest.mark.parametrize(("given", "recorded"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_only_paths_inside_the_working_directory_are_recorded(given, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = given.replace("{cwd}", str(tmp_path))
    assert provenance.describe_command(["attnres-train", given]) == ["attnres-train", recorded]


def test_wandb_holds_the_same_record(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = fit(tmp_path / "run", "--trainer.max_steps=1")
    wandb.teardown()  # a process of W&B's writes the file, and may still be at it
    (file,) = (path for path in run.glob(wandb_files.FILES) if not path.parent.is_symlink())
    configs = [record.config for record in wandb_files.records(file) if record.HasField("config")]
    told = {item.key: json.loads(item.value_json) for config in configs for item in config.update}
    assert told["provenance"]["segments"] == segments(run)


def test_versions_are_of_everything_that_is_depended_on():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {Requirement(text).name for text in dependencies}
    assert package_versions() == {name: version(name) for name in {"attnres", *names}}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A git checkout of packages of ours; `code_version` is asked anew each time."""
    root = tmp_path / "checkout"
    for package in versions.PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text(f"# {package}\n")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=first")
    return root


def code_of(root: Path) -> dict:
    return code_version.__wrapped__(root)


def test_code_is_named_by_its_commit_and_by_its_content(checkout, monkeypatch):
    clean = code_of(checkout)
    assert clean["commit"] == git(checkout, "rev-parse", "HEAD")
    assert clean["dirty"] is False
    (checkout / "notes.txt").write_text("not code")
    assert code_of(checkout) == clean
    (checkout / "probe" / "new.py").write_text("x = 1\n")  # not even added
    dirty = code_of(checkout)
    assert (dirty["commit"], dirty["dirty"]) == (clean["commit"], True)
    assert dirty["sources_sha256"] != clean["sources_sha256"]
    (checkout / "probe" / "new.py").rename(checkout / "probe" / "renamed.py")
    assert code_of(checkout)["sources_sha256"] not in (clean["sources_sha256"], dirty["sources_sha256"])
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of another repository
    assert code_of(checkout)["commit"] == clean["commit"]


def test_code_without_a_checkout_says_why(checkout, monkeypatch):
    before = code_of(checkout)
    installed = checkout / ".venv" / "site-packages"  # a checkout, but not of this code
    for package in versions.PACKAGES:
        (installed / package).mkdir(parents=True)
        (installed / package / "__init__.py").write_text(f"# {package}\n")
    found = code_of(installed)
    assert found["sources_sha256"] == before["sources_sha256"]  # the same code
    assert (found["commit"], found["dirty"]) == (None, None)
    assert found["why_no_commit"] == "the code is not in a git checkout of its own"
    monkeypatch.setenv("PATH", "")
    assert code_of(checkout)["why_no_commit"] == "git is not installed"


def test_a_run_with_a_record_of_another_shape_does_not_go_on(tmp_path, capsys):
    run = fit(tmp_path / "run", "--trainer.max_steps=1", "--trainer.logger=false")
    (run / "provenance.json").write_text("{}")
    for message in ("is not what was written", "must hold a list of segments, got None"):
        with pytest.raises(SystemExit) as stopped:
            fit(run, "--trainer.max_steps=2", "--ckpt_path=last", "--trainer.logger=false")
        assert stopped.value.code == 2
        assert f"provenance.json {message}" in capsys.readouterr().err.splitlines()[-1]
        assert (run / "provenance.json").read_text() == "{}"
        (run / "manifest.json").unlink(missing_ok=True)  # as in a run of an older version
