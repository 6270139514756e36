"""Recall in words: right by a dictionary lookup, and the answer's tokens found in any tokenizer's prompts."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from attnres import AttnResConfig, wrap_qwen3
from attnres.tasks import IGNORE_INDEX, TextRecall, task_from_dict
from attnres.tasks.text_recall import read_data
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import MaskRenormalise
from probe.examples.flip import recall_accuracy
from probe.examples.text_recall import TextPrompts
from probe.runner import ProbeSettings, plan_probe, probe_model
from tests.support.paths import ROOT
from tests.support.tokenizers import KINDS, make

FACTS = {"list": r"^(\w+): (\S+)$", "sentences": r"^The code of (\w+) is (\S+)\.$", "question": r"^(\w+): (\S+)$"}
QUESTIONS = {"list": r"(\w+):$", "sentences": r"of (\w+) is$", "question": r"of (\w+)\?\nAnswer:$"}

kinds = pytest.mark.parametrize("kind", KINDS)


@st.composite
def tasks(draw: st.DrawFn) -> TextRecall:
    length = draw(st.integers(1, 4))
    similarity = draw(st.integers(0, length - 1))
    return TextRecall(
        num_pairs=draw(st.integers(2, 10)),
        template=draw(st.sampled_from(sorted(FACTS))),
        alphabet=draw(st.sampled_from(["digits", "letters", "words"])),
        code_length=length,
        distractor_similarity=similarity,
        distance=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**31)),
    )


@given(task=tasks(), index=st.integers(0, 2**40))
def test_examples_are_right(task, index):
    """All of it is read off the text: names, codes, which is asked, what stands between."""
    example = task.example(index)
    context, _, question = example.prompt.rpartition("\n\n" if task.template != "question" else "\n\nQuestion")
    facts = dict(re.findall(FACTS[task.template], context, re.M))
    assert len(facts) == len(set(facts.values())) == task.num_pairs
    (asked,) = re.findall(QUESTIONS[task.template], question)
    assert example.answer == f" {facts[asked]}"
    assert set(example.candidates) == {f" {code}" for code in facts.values()}
    codes = read_data("codes")[task.alphabet]
    parts = [code.split("-") if task.alphabet == "words" else list(code) for code in facts.values()]
    assert all(len(code) == task.code_length and set(code) <= set(codes["parts"]) for code in parts)
    assert len({tuple(code[: task.distractor_similarity]) for code in parts}) == 1
    assert sum(line in read_data("fillers") for line in context.splitlines()) == task.distance
    after_facts = re.split(FACTS[task.template], context, flags=re.M)[-1].strip().splitlines()
    assert len(after_facts) == task.distance  # between the last fact and the question
    if example.spare is not None:
        assert example.spare not in facts.values()


@given(task=tasks(), index=st.integers(0, 2**40))
def test_an_example_is_a_function_of_settings_and_index(task, index):
    again = task_from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task
    assert again.example(index) == task.example(index)
    assert task.example(index).prompt != task.example(index + 1).prompt


@given(task=tasks(), index=st.integers(0, 2**40))
def test_distance_and_template_leave_the_facts_as_they_are(task, index):
    """So that difficulties are compared on the same facts."""
    one, other = (replace(task, distance=d, template=t).example(index) for d, t in ((0, "list"), (5, "sentences")))
    assert (one.names, one.codes, one.asked, one.spare) == (other.names, other.codes, other.asked, other.spare)
    assert len(other.prompt) > len(one.prompt)


def test_every_fact_is_asked_for():
    task = TextRecall(num_pairs=4)
    assert {task.example(index).asked for index in range(60)} == {0, 1, 2, 3}


def test_trivial_accuracies():
    task = TextRecall(num_pairs=8, alphabet="letters", code_length=2, distractor_similarity=1)
    assert task.plateau_accuracy == 1 / 8
    assert task.chance_accuracy == 1 / 26**2


def test_all_codes_of_an_alphabet_can_be_in_one_context():
    example = TextRecall(num_pairs=10, code_length=2, distractor_similarity=1).example(0)
    assert len({code[1] for code in example.codes}) == 10
    assert example.spare is None


def test_data_files_keep_apart_what_must_be():
    names, fillers = read_data("names"), read_data("fillers")
    alphabets = [codes["parts"] for codes in read_data("codes").values()]
    for pool in (names, fillers, *alphabets):
        assert not [(a, b) for a in pool for b in pool if a is not b and b.startswith(a)]
    wordings = [text for template in read_data("templates").values() for text in template.values()]
    prose = set(re.findall(r"\w+", " ".join([*fillers, *wordings]).lower()))  # some tokenizers write lower case
    # No name or part of a code but those of the facts.
    assert not prose & {entry.lower() for pool in (names, *alphabets) for entry in pool}
    for template in read_data("templates").values():
        assert template.keys() == {"header", "fact", "filler", "question"}
        assert " {code}" in template["fact"]
        assert not template["question"].endswith(" ")


def test_data_files_are_part_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pattern,) = project["tool"]["setuptools"]["package-data"]["attnres.tasks"]
    folder = ROOT / "attnres" / "tasks"
    assert set(folder.glob(pattern)) == {path for path in (folder / "data").iterdir() if path.is_file()}


def test_the_ready_made_task_is_the_one_that_is_documented():
    task = task_from_dict(json.loads((ROOT / "configs" / "text_recall.json").read_text()))
    assert isinstance(task, TextRecall)
    assert task == TextRecall()
    example, page = task.example(0), (ROOT / "docs" / "text_task.md").read_text(encoding="utf-8")
    assert f"```text\n{example.prompt}\n```" in page
    assert f"the answer is `{example.answer}`" in page
    assert all(f"| `{key}` | {value if key == 'num_pairs' else ''}" in page for key, value in task.to_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_pairs": 1}, "num_pairs must be at least 2, got 1"),
        ({"num_pairs": 500}, r"num_pairs \(500\) must be at most 106, the number of names"),
        ({"template": "poem"}, "template 'poem' does not exist; choose from list, sentences, question"),
        ({"alphabet": "runes"}, "alphabet 'runes' does not exist; choose from digits, letters, words"),
        ({"code_length": 0}, "code_length must be at least 1, got 0"),
        ({"distance": -1}, "distance must be at least 0, got -1"),
        ({"distractor_similarity": -1}, "distractor_similarity must be at least 0, got -1"),
        ({"distractor_similarity": 4}, r"distractor_similarity \(4\) must be below code_length \(4\)"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, "seed must be at most 9,223,372,036,854,775,807, got 18446744073709551616"),
        ({"code_length": 10**9}, "code_length must be at most 1,000, got 1000000000"),
        ({"distance": 10**30}, "distance must be at most 2,147,483,647, got"),
        ({"num_pairs": 10**9}, "num_pairs must be at most 1,000, got 1000000000"),
        ({"num_pairs": 11, "code_length": 1}, r"num_pairs \(11\) is too large: only 10 codes of 1 digits"),
        ({"pairs": 3}, "unknown task setting 'pairs'; choose from num_pairs, template, alphabet, code_length"),
        ({"num_pairs": "8"}, "task setting num_pairs must be an integer, got '8'"),
        ({"num_pairs": True}, "task setting num_pairs must be an integer, got True"),
        ({"template": 3}, "task setting template must be a string, got 3"),
        ({"task": "copy"}, "task 'copy' is not supported; choose from hops, mqar, pointer, text_recall"),
        ({"task": ["mqar"]}, r"task \['mqar'\] is not supported; choose from hops, mqar, pointer, text_recall"),
        ({"task": "\x1b[2J"}, r"task '\\x1b\[2J' is not supported"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        task_from_dict({"task": "text_recall", **fields})
    assert "\n" not in str(error.value)


# Through a tokenizer.


@kinds
@settings(max_examples=15)
@given(task=tasks(), index=st.integers(0, 2**40))
def test_answers_are_at_the_labelled_positions_and_distractors_in_the_context(kind, task, index):
    tokenizer, example = make(kind), task.example(index)
    ids, labels, candidates = (part.tolist() for part in TextPrompts(task, tokenizer, kind).encode(example))
    answer = [label for label in labels if label != IGNORE_INDEX]
    asked = [token != IGNORE_INDEX for token in labels]
    assert asked == sorted(asked)  # one answer, at the end
    assert ids[len(ids) - len(answer) + 1 :] == answer[:-1]  # teacher forcing
    # Where the answer begins, by another way: the first token that ends behind the prompt's last character.
    text = example.prompt + example.answer
    whole = tokenizer(text, return_offsets_mapping=True)
    first = next(i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(example.prompt))
    assert first == len(ids) - len(answer) + 1
    assert [*ids, answer[-1]] == whole["input_ids"][: len(ids) + 1]
    codes = [[token for token in code if token >= 0] for code in candidates]
    assert answer == codes[example.asked]
    prompt = ids[:first]
    for code in codes:
        assert any(prompt[i : i + len(code)] == code for i in range(len(prompt)))
    written = [re.sub(r"[\s▁#]", "", tokenizer.decode(code)).lower() for code in codes]
    assert written == [code.strip().lower() for code in example.candidates]


@pytest.mark.parametrize("kind", ["qwen", "gpt2"])
@given(task=tasks(), index=st.integers(0, 2**40))
@settings(max_examples=15)
def test_prompts_round_trip(kind, task, index):
    tokenizer, example = make(kind), task.example(index)
    ids, labels, _ = TextPrompts(task, tokenizer, kind).encode(example)
    assert tokenizer.decode([*ids.tolist(), int(labels[-1])]) == example.prompt + example.answer


def test_a_bos_is_added_and_an_eos_is_not():
    task = TextRecall(num_pairs=3)
    for kind, first in (("metaspace", "<s>"), ("wordpiece", "[CLS]")):
        tokenizer = make(kind)
        inputs = TextPrompts(task, tokenizer, kind).examples(4)
        assert (inputs.input_ids[:, 0] == tokenizer.convert_tokens_to_ids(first)).all()
        assert not (inputs.input_ids == tokenizer.convert_tokens_to_ids("[SEP]")).any() or kind == "metaspace"


def test_answers_of_one_and_of_several_tokens():
    counts = {}
    for alphabet, length in (("letters", 1), ("digits", 4)):
        task = TextRecall(num_pairs=4, alphabet=alphabet, code_length=length)
        inputs = TextPrompts(task, make("metaspace"), "").examples(20)
        assert inputs.starts.sum(1).tolist() == [1] * 20
        counts[alphabet] = set(inputs.queries.sum(1).tolist())
    assert counts["letters"] == {1}
    assert max(counts["digits"]) > 1


def without(part: str) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that has no token with `part` in it."""
    content = json.loads(make("wordpiece").backend_tokenizer.to_str())
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if part not in t}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="[UNK]")


def lower_case() -> PreTrainedTokenizerFast:
    """One that writes codes among the facts otherwise than at the end: a code and the line's end are one token."""
    content = json.loads(make("gpt2").backend_tokenizer.to_str())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "([0-9]+)\n"}, "content": "9\n"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def alike() -> PreTrainedTokenizerFast:
    """One that writes all digits as one."""
    content = json.loads(make("gpt2").backend_tokenizer.to_str())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "0"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (make("greedy"), "joins the end of the prompt, '.*', to what follows it"),
        (without("3"), "has no token for a part of the text"),
        (alike(), "does not tell ' .*' and ' .*' apart \\(the same tokens\\)"),
        (lower_case(), "writes a code among the facts otherwise than as an answer"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_told_why(tokenizer, message):
    with pytest.raises(ValueError, match=f"^the tokenizer of here {message} \\(template 'list', answer") as error:
        TextPrompts(TextRecall(), tokenizer, "here").examples(8)
    assert "\n" not in str(error.value)


def test_what_the_flip_test_cannot_write_is_told_before_the_model_is_run(make_model, tmp_path):
    """Nine of ten digits are in the context; the tokenizer lacks the tenth, which only the flip test writes."""
    task = TextRecall(num_pairs=9, code_length=1)
    spare = task.example(0).spare
    assert spare is not None
    prompts, settings, runs = TextPrompts(task, without(spare), "here"), ProbeSettings(num_sequences=1), []
    prompts.examples(1)
    model = make_model(vocab_size=600, max_position_embeddings=256)
    model.register_forward_hook(lambda *_: runs.append(1))
    about = {"run": "run", "condition": "cumulative", "seed": 0, "step": 0}
    with pytest.raises(ValueError, match=r"^the tokenizer of here has no token for a part of the text"):
        probe_model(model, prompts, settings, tmp_path / "out", **about)
    with pytest.raises(ValueError, match=r"^the tokenizer of here has no token for a part of the text"):
        plan_probe(model, prompts, settings)
    assert not runs
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_must_fit_the_model():
    task = TextPrompts(TextRecall(), make("qwen"), "here")
    examples = [task.examples(1)]
    task.check(AttnResConfig(vocab_size=600), examples)
    with pytest.raises(ValueError, match=r"vocabulary \(599\) is smaller than that of the tokenizer of here \(600\)"):
        task.check(AttnResConfig(vocab_size=599), examples)


@kinds
def test_clean_metrics_are_those_of_transformers(make_vanilla, kind):
    """NLL: the loss on the answer that transformers computes; accuracy: whether greedy generation gives the answer."""
    vanilla, tokenizer = make_vanilla(vocab_size=600), make(kind)
    task = TextRecall(num_pairs=3, alphabet="digits", code_length=2, template="question")
    inputs = TextPrompts(task, tokenizer, kind).examples(6)
    model = wrap_qwen3(vanilla, num_blocks=2, recency_bias=100.0).eval()  # as good as vanilla
    cells = build_grid(model.model.sites, Kind(MaskRenormalise), scopes=["all"])
    result = Engine(model, cells, ("all",), batch_size=4).run(inputs)
    assert result.counts.tolist() == [1] * 6
    for row, length in enumerate(inputs.lengths.tolist()):
        answer = inputs.labels[row][inputs.labels[row] != IGNORE_INDEX]
        start = length - len(answer) + 1
        whole = torch.cat((inputs.input_ids[row, :start], answer))[None]
        labels = whole.clone()
        labels[:, :start] = IGNORE_INDEX
        loss = float(vanilla(whole, labels=labels).loss.detach()) * len(answer)
        assert result.clean["nll"][row] == pytest.approx(loss, abs=1e-4)
        generated = vanilla.generate(whole[:, :start], max_new_tokens=len(answer), do_sample=False, pad_token_id=0)
        assert result.clean["accuracy"][row] == float(torch.equal(generated[0, start:], answer))


class Reader(torch.nn.Module):
    """A model that reads the facts and goes on with the code of `rule(names, asked)`, token by token."""

    device = torch.device("cpu")

    def __init__(self, rule) -> None:
        super().__init__()
        self.rule, self.tokenizer = rule, make("gpt2")

    def forward(self, input_ids, logits_to_keep, use_cache):
        logits = torch.zeros(len(input_ids), logits_to_keep, len(self.tokenizer))
        for row, ids in enumerate(input_ids.tolist()):
            text = self.tokenizer.decode(ids)
            facts, asked = (
                re.findall(FACTS["list"], text.split("\n\n")[0], re.M),
                re.findall(r"order:\n(\w+):", text)[0],
            )
            name = self.rule([name for name, _ in facts], asked)
            end = text.rindex(f"{asked}:") + len(asked) + 1
            wanted = self.tokenizer(f"{text[:end]} {dict(facts)[name]}")["input_ids"]
            for at in range(logits_to_keep):
                following = len(ids) - logits_to_keep + at + 1
                if following < len(wanted):
                    logits[row, at, wanted[following]] = 1
        return SimpleNamespace(logits=logits)


def test_the_flip_test_on_readers_of_known_habits():
    task = TextPrompts(TextRecall(num_pairs=4), make("gpt2"), "")
    right, last = Reader(lambda names, asked: asked), Reader(lambda names, asked: names[-1])
    assert recall_accuracy(right, task.examples(24)) == 1
    assert recall_accuracy(last, task.examples(24)) == pytest.approx(1 / 4, abs=0.2)
    result = task.flip_test(right, 24, seed=0, batch_size=8)
    assert (result.follows_queried, result.follows_other, result.n_queried, result.n_other) == (1, 0, 24, 24)
    result = task.flip_test(last, 24, seed=0, batch_size=8)
    assert 0 < result.follows_queried < 1  # where the last name is the one that is asked for
    assert 0 < result.follows_other < 1
    full = TextPrompts(TextRecall(num_pairs=10, code_length=1), make("gpt2"), "")
    assert full.flip_test(right, 4, seed=0, batch_size=8) is None
