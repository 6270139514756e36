"""`--group`: a probe of some of a task's queries, such as those over two hops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from attnres.tasks import IGNORE_INDEX, MQAR, Hops, Pointer
from probe import ProbeSettings, measure
from probe.cli import main
from probe.examples.tasks import TokenTask
from probe.trace.of_tasks import flips_of_task
from tests.probe.test_flip_command import export

HOPS = Hops(num_facts=6, num_entities=7, max_hops=3)
SETTINGS = ProbeSettings(scopes=("early", "all"), positions=("all",), num_resamples=20)


@pytest.fixture
def model(make_model):
    return make_model(vocab_size=HOPS.vocab_size, num_hidden_layers=3, max_position_embeddings=64)


@pytest.mark.parametrize("task", [HOPS, MQAR(4, 32), Pointer(2, 19)], ids=lambda task: task.name)
def test_groups_share_the_queries_out(task):
    whole = TokenTask(task).examples(10)
    parts = [TokenTask(task, group).examples(10) for group in task.groups]
    assert sum(part.queries.int() for part in parts).equal(whole.queries.int())
    for part in parts:
        assert part.input_ids.equal(whole.input_ids)
        assert part.labels[part.queries].equal(whole.labels[part.queries])
    assert len({part.data_id() for part in parts}) == len(parts)


def test_queries_of_a_group_ask_for_so_many_hops():
    batch = HOPS.batch("probe", range(10))
    for hops in (1, 2, 3):
        labels = TokenTask(HOPS, f"hops_{hops}").examples(10).labels[:, batch.query_positions]
        assert ((labels != IGNORE_INDEX) == (batch.hops == hops)).all()


def test_effects_of_all_queries_are_the_mean_of_those_of_the_groups(model):
    def effects(task: TokenTask):
        rows = measure(model, task.examples(12), SETTINGS).effects
        return rows[rows["applicable"] & (rows["metric"] == "logit_diff")]["effect"].to_numpy()

    parts = [effects(TokenTask(HOPS, group)) for group in HOPS.groups]
    assert sum(parts) / len(parts) == pytest.approx(effects(TokenTask(HOPS)), abs=1e-6)  # as many queries in each
    assert abs(parts[0] - parts[1]).max() > 1e-5


def test_a_trace_asks_for_a_query_of_the_group():
    batch, rows = HOPS.batch("probe", range(20)), torch.arange(20)
    for hops in (1, 3):
        flips, _ = flips_of_task(HOPS, 20, group=f"hops_{hops}")
        query = (batch.query_positions == flips.position[:, None]).long().argmax(1)
        assert (batch.hops[rows, query] == hops).all()


def test_a_probe_of_a_group_says_so_and_can_be_verified(model, tmp_path, capsys):
    run = tmp_path / "run"
    export(model, HOPS, run / "hf")
    (run / "hf" / "attnres_run.json").write_text(json.dumps({"condition": "cumulative", "seed": 0, "step": 3}))
    small = ["--num_sequences=8", "--num_resamples=20", "--scopes=[all]", "--positions=[all]"]
    assert main(["run", str(run), f"--output={tmp_path / 'new'}", "--group=hops_2", *small]) == 0
    shutil.move(tmp_path / "new", run / "probe")
    summary = json.loads((run / "probe/summary.json").read_text())
    assert summary["task"]["group"] == "hops_2"
    assert summary["probe"]["n_sequences"] == 8
    assert summary["flip"]["n_queried"] > 0
    capsys.readouterr()
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("measured again") == 3
    assert main(["trace", str(run), "--group=hops_2", "--num_sequences=6", "--num_resamples=20"]) == 0


@pytest.mark.parametrize("command", ["run", "trace"])
def test_a_group_that_is_none_is_refused(model, command, tmp_path, capsys):
    folder = export(model, HOPS, tmp_path / "model")
    with pytest.raises(SystemExit, match="2"):
        main([command, str(folder), f"--output={tmp_path / 'out'}", "--group=hops_4"])
    assert "group of queries 'hops_4' does not exist; choose from hops_1, hops_2, hops_3" in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()


def test_prompts_have_no_groups(model, tmp_path, capsys):
    folder = export(model, HOPS, tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "answer": " b", "distractors": [" c"]}\n')
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(folder), f"--output={tmp_path / 'out'}", f"--prompts={prompts}", "--group=hops_1"])
    assert "--group is for tasks in token ids: leave it out with --prompts" in capsys.readouterr().err
