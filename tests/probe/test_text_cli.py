"""`attnres-probe` on the recall task in words: with a checkpoint's own tokenizer, another's, and of a hub id."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from attnres.tasks import MQAR, TextRecall
from probe.cli import main
from probe.files import tables as storage
from probe.vocabulary import METRICS
from tests.support.paths import ROOT
from tests.support.tokenizers import make

TASK = TextRecall(num_pairs=3, code_length=3, distractor_similarity=1)
SHAPE = {"vocab_size": 600, "max_position_embeddings": 256}
QUICK = ["--num_sequences", "6", "--num_resamples", "20", "--scopes", "[all]", "--device", "cpu"]


def task_file(folder: Path, **changes) -> str:
    path = folder / "text.json"
    path.write_text(json.dumps({**TASK.to_dict(), **changes}))
    return str(path)


@pytest.fixture
def export(make_model, tmp_path) -> Path:
    """An exported AttnRes model with a tokenizer, as a published one."""
    make_model(**SHAPE).save_pretrained(tmp_path / "export")
    make("qwen").save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_an_exported_model_is_probed_with_its_own_tokenizer(export, tmp_path):
    output = tmp_path / "out"
    main(["run", str(export), "--task", task_file(tmp_path), "--output", str(output), *QUICK])
    effects, clusters, summary = (
        storage.read_effects(output),
        storage.read_table(output, "clusters"),
        summary_of(output),
    )
    assert set(effects["n_queries"]) == {6}  # questions, not tokens
    assert set(clusters["n_queries"]) == {1}
    assert set(effects["metric"]) == set(METRICS)
    assert summary["clean"]["plateau_accuracy"] == 1 / 3
    assert summary["clean"]["chance_accuracy"] == 1 / 10**3
    assert TASK.to_dict().items() <= summary["task"].items()
    assert summary["task"]["tokenizer"] == str(export)
    assert summary["task"]["mean_answer_tokens"] == 4  # a space and three digits
    assert summary["flip"]["n_queried"] == summary["flip"]["n_other"] == 6
    main(["report", str(output)])
    assert "6 sequences, 6 queries" in (output / "report.txt").read_text()


def test_a_tokenizer_of_another_place(make_model, export, tmp_path):
    make_model(**SHAPE, seed=1).save_pretrained(tmp_path / "bare")
    options = ["--task", task_file(tmp_path), *QUICK]
    main(["run", str(export), "--output", str(tmp_path / "a"), *options])
    main(["run", str(tmp_path / "bare"), "--tokenizer", str(export), "--output", str(tmp_path / "b"), *options])
    make("gpt2").save_pretrained(tmp_path / "other")
    other = ["--tokenizer", str(tmp_path / "other"), "--output", str(tmp_path / "c")]
    main(["run", str(export), *other, *options])
    a, b, c = (set(storage.read_effects(tmp_path / name)["data_id"]) for name in "abc")
    assert a == b != c  # the same prompts for two models; another tokenizer's are others


@pytest.mark.slow
def test_hub_ids_go_the_same_way_by_the_documented_commands(make_model, make_vanilla, make_hub, tmp_path):
    """By the real path: the hub's own cache, holding small models and a tokenizer under the names of large ones."""
    vanilla, environment = "Qwen/Qwen3-0.6B", {}
    models = {
        vanilla: make_vanilla(**SHAPE, num_hidden_layers=8),
        "wdlctc/open-attnres-0.6b-block": make_model(**SHAPE),
    }
    for hub_id, model in models.items():
        environment = make_hub(model, hub_id)
    (snapshot,) = (Path(environment["HF_HUB_CACHE"]) / "models--Qwen--Qwen3-0.6B" / "snapshots").iterdir()
    make("qwen").save_pretrained(snapshot)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "text_recall.json").write_text(json.dumps(TASK.to_dict()))
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "text_task.md").read_text(encoding="utf-8"), re.S)
    lines = [shlex.split(line)[1:] for line in block.splitlines()]
    arguments = json.dumps([words + (QUICK if "--task" in words else []) for words in lines])
    script = "import json, sys; from probe.cli import main; [main(words) for words in json.loads(sys.argv[1])]"
    command = [sys.executable, "-c", script, arguments]  # one process for all of them: imports take seconds
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    wrapped, published = tmp_path / "runs" / "qwen3-wrapped", tmp_path / "runs" / "open-attnres"
    assert summary_of(wrapped / "probe")["task"]["tokenizer"] == summary_of(published)["task"]["tokenizer"] == vanilla
    assert 0 <= summary_of(wrapped / "probe")["wraps"]["accuracy"] <= 1
    main(["run", str(wrapped), "--output", str(tmp_path / "again"), *QUICK])  # neither task nor tokenizer are named
    first, other, again = (storage.read_effects(folder) for folder in (wrapped, published, tmp_path / "again"))
    assert set(first["data_id"]) == set(other["data_id"]) == set(again["data_id"])
    assert first["effect"].to_numpy() == pytest.approx(again["effect"].to_numpy(), abs=1e-5, nan_ok=True)


def test_bad_input_is_one_line_and_status_2_and_writes_nothing(make_model, make_vanilla, export, tmp_path, capsys):
    names = ("bare", "vanilla", "small", "short", "mqar.json")
    bare, vanilla, small, short, mqar = (tmp_path / name for name in names)
    make_model(**SHAPE).save_pretrained(bare)
    make_vanilla(**SHAPE).save_pretrained(vanilla)
    make_model(vocab_size=40).save_pretrained(small)
    make_model(vocab_size=600, max_position_embeddings=32).save_pretrained(short)
    mqar.write_text(json.dumps(MQAR(num_pairs=4, vocab_size=40).to_dict()))
    greedy = tmp_path / "greedy"
    make("greedy").save_pretrained(greedy)
    out = ["--output", str(tmp_path / "new"), *QUICK]
    text = ["--task", task_file(tmp_path)]
    (tmp_path / "poem.json").write_text(json.dumps({"task": "text_recall", "template": "poem"}))
    (tmp_path / "copy.json").write_text(json.dumps({"task": "copy"}))
    unfit = [
        (
            ["run", str(small), "--tokenizer", str(export), *text, *out],
            "vocabulary (40) is smaller than that of the tok",
        ),
        (["run", str(short), "--tokenizer", str(export), *text, *out], "tokens, the model is made for 32"),
        (["run", str(export), "--tokenizer", str(greedy), *text, *out], "joins the end of the prompt"),
        (["run", str(export), *text, *out, "--kinds", "[resample]"], "has no partner"),
        (["baseline", str(vanilla), "--num_blocks", "2", "--tokenizer", str(greedy), *text, *out], "joins the end of"),
    ]
    cases = [
        (["run", str(bare), *text, *out], f"{bare} holds no tokenizer"),
        (["baseline", str(vanilla), "--num_blocks", "2", *text, *out], f"{vanilla} holds no tokenizer files: give"),
        (
            ["run", str(export), "--tokenizer", str(bare / "config.json"), *text, *out],
            "config.json holds no tokenizer:",
        ),
        (["run", str(export), "--tokenizer", "nobody/nothing", *text, *out], "nobody/nothing holds no tokenizer"),
        *unfit,
        *[([*argv, "--devices", "2"], message) for argv, message in unfit],
        (["run", str(export), "--tokenizer", str(export), "--task", str(mqar), *out], "--tokenizer is for text_recall"),
        (["run", str(export), "--task", str(tmp_path / "poem.json"), *out], "template 'poem' does not exist; choose"),
        (
            ["run", str(export), "--task", str(tmp_path / "copy.json"), *out],
            "choose from hops, mqar",
        ),
    ]
    for argv, message in cases:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2, argv
        assert error.count("\n") == 1, error
        assert message in error, error
        assert not (tmp_path / "new").exists(), argv
