"""Prompts of any task: from a file or in Python, through any tokenizer, with clusters as the unit of statistics."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attnres import AttnResConfig
from attnres.tasks import IGNORE_INDEX, TextRecall
from probe import Examples, ProbeSettings, Prompt, measure
from probe.analysis.effects import CELL_KEYS
from probe.examples.examples import as_row
from probe.examples.prompt_file import PromptTask
from probe.examples.text_recall import TextPrompts
from probe.runner import check_probe, probe_model
from tests.support.tokenizers import KINDS, make

TASK = TextRecall(num_pairs=3, code_length=3, distractor_similarity=1)
SHAPE = {"vocab_size": 600, "max_position_embeddings": 256}
QUICK = ProbeSettings(scopes=["all"], coalitions=["all"], num_resamples=200)
SEA = Prompt("The sea is", " blue", (" red", " old"))
LINE = {"prompt": "The sea is", "answer": " blue", "distractors": [" red"]}


def recall(count: int) -> list[Prompt]:
    """Text recall as anyone could write it down."""
    examples = map(TASK.example, range(count))
    return [Prompt(e.prompt, e.answer, tuple(c for c in e.candidates if c != e.answer)) for e in examples]


def read(folder: Path, *lines: str | dict, tokenizer: str = "qwen") -> PromptTask:
    path = folder / "some.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return PromptTask.read(path, make(tokenizer), "here")


def in_one_cluster(prompts: list[Prompt], ids: list[str | None]) -> Examples:
    return Examples.from_prompts([replace(p, cluster=c) for p, c in zip(prompts, ids, strict=True)], make("qwen"))


# Tokens.


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_follows_the_prompt(kind):
    tokenizer = make(kind)
    prompts = [
        SEA,
        Prompt("Grass is", " green", (" blue", " hard to see", " dry")),
        Prompt("Code: 4. Code:", " 4", (" 5",)),
    ]
    examples = Examples.from_prompts(prompts, tokenizer)
    assert examples.starts.sum(1).tolist() == [1, 1, 1]
    for number, prompt in enumerate(prompts):
        ids, labels = examples.input_ids[number].tolist(), examples.labels[number].tolist()
        ids, labels = ids[: examples.lengths[number]], labels[: examples.lengths[number]]
        whole = tokenizer(prompt.prompt + prompt.answer, return_offsets_mapping=True)
        first = next(i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(prompt.prompt))
        assert [*ids, labels[-1]] == whole["input_ids"][: len(ids) + 1]
        asked = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        assert asked == list(range(first - 1, len(ids)))
        codes = [[token for token in code if token >= 0] for code in examples.candidates[number].tolist()]
        codes = [code for code in codes if code]
        assert codes[0] == [labels[i] for i in asked]
        written = [tokenizer.decode(code).replace("▁", "").replace("##", "").replace(" ", "") for code in codes]
        assert written == [text.replace(" ", "") for text in (prompt.answer, *prompt.distractors)]


def test_special_tokens_in_a_prompt_are_a_part_of_it():
    tokenizer = make("wordpiece")
    prompt = Prompt("the code of oscar is 4 [SEP]", " 4", (" 5",))
    examples = Examples.from_prompts([prompt], tokenizer)
    ids = tokenizer.convert_ids_to_tokens(examples.input_ids[0].tolist())
    assert (ids[0], ids[-1], examples.queries.sum().item()) == ("[CLS]", "[SEP]", 1)


def test_recall_as_prompts_has_the_effects_of_the_task(make_model):
    model, task = make_model(**SHAPE), TextPrompts(TASK, make("qwen"), "here")
    settings = ProbeSettings(num_sequences=6, scopes=["all", "early"], num_resamples=50)
    one = measure(model, task.examples(6), settings)
    other = measure(model, Examples.from_prompts(recall(6), make("qwen")), settings)
    numbers = one.effects.select_dtypes("number").columns
    assert len(one.effects) > 100
    pd.testing.assert_frame_equal(one.effects[numbers], other.effects[numbers], rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(one.clusters, other.clusters, rtol=0, atol=1e-6)
    assert one.summary["clean"] == pytest.approx(other.summary["clean"], abs=1e-6)


def test_prompts_of_several_lengths_are_measured_as_each_by_itself(make_model):
    model = make_model(**SHAPE)
    prompts = [SEA, *recall(2), Prompt("Grass is", " green", (" blue",))]
    together = measure(model, Examples.from_prompts(prompts, make("qwen")), QUICK).clusters
    for number, prompt in enumerate(prompts):
        alone = measure(model, Examples.from_prompts([prompt], make("qwen")), QUICK).clusters
        of_it = together[together["sequence"] == number].reset_index(drop=True)
        columns = ["summed_clean", "summed_effect", "mass"]
        pd.testing.assert_frame_equal(of_it[columns], alone[columns], rtol=0, atol=1e-5)


# Clusters.


def test_a_cluster_holds_the_sums_of_its_lines(make_model):
    """By hand, from the table in which each line is a cluster of its own."""
    model, prompts = make_model(**SHAPE), recall(5)
    ids = ["b", None, "a", "b", "a"]
    place = {0: 0, 1: 1, 2: 2, 3: 0, 4: 2}
    lines = measure(model, in_one_cluster(prompts, [None] * 5), QUICK)
    found = measure(model, in_one_cluster(prompts, ids), QUICK)
    lines_of = lines.clusters.assign(sequence=lines.clusters["sequence"].map(place))
    grouped = lines_of.groupby([*CELL_KEYS, "sequence"])
    expected = grouped[["n_queries", "summed_clean", "summed_effect"]].sum(min_count=1).join(grouped["mass"].mean())
    actual = found.clusters.set_index([*CELL_KEYS, "sequence"]).reindex(expected.index)[expected.columns]
    assert actual["summed_effect"].notna().sum() > 100
    pd.testing.assert_frame_equal(actual, expected, check_dtype=False, rtol=1e-12)
    for table in (found.effects, found.summary["probe"]):
        assert set(np.atleast_1d(table["n_sequences"])) == {3}
        assert set(np.atleast_1d(table["n_queries"])) == {5}
    np.testing.assert_allclose(found.effects["effect"], lines.effects["effect"], rtol=1e-9)
    np.testing.assert_allclose(
        found.effects["mass"], found.clusters.groupby(CELL_KEYS, sort=False)["mass"].mean().to_numpy(), rtol=1e-9
    )
    assert found.summary["probe"]["forward_passes"] == pytest.approx(lines.summary["probe"]["forward_passes"])
    assert found.summary["clean"]["nll"] == pytest.approx(lines.summary["clean"]["nll"])


def test_lines_that_repeat_each_other_add_nothing_in_one_cluster(make_model):
    """Every line twice: with ids, intervals and p-values are those of the lines once; without, they are too narrow."""
    model, prompts = make_model(**SHAPE), recall(8)
    once = measure(model, in_one_cluster(prompts, [None] * 8), QUICK)
    twice = measure(model, in_one_cluster(prompts * 2, [str(i) for i in range(8)] * 2), QUICK)
    alone = measure(model, in_one_cluster(prompts * 2, [None] * 16), QUICK)
    for one, other in ((once.effects, twice.effects), (once.coalitions, twice.coalitions)):
        for column in ("effect", "std_error", "ci_low", "ci_high", "p_value", "p_adjusted"):
            np.testing.assert_allclose(other[column], one[column], rtol=1e-4, atol=1e-9, err_msg=column)
    pd.testing.assert_frame_equal(once.geometry, twice.geometry, rtol=1e-9)
    varied = once.effects["std_error"] > 0
    ratios = (alone.effects["std_error"] / once.effects["std_error"])[varied]
    assert varied.sum() > 50
    np.testing.assert_allclose(ratios, np.sqrt(7 / 15), rtol=1e-3)


def test_a_probe_in_batches_clusters_across_them(make_model):
    model, examples = make_model(**SHAPE), in_one_cluster(recall(5), ["a", "b", "a", "b", "a"])
    whole, split = (measure(model, examples, replace(QUICK, batch_size=size)) for size in (64, 2))
    assert set(whole.clusters["sequence"]) == {0, 1}
    pd.testing.assert_frame_equal(whole.clusters, split.clusters, rtol=0, atol=1e-5)


def test_one_cluster_has_effects_but_no_intervals(make_model):
    found = measure(make_model(**SHAPE), in_one_cluster(recall(3), ["a"] * 3), QUICK)
    effects = found.effects[found.effects["applicable"]]
    assert set(effects["n_sequences"]) == {1}
    assert effects["effect"].notna().all()
    assert effects[["ci_low", "ci_high"]].isna().all(axis=None)
    assert not (effects["p_value"] < 1).any()
    assert not found.summary["motifs"]


def test_the_data_id_is_of_tokens_and_clusters():
    prompts = recall(4)
    ids = [[None] * 4, ["a", "b", "c", "d"], ["a", "b", "c", "a"], ["x", "b", None, "x"]]
    own, named, shared, renamed = (in_one_cluster(prompts, each).data_id() for each in ids)
    assert own == named  # names are nobody's business
    assert shared == renamed != own
    assert in_one_cluster([*prompts[:3], SEA], [None] * 4).data_id() != own


# What it means for the trivial plateau.


def test_the_plateau_is_a_guess_among_a_lines_candidates():
    three = [SEA, replace(SEA, prompt="The sky is")]
    examples = Examples.from_prompts(three, make("qwen"))
    assert (examples.num_values, examples.plateau_accuracy) == (3, 1 / 3)
    uneven = [SEA, Prompt("Grass is", " green", (" red",)), Prompt("Snow is", " white", (" red",))]
    examples = Examples.from_prompts(uneven, make("qwen"))
    assert examples.plateau_accuracy == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert examples.num_values == 2  # 2.25, counted down


# Bad prompts.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "answer is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"distractors": []}, "distractors is empty: the answer is compared with at least one"),
        ({"distractors": [" red", ""]}, "a distractor is empty"),
        ({"distractors": [" red", " blue"]}, "the distractor ' blue' is the answer"),
        ({"distractors": [" red", " old", " red"]}, "the distractor ' red' is there twice"),
        ({"distractors": " red"}, "distractors must be a list of strings, got ' red'"),
        ({"distractors": [" red", 7]}, "a distractor must be a string, got 7"),
        ({"answer": None}, "answer must be a string, got None"),
        ({"cluster": 3}, "cluster must be a string, got 3"),
        ({"cluster": ""}, "cluster is empty"),
        ({"prompt": "a\0b"}, "prompt holds '\\x00', which is no character of a text: leave it out"),
        ({"answer": " \ud800"}, "answer holds '\\ud800', which is no character of a text: leave it out"),
        ({"distractors": ["\udfff"]}, "a distractor holds '\\udfff', which is no character of a text: leave it out"),
        ({"distractors": list(map(str, range(1001)))}, "there are 1,001 distractors, at most 1,000 are compared"),
        ({"distractor": [" red"]}, "unknown key 'distractor'; choose from prompt, answer, distractors, cluster"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    name = f"{tmp_path / 'some.jsonl'} line 3"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: {message}')}$"):
        read(tmp_path, LINE, "", LINE | change)
    if change.keys() <= LINE.keys() | {"cluster"}:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Prompt(**(LINE | change))


def test_a_line_that_does_not_end_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"some.jsonl line 2 is of 1,048,\d+ characters: a prompt may have 1,048,576"):
        read(tmp_path, LINE, LINE | {"prompt": "x" * 2**20})


def test_sequences_that_memory_cannot_hold_are_refused_before_they_are_padded(monkeypatch):
    """One of many candidates makes all as wide: what is held is the product of the largest."""
    rows = [as_row([1, 2], [(3,), (4,)], 0) for _ in range(20)] + [as_row([1] * 50, [(i,) for i in range(99)], 0)]
    assert len(Examples.collate(rows)) == 21
    monkeypatch.setattr("attnres.inputs.memory_bytes", lambda: 2**14)
    with pytest.raises(
        ValueError, match=r"^21 sequences, padded to 50 tokens and 99 candidates of 1, would take 33.7 KiB"
    ):
        Examples.collate(rows)


def test_a_missing_key_is_named(tmp_path):
    for key in LINE:
        with pytest.raises(ValueError, match=f"some.jsonl line 1: key '{key}' is missing$"):
            read(tmp_path, {name: value for name, value in LINE.items() if name != key})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINE, '{"prompt": "x"'], r"some.jsonl line 2 is not JSON \(Expecting ',' delimiter"),
        ([LINE, "[1]"], "some.jsonl line 2 must hold a JSON object, got list"),
        ([LINE, "[" * 100_000], r"some.jsonl line 2 is not JSON \(it is nested too deeply\)"),
        (['{"prompt": "a", "prompt": "b"}'], r"some.jsonl line 1 is not JSON \(the key 'prompt' is there twice\)"),
        (["", "  "], "some.jsonl holds no prompts: expected one JSON object a line"),
    ],
)
def test_a_file_that_is_no_list_of_prompts(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, *lines)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl cannot be read \(No such file or directory\)$"):
        PromptTask.read(tmp_path / "none.jsonl", make("qwen"), "here")
    with open(tmp_path / "large.jsonl", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match=r"large.jsonl has 8.0 GiB, at most 256 MiB are read$"):
        PromptTask.read(tmp_path / "large.jsonl", make("qwen"), "here")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.jsonl is not UTF-8 text: expected one JSON object a line$"):
        PromptTask.read(tmp_path / "binary.jsonl", make("qwen"), "here")


def test_lines_end_where_json_says(tmp_path):
    """Not at the other characters that Python takes for the end of a line; a byte order mark is no text."""
    text = json.dumps(LINE | {"prompt": "one\u2028line is"}, ensure_ascii=False)
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}\r\n".encode())
    task = PromptTask.read(tmp_path / "marked.jsonl", make("qwen"), "here")
    assert [prompt.prompt for prompt in task.prompts] == ["one\u2028line is"] * 2


HINT = "begin answers with their space, or word them otherwise"


@pytest.mark.parametrize(
    ("tokenizer", "change", "message"),
    [
        (
            "qwen",
            {"answer": " redder"},
            "does not tell ' red' and ' redder' apart (the tokens of ' red' begin those of",
        ),
        ("wordpiece", {"answer": " RED"}, "does not tell ' RED' and ' red' apart (the same tokens)"),
        ("wordpiece", {"prompt": "[UNK] is"}, "has no token for a part of the text"),
        ("gpt2", {"prompt": "The sea is ", "answer": "blue"}, "joins the end of the prompt, 'The sea is ', to what"),
        ("metaspace", {"prompt": "The sea i", "answer": "s"}, "joins the end of the prompt, 'The sea i', to what"),
    ],
)
def test_a_line_that_a_tokenizer_cannot_write_is_named(tmp_path, tokenizer, change, message):
    task = read(
        tmp_path, {"prompt": "Code of", "answer": " Oscar", "distractors": [" a"]}, LINE | change, tokenizer=tokenizer
    )
    name = f"{tmp_path / 'some.jsonl'} line 2"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: the tokenizer {message}')}.*: {HINT}$"):
        task.examples(2)
    task.examples(1)


def test_prompts_in_python_are_named_by_their_number():
    with pytest.raises(ValueError, match=r"^prompt 1: the tokenizer does not tell"):
        Examples.from_prompts([SEA, replace(SEA, answer=" redder")], make("qwen"))
    with pytest.raises(ValueError, match=r"^there are no prompts$"):
        Examples.from_prompts([], make("qwen"))


def test_a_line_that_does_not_fit_the_model_is_named(tmp_path, make_model):
    task = read(tmp_path, LINE, LINE | {"prompt": "The sea " * 20 + "is"})
    longest = int(task.examples(2).lengths.max())
    model = make_model(vocab_size=600, max_position_embeddings=longest - 1)
    about = f"{longest} tokens, the model is made for {longest - 1} \\(max_position_embeddings\\)$"
    with pytest.raises(ValueError, match=f"some.jsonl line 2 has {about}"):
        check_probe(model, task, ProbeSettings())
    with pytest.raises(ValueError, match=f"^sequence 1 has {about}"):
        measure(model, task.examples(2), QUICK)
    check_probe(model, task, ProbeSettings(num_sequences=1))
    largest = int(task.examples(2).candidates.max())
    small = AttnResConfig(vocab_size=largest)
    with pytest.raises(ValueError, match=f"line 1 has the token id {largest}, the model's vocabulary is {largest}$"):
        task.check(small, [task.examples(2)])
    task.check(AttnResConfig(vocab_size=largest + 1), [task.examples(2)])


def test_kinds_that_need_partners_say_so(tmp_path, make_model):
    task = read(tmp_path, LINE, LINE | {"prompt": "The deep sea is"})
    with pytest.raises(ValueError, match=r"^sequence 0 has no partner"):
        check_probe(make_model(**SHAPE), task, ProbeSettings(kinds=["resample"]))
    task = read(tmp_path, LINE, LINE | {"prompt": "The bed is"})
    assert len({*task.examples(2).lengths.tolist()}) == 1
    check_probe(make_model(**SHAPE), task, ProbeSettings(kinds=["resample"]))


def test_prompts_of_python_are_a_task_to_write_results_of(make_model, tmp_path):
    task = PromptTask(tuple(recall(3)), make("qwen"), "here")
    about = {"run": "run", "condition": "cumulative", "seed": 0, "step": 0}
    found = probe_model(make_model(**SHAPE), task, QUICK, tmp_path / "out", **about)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["flip"] is None
    assert summary["clean"]["chance_accuracy"] is None
    assert summary["clean"]["plateau_accuracy"] == 1 / 3
    assert summary["task"]["n_prompts"] == summary["task"]["n_prompts_given"] == 3
    assert len(found.clusters["sequence"].unique()) == 3
