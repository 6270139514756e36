"""`attnres-probe run MODEL --prompts FILE`: from a file to tables, summary and page, and what is said of a bad one."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from attnres.tasks import TextRecall
from probe.cli import main
from probe.files import tables as storage
from tests.support.paths import ROOT
from tests.support.tokenizers import make

SHAPE = {"vocab_size": 600, "max_position_embeddings": 256}
QUICK = ["--num_resamples", "20", "--scopes", "[all]", "--device", "cpu"]
PAGE = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")


def documented(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return block


LINES = list(map(json.loads, documented("json").splitlines()))


@pytest.fixture
def export(make_model, tmp_path) -> Path:
    """An exported AttnRes model with a tokenizer, as a published one."""
    make_model(**SHAPE).save_pretrained(tmp_path / "runs" / "mine" / "hf")
    make("qwen").save_pretrained(tmp_path / "runs" / "mine" / "hf")
    return tmp_path / "runs" / "mine"


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(documented("json"), encoding="utf-8")
    return path


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_the_documented_file_is_probed_and_reported(export, prompts, tmp_path, capsys):
    output = export / "probe" / "final"
    main(["run", str(export), "--prompts", str(prompts), "--output", str(output), *QUICK])
    assert "prompts:" not in capsys.readouterr().err  # nothing was left out
    effects, clusters = storage.read_effects(output), storage.read_table(output, "clusters")
    summary = summary_of(output)
    assert set(effects["n_sequences"]) == {3}
    assert set(effects["n_queries"]) == {4}
    assert clusters.groupby("sequence")["n_queries"].first().tolist() == [2, 1, 1]
    task = summary["task"]
    assert (task["file"], task["n_prompts"], task["n_prompts_given"], task["n_clusters"]) == ("prompts.jsonl", 4, 4, 3)
    assert (task["fewest_distractors"], task["most_distractors"], task["tokenizer"]) == (2, 2, str(export))
    assert task["sha256"] == hashlib.sha256(prompts.read_bytes()).hexdigest()
    tokens = [[len(make("qwen")(line[key])["input_ids"]) for key in ("prompt", "answer")] for line in LINES]
    assert [task["mean_prompt_tokens"], task["mean_answer_tokens"]] == np.mean(tokens, axis=0).tolist()
    assert (summary["flip"], summary["num_pairs"]) == (None, 3)
    assert (summary["clean"]["chance_accuracy"], summary["clean"]["plateau_accuracy"]) == (None, 1 / 3)
    main(["report", str(export)])
    assert "3 sequences, 4 queries" in (export / "report.txt").read_text()
    assert (export / "report.html").stat().st_size > 10_000


def test_the_documented_python_runs(export, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(documented("python"), {})
    assert "prev_completed" in capsys.readouterr().out


def test_the_documented_commands_run(make_vanilla, make_hub, export, prompts, tmp_path, monkeypatch):
    """With a small model and tokenizer under the hub id, and then what they made is compared and probed again."""
    from huggingface_hub import constants

    cache = make_hub(make_vanilla(**SHAPE, num_hidden_layers=8), "Qwen/Qwen3-0.6B")["HF_HUB_CACHE"]
    (snapshot,) = (Path(cache) / "models--Qwen--Qwen3-0.6B" / "snapshots").iterdir()
    make("qwen").save_pretrained(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.chdir(tmp_path)
    for line in documented("bash").splitlines():
        main(shlex.split(line)[1:] + QUICK)
    wrapped, mine = tmp_path / "runs" / "qwen3-wrapped", export / "probe" / "prompts"
    assert 0 <= summary_of(wrapped / "probe")["wraps"]["accuracy"] <= 1
    assert not (wrapped / "hf" / "task.json").exists()
    main(["compare", str(mine), str(wrapped), "--num_resamples", "20"])
    main(["run", str(wrapped), "--prompts", str(prompts), "--output", str(tmp_path / "again"), *QUICK])  # its tokenizer
    ids = [set(storage.read_effects(folder)["data_id"]) for folder in (mine, wrapped, tmp_path / "again")]
    assert ids[0] == ids[1] == ids[2]


def test_of_a_longer_file_the_first_lines_are_taken_and_that_is_said(export, prompts, tmp_path, capsys):
    command = ["run", str(export), "--prompts", str(prompts), *QUICK]
    main([*command, "--num_sequences", "2", "--output", str(tmp_path / "two")])
    assert "probing the first 2 of 4 prompts" in capsys.readouterr().err
    task = summary_of(tmp_path / "two")["task"]
    assert (task["n_prompts"], task["n_prompts_given"], task["n_clusters"]) == (2, 4, 1)
    (tmp_path / "half.jsonl").write_text("\n".join(prompts.read_text().splitlines()[:2]))
    command[3] = str(tmp_path / "half.jsonl")
    main([*command, "--num_sequences", "null", "--output", str(tmp_path / "half")])
    assert "prompts:" not in capsys.readouterr().err
    two, half = (storage.read_effects(tmp_path / name) for name in ("two", "half"))
    assert two["effect"].to_numpy() == pytest.approx(half["effect"].to_numpy(), abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_several_processes_share_the_prompts(export, prompts, tmp_path):
    command = ["run", str(export), "--prompts", str(prompts), *QUICK, "--batch_size", "2"]
    main([*command, "--output", str(tmp_path / "one")])
    main([*command, "--output", str(tmp_path / "two"), "--devices", "2"])
    one, two = (storage.read_table(tmp_path / name, "clusters") for name in ("one", "two"))
    assert one["summed_effect"].to_numpy() == pytest.approx(two["summed_effect"].to_numpy(), abs=1e-6, nan_ok=True)


def test_bad_input_is_one_line_and_status_2_and_writes_nothing(export, prompts, make_model, tmp_path, capsys):
    (tmp_path / "task.json").write_text(json.dumps(TextRecall().to_dict()))
    make_model(vocab_size=40).save_pretrained(tmp_path / "small")
    make_model(vocab_size=600, max_position_embeddings=4).save_pretrained(tmp_path / "short")
    lines = prompts.read_text().splitlines()
    files = {
        "torn": [*lines, '{"prompt": "x'],
        "empty": [],
        "same": [lines[0], lines[2].replace(" Quito", " Oslo")],
        "joined": [lines[0].replace('is"', 'is "').replace('" Lima', '"Lima')],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(content))
    bare = ["--tokenizer", str(export), "--prompts", str(prompts)]
    cases = [
        *[
            (["run", str(export), "--prompts", str(tmp_path / f"{name}.jsonl")], f"{name}.jsonl {message}")
            for name, message in {
                "torn": "line 5 is not JSON (Unterminated string",
                "empty": "holds no prompts",
                "same": "line 2: the distractor ' Oslo' is the answer",
                "joined": "line 1: the tokenizer joins the end of the prompt",
                "none": "cannot be read (No such file",
            }.items()
        ],
        (["run", str(tmp_path / "small"), *bare], "prompts.jsonl line 1 has the token id"),
        (["run", str(tmp_path / "short"), *bare], "prompts.jsonl line 1 has 14 tokens, the model is made for 4"),
        (["run", str(tmp_path / "small"), "--prompts", str(prompts)], "small holds no tokenizer"),
        (["run", str(export), "--prompts", str(prompts), "--kinds", "[resample]"], "sequence 0 has no partner"),
        (["run", str(export), "--prompts", str(prompts), "--task", str(tmp_path / "task.json")], "give one of them"),
        (["baseline", str(export), "--prompts", str(prompts), "--task", "x"], "give one of them"),
        (["run", str(export)], "give --task FILE or --prompts FILE"),
    ]
    for argv, message in cases:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--output", str(tmp_path / "new"), *QUICK])
        error = capsys.readouterr().err
        assert stop.value.code == 2, argv
        assert error.count("\n") == 1, error
        assert message in error, error
        assert not (tmp_path / "new").exists(), argv
