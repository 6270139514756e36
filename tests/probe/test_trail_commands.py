"""`attnres-probe trail`, `prune` and `export`: what they leave, and what they say to bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from probe.cli import main
from probe.files.layout import PROBE
from probe.files.tables import probed_steps, read_effects
from probe.files.trail import Trail
from tests.probe.training.test_trail import STEPS, write

CONFIG = """
trainer: {max_steps: 32}
trail: {every_n_steps: 1}
probe:
  num_sequences: 64
  num_resamples: 20
  families: [embedding]
  sublayers: [mlp]
  trail_probes: 6
"""


@pytest.fixture
def run(tmp_path, trained_model) -> Path:
    run = tmp_path / "run"
    write(run, STEPS, trained_model()).finish(STEPS[-1])
    (run / "config.yaml").write_text(CONFIG)
    return run


def test_a_trail_is_probed_pruned_and_exported(run, tmp_path, capsys):
    main(["trail", str(run), "--device", "cpu"])
    said = capsys.readouterr().err
    assert "probed step 0: accuracy 0." in said
    assert "6 of 33 steps are probed, 6 of them now" in said
    assert "When motifs emerge" in said
    main(["trail", str(run), "--num_probes", "8", "--device", "cpu", "--watch"])
    assert "8 of 33 steps are probed, 2 of them now" in capsys.readouterr().err
    probed = probed_steps(run / PROBE)
    assert len(probed) == 8

    main(["prune", str(run)])
    assert "8 steps are left, 25 were removed" in capsys.readouterr().err
    assert set(Trail(run).steps) == probed
    main(["trail", str(run), "--num_probes", "100", "--device", "cpu"])
    assert "8 of 8 steps are probed, 0 of them now" in capsys.readouterr().err

    step = sorted(probed)[3]
    main(["export", str(run), str(step), str(tmp_path / "exported")])
    main(
        [
            "run",
            str(tmp_path / "exported"),
            "--output",
            str(tmp_path / "out"),
            "--num_sequences=8",
            "--num_resamples=20",
        ]
    )
    about = read_effects(tmp_path / "out").iloc[0]
    assert (about["step"], about["seed"], about["condition"]) == (step, 5, "cumulative")
    main(
        [
            "run",
            str(Trail(run).folder_of(step)),
            "--output",
            str(tmp_path / "same"),
            "--num_sequences=8",
            "--num_resamples=20",
        ]
    )
    again = read_effects(tmp_path / "same")
    assert again["run"].iloc[0] == "run"
    assert again.drop(columns="run").equals(read_effects(tmp_path / "out").drop(columns="run"))


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_input_is_one_line(run, tmp_path, capsys):
    assert "is not a run directory of attnres-train" in refused(capsys, "trail", tmp_path)
    assert "no step of " in refused(capsys, "prune", run)
    assert "--num_probes must be at least 1, got 0" in refused(capsys, "trail", run, "--num_probes", "0")
    assert "--device quantum cannot be used here" in refused(capsys, "trail", run, "--device", "quantum")
    assert "step 99 is not in" in refused(capsys, "export", run, "99", tmp_path / "out")
    assert "exists: choose another folder" in refused(capsys, "export", run, "4", run)
    assert "cannot be made there" in refused(capsys, "export", run, "4", tmp_path / "no" / "out")
    with Trail(run).held():
        assert "another process probes or prunes" in refused(capsys, "trail", run)
    assert probed_steps(run / PROBE) == set()
    (run / "trail" / "finished.json").unlink()
    assert "has not ended" in refused(capsys, "prune", run)
    (tmp_path / "config.yaml").write_text(CONFIG)
    for command in (["trail", tmp_path], ["prune", tmp_path], ["export", tmp_path, "0", tmp_path / "out"]):
        assert "has no trail: attnres-train fit keeps one with trail.every_n_steps" in refused(capsys, *command)


def test_of_a_training_that_goes_on_the_steps_so_far_are_probed(run, capsys):
    (run / "trail" / "finished.json").unlink()
    Trail(run).remove(STEPS[5:])
    main(["trail", str(run), "--num_probes", "3"])
    said = capsys.readouterr().err
    assert f"training in {run} has not ended: these are the steps so far" in said
    assert probed_steps(run / PROBE) == {0, 2, 4}
