"""What cannot be probed is said in one line before any work, and what was measured without numbers is said in words."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from attnres.tasks import MQAR
from probe import Examples, ProbeSettings, measure, runner
from probe.ablation.base import Ablation
from probe.ablation.engine import Engine
from probe.cli import main
from probe.files.runs import load_run
from probe.report import text

TASK = MQAR(num_pairs=4, vocab_size=40, seed=3)
QUICK = ["--num_sequences", "8", "--num_resamples", "20", "--device", "cpu"]


def export(model, folder: Path, task: dict | None = None, **about) -> Path:
    model.save_pretrained(folder / "hf")
    (folder / "hf" / "task.json").write_text(json.dumps(task or TASK.to_dict()))
    known = {"condition": "cumulative", "seed": 3, "step": 40}
    (folder / "hf" / "attnres_run.json").write_text(json.dumps(known | about))
    return folder


def refused(argv: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named_before_the_sweep(make_model, make_vanilla, tmp_path, capsys, value):
    model, vanilla = make_model(), make_vanilla()
    for each in (model, vanilla):
        with torch.no_grad():
            each.model.layers[1].mlp.up_proj.weight[0, :3] = value
            each.model.norm.weight[1] = value
    out = ["--output", str(tmp_path / "out"), *QUICK]
    what = "3 of the 384 values of the model's model.layers.1.mlp.up_proj.weight are NaN or infinite, and so do 1 more"
    assert what in refused(["run", str(export(model, tmp_path / "a")), *out], capsys)
    argv = ["baseline", str(export(vanilla, tmp_path / "v")), "--num_blocks", "2", *out]
    assert "model.layers.1.mlp.up_proj.weight are NaN" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()
    examples = Examples.from_batch(TASK.batch("probe", range(2)))
    with pytest.raises(ValueError, match="are NaN or infinite"):
        measure(model, examples, ProbeSettings(scopes=["all"]))


def test_sizes_are_bounded_before_work_and_the_line_has_the_estimate(make_model, tmp_path, capsys):
    model = str(export(make_model(), tmp_path / "a"))
    endless = str(export(make_model(max_position_embeddings=10**12), tmp_path / "endless"))
    tasks = {
        "noise": {"noise_tokens": 10**9},
        "pairs": {"num_pairs": 10**9, "vocab_size": 2 * 10**9},
        "both": {"noise_tokens": 2 * 10**9},
    }
    for name, fields in tasks.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(TASK.to_dict() | fields))
    out = ["--output", str(tmp_path / "out"), *QUICK]
    estimate = (
        r"sequences of 12 tokens \(\d+ rows each, 20 resamples\), about [\d,.]+ hours, would take .*iB of memory or"
    )
    cases = [
        ([model, "--num_sequences", str(10**12)], f"a probe of 1,000,000,000,000 {estimate}"),
        ([model, "--num_sequences", str(10**8)], f"a probe of 100,000,000 {estimate}"),
        ([model, "--num_sequences", str(10**400)], "num_sequences must be at most 9,"),
        ([model, "--batch_size", str(2**64)], "batch_size must be at most 9,"),
        ([model, "--num_resamples", str(10**12)], "num_resamples must be at most 100,000, got 1000000000000"),
        ([model, "--seed", str(2**64)], "seed must be at most 9,"),
        (
            [model, "--task", str(tmp_path / "noise.json")],
            "sequence has at least 1,000,000,012 tokens, the model is made",
        ),
        ([model, "--task", str(tmp_path / "pairs.json")], "is smaller than the task's"),
        (
            [endless, "--task", str(tmp_path / "both.json")],
            r"two sequences of 2,000,000,012 tokens would take 1\d\d GiB",
        ),
    ]
    for argv, message in cases:
        assert re.search(message, refused(["run", *argv[:1], *out, *argv[1:]], capsys)), argv
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_years_is_refused(make_model, monkeypatch):
    monkeypatch.setattr(runner, "FLOPS", {"cpu": 1e-3})
    with pytest.raises(
        ValueError, match=r"^a probe of 8 sequences .* would take about [\d,]+ hours, 10,000 are allowed: "
    ):
        runner.check_probe(make_model(), TASK, ProbeSettings(num_sequences=8))


def test_files_that_may_never_end_are_refused(make_model, tmp_path, capsys):
    model = str(export(make_model(), tmp_path / "a"))
    os.mkfifo(tmp_path / "pipe")
    for path, what in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a pipe, socket or dev"),
    ):
        error = refused(["run", model, "--output", str(tmp_path / "out"), *QUICK, "--task", str(path)], capsys)
        assert f"{path} is {what}" in error


@pytest.mark.parametrize("bias", ["1e30", "1e308", "-1e30", "80.5", "nan", "inf", "-inf"])
def test_a_bias_that_leaves_no_routing_is_refused(make_vanilla, tmp_path, capsys, bias):
    vanilla = str(export(make_vanilla(), tmp_path / "v"))
    argv = [
        "baseline",
        vanilla,
        "--output",
        str(tmp_path / "out"),
        "--num_blocks",
        "2",
        f"--recency_bias={bias}",
        *QUICK,
    ]
    assert "recency_bias" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("blocks", ["0", "-1", "1000000000", "1" + 400 * "0"])
def test_a_number_of_blocks_that_no_model_has_is_refused(make_vanilla, tmp_path, capsys, blocks):
    vanilla = str(export(make_vanilla(), tmp_path / "v"))
    argv = ["baseline", vanilla, "--output", str(tmp_path / "out"), f"--num_blocks={blocks}", *QUICK]
    assert "num_blocks" in refused(argv, capsys)


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 2**64), ("seed", "x"), ("step", 1.5), ("seed", True), ("step", -2)]
)
def test_what_lies_beside_a_model_is_checked_before_the_sweep(make_model, tmp_path, capsys, key, value):
    model = export(make_model(), tmp_path / "a", **{key: value})
    error = refused(["run", str(model), "--output", str(tmp_path / "out"), *QUICK], capsys)
    assert f"the {key} of a, beside its model, must be" in error


EXTRA = {"coalitions": ["--coalitions", "[all]"], "both modes": ["--mode", "both", "--scopes", "[all]"]}


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_a_run_without_numbers_is_reported_in_words(make_model, tmp_path, capsys, monkeypatch, extra):
    """As older programs wrote it, of a model that training had made NaN: the checks of today are put away."""
    monkeypatch.setattr(runner, "check_finite", lambda model: None)
    monkeypatch.setattr(Engine, "_check_finite", lambda *args: None)
    monkeypatch.setattr(Ablation, "check_values", lambda *args: None)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    run, sound = export(model, tmp_path / "a"), export(make_model(), tmp_path / "b")
    for each in (run, sound):
        main(["run", str(each), "--output", str(each / "probe" / "final"), *QUICK, *extra])
    capsys.readouterr()
    main(["report", str(run), str(sound)])
    printed = capsys.readouterr().out
    assert "NOT FINITE: the outputs of cumulative (seed 3, step 40) are not numbers" in printed
    assert printed.count("NOT FINITE") == 1
    assert "margin —" in printed
    for content in (printed, (run / "report.txt").read_text(), (run / "probe" / "final" / "claims.json").read_text()):
        assert not re.search(r"\b(nan|None|inf)\b", content)
    assert (run / "report.html").stat().st_size > 10_000
    assert "NOT FINITE" in (run / "report.html").read_text()
    assert text.not_finite(load_run(run).summary["clean"])
    assert not text.not_finite(load_run(sound).summary["clean"])
    assert "no cell in common" in refused(["compare", str(run), str(sound)], capsys)


def test_names_cannot_write_on_the_screen(make_model, tmp_path, capsys):
    """Escapes, newlines' like, directions of writing, halves of characters; and dollars, which figures would set."""
    run = export(make_model(), tmp_path / "a\x1b[31m$x_$", condition="\x1b[2J\ud800$\\frac$<b>\u202e\x9b1m")
    main(["run", str(run), "--output", str(run / "probe" / "final"), *QUICK, "--scopes", "[all]"])
    main(["report", str(run)])
    main(["compare", str(run), str(run), "--num_resamples", "20"])
    printed = capsys.readouterr()
    files = [run / "report.txt", run / "report.html", run / "probe" / "final" / "claims.json"]
    for content in (printed.out, *(path.read_text() for path in files)):
        assert not set("\x1b\x9b\u202e") & set(content)
    assert r"\x1b[2J\ud800$\frac$<b>\u202e\x9b1m (seed 3" in printed.out
    assert "\x1b[31m" not in printed.err.replace(r"\x1b", "")
