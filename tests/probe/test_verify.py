"""`attnres-probe verify` finds what is not as it was written or measured, and whoever reads it refuses it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from attnres.files import MANIFEST, read_manifest
from probe.cli import main
from probe.files.tables import read_table
from probe.verify import FAILED, HOLDS, findings
from tests.train.cli.test_fit import TINY
from train.cli import main as train

pytestmark = pytest.mark.usefixtures("quiet_wandb")

PROBES = ["--probe.enabled=true", "--probe.num_resamples=20", "--probe.families=[embedding]", "--probe.trail_probes=0"]
PROBES += ["--probe.num_sequences=256", "--probe.sublayers=[mlp]", "--probe.flip=false"]
QUICK = ["--num_sequences", "16", "--num_resamples", "20", "--batch_size", "8", "--flip", "false"]
QUICK += ["--positions", "[all]", "--scopes", "[all,early]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that was trained with probes and a trail, killed once (so to speak), and probed again at its end."""
    run = tmp_path_factory.mktemp("verify") / "run"
    options = [*TINY, *PROBES, f"--run_dir={run}", "--trail.every_n_steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        train(["fit", *options, "--trainer.max_steps=2"])
        train(["fit", *options, "--trainer.max_steps=4", f"--ckpt_path={run}/checkpoints/last.ckpt"])
    kinds = ["--kinds", "[mask_renormalise,resample,matched_mass]"]
    main(["run", str(run), "--output", str(run / "probe" / "final"), *QUICK, *kinds])
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def listed(run: Path) -> list[Path]:
    return [path.parent / name for path in sorted(run.rglob(MANIFEST)) for name in read_manifest(path.parent)]


def test_a_run_that_nobody_touched_holds(run, capsys):
    capsys.readouterr()
    assert main(["verify", str(run)]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"{HOLDS} ") for line in lines)
    assert total == f"{len(lines)} ok"
    names = {str(path.relative_to(run)) for path in listed(run)}
    assert all(any(line.endswith(f"/{name}") for line in lines) for name in names)
    assert len(lines) == len(names) + 2 + 3  # tables of two folders follow from their clusters; three cells
    for name in ("config.yaml", "provenance.json", "checkpoints/last.ckpt", "checkpoints/previous.ckpt"):
        assert name in names
    for folder in ("hf", "trail/step_0", "trail/step_2", "trail/step_4"):
        assert {f"{folder}/model.safetensors", f"{folder}/config.json"} < names
    for folder in ("probe", "probe/final"):
        assert {f"{folder}/{name}" for name in ("effects.parquet", "clusters.parquet", "summary.json")} < names


@pytest.mark.parametrize("name", ["heads.parquet", "heads.json", "pairs.parquet"])
def test_what_stands_beside_the_probes_is_looked_at(run, name):
    assert main(["heads", str(run), f"--output={run / 'heads'}", "--num_sequences=8", "--num_resamples=20"]) == 0
    assert {verdict for verdict, _ in findings(run, 0)} == {HOLDS}
    content = bytearray((run / "heads" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / "heads" / name).write_bytes(content)
    assert [what for verdict, what in findings(run, 0) if verdict == FAILED and name in what]


def alter(path: Path, chance: random.Random) -> str:
    """Change a byte, or a value where the file holds values that can be told apart; returns what was done."""
    if path.suffix == ".parquet" and chance.random() < 0.5:
        table = pd.read_parquet(path)
        column = chance.choice([name for name in table if table[name].dtype.kind == "f" and table[name].notna().any()])
        row = chance.choice(table.index[table[column].notna()].tolist())
        table.loc[row, column] += 1e-3
        table.to_parquet(path, index=False)
        return f"{column} of row {row}"
    if path.suffix == ".safetensors" and chance.random() < 0.5:
        tensors = load_file(path)
        name = chance.choice(sorted(tensors))
        tensors[name].view(-1)[chance.randrange(tensors[name].numel())] += 1e-3
        save_file(tensors, path, {"format": "pt"})
        return f"an element of {name}"
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    content[place] ^= chance.randrange(1, 256)
    path.write_bytes(content)
    return f"byte {place}"


def test_each_of_200_alterations_is_found(run):
    chance, files = random.Random(0), listed(run)
    kinds = {path.suffix for path in files}
    assert kinds == {".parquet", ".json", ".yaml", ".csv", ".ckpt", ".safetensors"}
    missed, altered = [], set()
    for number in range(200):
        path = files[number % len(files)]
        before = path.read_bytes()
        what = alter(path, chance)
        assert path.read_bytes() != before
        first = next((line for verdict, line in findings(run, 0) if verdict == FAILED), "")
        if not first.startswith(f"{path} is not what was written"):
            missed.append((str(path), what, first))
        altered.add(path)
        path.write_bytes(before)
    assert missed == []
    assert altered == set(files)
    assert not any(verdict == FAILED for verdict, _ in findings(run, 0))


def test_a_missing_file_and_a_torn_manifest_are_found(run, capsys):
    (run / "hf" / "task.json").unlink()
    (run / "checkpoints" / MANIFEST).write_text("{")
    assert main(["verify", str(run), "--cells", "0"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(FAILED)]
    assert len(failed) == 2
    assert "checkpoints/manifest.json is not a readable manifest" in failed[0]
    assert "hf/task.json is missing" in failed[1]


def test_without_digests_results_are_checked_against_each_other(run, capsys):
    """An older run: nothing is a failure for want of a digest, and what does not follow still is."""
    for path in run.rglob(MANIFEST):
        path.unlink()
    assert main(["verify", str(run)]) == 0
    assert "no digest" in capsys.readouterr().out
    folder = run / "probe" / "final"
    rows = read_table(folder, "clusters")
    row = rows.index[(rows["metric"] == "logit_diff") & rows["summed_effect"].notna()][7]
    rows.loc[row, "summed_effect"] += 0.01
    rows.to_parquet(folder / "clusters.parquet", index=False)
    assert main(["verify", str(run), "--cells", "0"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(FAILED)]
    assert "effects.parquet: effect does not follow from clusters.parquet in 1 of " in line
    assert rows.loc[row, "family"] in line


def test_a_model_that_is_not_the_probed_one_is_found(run, capsys):
    (run / "hf" / MANIFEST).unlink()
    weights = run / "hf" / "model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert main(["verify", str(run), "--cells", "4"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(FAILED)]
    assert failed
    assert all("measured again" in line for line in failed)


READERS = {
    "probe/final/clusters.parquet": ["report", "RUN"],
    "probe/effects.parquet": ["report", "RUN"],
    "probe/final/effects.parquet": ["compare", "RUN", "RUN"],
    "probe/final/summary.json": ["compare", "RUN", "RUN"],
    "hf/model.safetensors": ["run", "RUN", "--output", "NEW"],
    "hf/config.json": ["run", "RUN/hf", "--output", "NEW"],
    "checkpoints/last.ckpt": ["run", "RUN/checkpoints/last.ckpt", "--output", "NEW"],
    "trail/step_2/model.safetensors": ["export", "RUN", "2", "NEW"],
    "trail/task.json": ["export", "RUN", "2", "NEW"],
    "config.yaml": ["trail", "RUN"],
}


@pytest.mark.parametrize("name", READERS)
def test_what_was_altered_is_refused_by_who_reads_it(run, name, tmp_path, capsys):
    path = run / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    new, before = tmp_path / "new", {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = [part.replace("RUN", str(run)).replace("NEW", str(new)) for part in READERS[name]]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1
    assert f"{path} is not what was written" in captured.err
    assert not new.exists()
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize("name", ["probe/clusters.parquet", "probe/effects.parquet", "provenance.json"])
def test_training_does_not_go_on_over_what_was_altered(run, name, capsys):
    """It would write the altered rows again, with a new digest."""
    path = run / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    options = [*TINY, *PROBES, f"--run_dir={run}", "--trail.every_n_steps=2", "--trainer.max_steps=6"]
    with pytest.raises((SystemExit, ValueError)) as stop:
        train(["fit", *options, f"--ckpt_path={run}/checkpoints/last.ckpt"])
    said = capsys.readouterr().err if stop.type is SystemExit else str(stop.value)
    assert f"{path} is not what was written" in said
    assert path.read_bytes() == bytes(content)


def test_checkpoints_fall_back_on_the_one_before(run, capsys):
    from train.run.checkpoints import newest_checkpoint

    path = run / "checkpoints" / "last.ckpt"
    content = json.dumps({}).encode() + path.read_bytes()[2:]
    path.write_bytes(content)
    found, checkpoint, torn = newest_checkpoint(run)
    assert (found, torn) == (path.with_name("previous.ckpt"), [path])
    assert checkpoint["global_step"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a directory: expected a run directory"),
        (["empty"], "empty holds nothing that attnres writes"),
        (["empty", "--cells", "-1"], "--cells must not be negative, got -1"),
    ],
)
def test_bad_input_to_verify_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["verify", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert message in error
