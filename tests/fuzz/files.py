"""Files that users write: tasks, prompts, studies; and settings of a probe."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from attnres.tasks import MQAR, Hops, Pointer, Task, TextRecall, task_from_dict
from attnres.tasks.text_recall import read_data
from probe.examples.prompt_file import PromptTask
from probe.files.checkpoints import read_json
from probe.settings import ProbeSettings, TrailSettings, TrainingProbeSettings
from tests.fuzz.kind import Kind
from tests.fuzz.oracle import keeps_its_word, outcome, reading, untouched
from tests.fuzz.values import FLOATS, HOSTILE, NUMBERS, TEXTS, damaged, json_texts
from tests.fuzz.world import World
from tests.support import tokenizers

TASKS = (
    {"task": "mqar", "num_pairs": 4, "vocab_size": 16, "seed": 0},
    MQAR(num_pairs=3, vocab_size=30, noise_tokens=2, noise_vocab_size=4, min_pairs=1).to_dict(),
    {"task": "text_recall", "num_pairs": 3, "alphabet": "letters", "code_length": 2, "template": "sentences"},
    TextRecall(num_pairs=4, distractor_similarity=1, distance=2).to_dict(),
    Pointer(address_bits=2, vocab_size=12).to_dict(),
    Hops(num_facts=6, num_entities=9, max_hops=3, min_hops=0).to_dict(),
)
PLAUSIBLE = st.one_of(st.integers(0, 20), st.integers(0, 20), st.sampled_from(("list", "question", "digits", "words")))


def strict_json(content: bytes) -> Any:
    """What the bytes hold. Raises ValueError for what is no JSON, or has a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("too deep") from error


def parsed(content: bytes) -> Any:
    try:
        return strict_json(content)
    except ValueError:
        return None


def check_task(world: World, content: bytes) -> bool:
    with world.scratch() as folder:
        path = folder / "task.json"
        path.write_bytes(content)
        with untouched(folder):
            found = outcome(reading(lambda: task_from_dict(read_json(path))))
    value = parsed(content)
    right = isinstance(value, dict) and ACCEPTABLE.get(
        value["task"] if isinstance(value.get("task"), str) else "", lambda _: False
    )({key: item for key, item in value.items() if key != "task"})
    keeps_its_word(found.accepted, bool(right), value)
    if found.accepted and small(value):
        draws(found.found[0])
    return found.accepted


def is_mqar(value: dict[str, Any]) -> bool:
    value = {"num_pairs": 16, "vocab_size": 256, "seed": 0, "noise_tokens": 0, "noise_vocab_size": 16} | value
    fewest = value.pop("min_pairs", None)
    names = {"num_pairs", "vocab_size", "seed", "noise_tokens", "noise_vocab_size"}
    if value.keys() != names or not all(type(item) is int for item in value.values()):
        return False
    pairs, vocabulary, seed, noise, ids = (
        value[name] for name in ("num_pairs", "vocab_size", "seed", "noise_tokens", "noise_vocab_size")
    )
    if not (0 <= seed < 2**63 and 1 <= vocabulary < 2**31 and 0 <= noise < 2**31 and 1 <= ids < 2**31):
        return False
    keys = (vocabulary - (ids if noise else 0)) // 2
    return 1 <= pairs <= keys and (fewest is None or (type(fewest) is int and 1 <= fewest <= pairs))


def is_text_recall(value: dict[str, Any]) -> bool:
    known = TextRecall().to_dict()
    value = {name: item for name, item in known.items() if name != "task"} | value
    if value.keys() != known.keys() - {"task"} or any(type(value[name]) is not type(known[name]) for name in value):
        return False
    if value["template"] not in read_data("templates") or value["alphabet"] not in read_data("codes"):
        return False
    pairs, length, shared = (value[name] for name in ("num_pairs", "code_length", "distractor_similarity"))
    if not (0 <= value["distance"] < 2**31 and 0 <= value["seed"] < 2**63 and 1 <= length <= 1000):
        return False
    if not (2 <= pairs <= len(read_data("names")) and 0 <= shared < length):
        return False
    parts = len(read_data("codes")[value["alphabet"]]["parts"])
    return pairs <= parts ** min(length - shared, 20)


def is_pointer(value: dict[str, Any]) -> bool:
    value = {"address_bits": 4, "vocab_size": 67, "seed": 0} | value
    if len(value) > 3 or not all(type(item) is int for item in value.values()):
        return False
    bits, vocabulary, seed = (value[name] for name in ("address_bits", "vocab_size", "seed"))
    return 0 <= seed < 2**63 and 1 <= bits <= 12 and 2**bits + 3 <= vocabulary < 2**31


def is_hops(value: dict[str, Any]) -> bool:
    value = {"num_facts": 8, "num_entities": 8, "max_hops": 2, "min_hops": 1, "seed": 0} | value
    if len(value) > 5 or not all(type(item) is int for item in value.values()):
        return False
    facts, entities, most, least, seed = (
        value[name] for name in ("num_facts", "num_entities", "max_hops", "min_hops", "seed")
    )
    return 0 <= seed < 2**63 and 0 <= least <= most <= 16 and most >= 1 and most + 2 <= facts <= entities <= 1024


ACCEPTABLE = {"mqar": is_mqar, "text_recall": is_text_recall, "pointer": is_pointer, "hops": is_hops}


def small(value: dict[str, Any]) -> bool:
    return all(item < 1000 for name, item in value.items() if isinstance(item, int) and name != "seed")


def draws(task: Task | TextRecall) -> None:
    """Fails the test unless the task makes examples that are of its settings."""
    if isinstance(task, TextRecall):
        example = task.example(0)
        assert len(set(example.names)) == len(set(example.codes)) == task.num_pairs
        assert len(example.sentences) == task.distance
        return
    if task.num_tokens * len(task.groups) > 10_000:
        return
    batch = task.batch("probe", range(2))
    assert batch.input_ids.shape == (2, task.num_tokens)
    assert 0 <= batch.input_ids.min() <= batch.input_ids.max() < task.vocab_size
    assert all(len(set(row.tolist())) == round(1 / task.plateau_accuracy) for row in batch.candidates)


PROMPTS = (
    {"prompt": "Clara:", "answer": " 07", "distractors": [" 33", " 81"]},
    {"prompt": "Codes by name:\nOscar:", "answer": " 3392", "distractors": [" 0715"], "cluster": "Peru"},
)
WRITTEN = st.one_of(st.text(max_size=6), st.sampled_from((" 07", " 33", "Peru", "", " ", "0", "\n", "层")))


@st.composite
def prompt_files(draw: DrawFn) -> bytes:
    lines = draw(st.lists(json_texts(PROMPTS, WRITTEN | HOSTILE), max_size=3))
    return damaged(draw, b"\n".join(lines), often=False)


def check_prompts(world: World, content: bytes) -> bool:
    tokenizer = tokenizers.make("qwen")
    with world.scratch() as folder:
        path = folder / "prompts.jsonl"
        path.write_bytes(content)
        with untouched(folder):
            found = outcome(reading(lambda: PromptTask.read(path, tokenizer, "words")))
    lines = prompt_lines(content)
    keeps_its_word(found.accepted, bool(lines) and all(is_prompt(parsed(line)) for line in lines), content)
    if found.accepted:
        task = found.found[0]
        made = outcome(reading(lambda: task.examples(task.count(None))))
        assert not made.accepted or len(made.found[0]) == len(lines)
    return found.accepted


def prompt_lines(content: bytes) -> list[bytes]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return []
    return [line.encode() for line in text.split("\n") if line.strip()]


def is_prompt(value: Any) -> bool:
    if not isinstance(value, dict) or not {"prompt", "answer", "distractors"} <= value.keys():
        return False
    if value.keys() - {"prompt", "answer", "distractors", "cluster"} or not isinstance(value["distractors"], list):
        return False
    texts = [value["prompt"], value["answer"], *value["distractors"]]
    texts += [] if value.get("cluster") is None else [value["cluster"]]
    if not all(isinstance(text, str) and text and "\0" not in text and is_utf8(text) for text in texts):
        return False
    answers = [value["answer"], *value["distractors"]]
    return 2 <= len(answers) <= 1001 and len(set(answers)) == len(answers)


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


INTEGERS = st.one_of(st.sampled_from(NUMBERS), st.integers(-3, 300))
REALS = st.one_of(st.sampled_from(FLOATS), st.floats(0, 1), st.floats())
KINDS = (
    *("mask_renormalise", "zero", "mean", "resample", "uniform", "increment", "patch_weights", "matched_mass"),
    *("keep_only", "keep_random", "silence", "rescue"),
)
NAMES = {
    "kinds": KINDS,
    "families": ("embedding", "current", "prev_completed", "older"),
    "sublayers": ("self_attn", "mlp", "both"),
    "scopes": ("early", "middle", "late", "all", "layer:0", "final"),
    "positions": ("all", "query"),
    "coalitions": ("all", "early"),
    "curves": ("flip", "trace", "heads"),
}
FREE = ("scopes", "coalitions")
"""Which of them exist depends on the model."""


@st.composite
def settings_of(draw: DrawFn) -> tuple[type, dict[str, Any]]:
    """A class of settings, and arguments for it of the right types."""
    cls = draw(st.sampled_from((ProbeSettings, ProbeSettings, TrainingProbeSettings, TrailSettings)))
    named = {field.name: str(field.type) for field in fields(cls)}
    chosen = draw(st.lists(st.sampled_from(sorted(named)), max_size=4, unique=True))
    return cls, {name: draw(_of_type(name, named[name])) for name in chosen}


def _of_type(name: str, annotation: str) -> st.SearchStrategy[Any]:
    if name in NAMES:
        strategy = st.lists(st.sampled_from(NAMES[name]) | st.sampled_from(TEXTS), max_size=3)
    elif name == "at_steps":
        strategy = st.lists(INTEGERS, max_size=3)
    elif name == "mode":
        strategy = st.sampled_from(("exact", "integrated", "both", "x"))
    else:
        strategy = {"bool": st.booleans(), "int": INTEGERS, "float": REALS}[annotation.removesuffix(" | None")]
    return strategy | st.none() if "None" in annotation else strategy


def check_settings(world: World, drawn: tuple[type, dict[str, Any]]) -> bool:
    cls, given = drawn
    found = outcome(reading(lambda: cls(**given)))
    right = is_trail(given) if cls is TrailSettings else is_probe(given)
    if cls is TrainingProbeSettings:
        right = right and is_training_probe(given)
    if any(set(given.get(name) or ()) - set(NAMES[name]) for name in FREE):
        return found.accepted  # of another model, perhaps
    keeps_its_word(found.accepted, right, drawn)
    return found.accepted


def is_probe(given: dict[str, Any]) -> bool:
    for name, known in NAMES.items():
        value = given.get(name, known[:1])
        if value is None and name == "scopes":
            continue
        if (
            len(set(value)) < len(value)
            or not set(value) <= set(known)
            or not (value or name in ("coalitions", "curves"))
        ):
            return False
    matters, equivalent = given.get("matters", 0.05), given.get("equivalent", 0.01)
    if given.get("mode", "exact") == "x" or not 0 < equivalent < matters < 1:
        return False
    counts = [given.get(name) for name in ("num_sequences", "batch_size", "tokens_per_pass")]
    if not all(count is None or 1 <= count < 2**63 for count in counts):
        return False
    if not (1 <= given.get("num_resamples", 20) <= 100_000 and 0 <= given.get("seed", 0) < 2**63):
        return False
    needs_another = {"resample", "patch_weights", "mean"} & set(given.get("kinds", ()))
    return not (given.get("num_sequences") == 1 and needs_another - {"mean"})


def is_training_probe(given: dict[str, Any]) -> bool:
    steps = [given.get("every_n_steps", 0), given.get("trail_probes", 0), *(given.get("at_steps") or ())]
    if not all(0 <= number < 2**63 for number in steps) or not 1 <= given.get("settled_probes", 1) < 2**63:
        return False
    if not 0 <= given.get("accuracy_jump", 0) <= 1:
        return False
    if given.get("num_sequences") is not None and given["num_sequences"] < 64:
        return False
    if not given.get("stop_when_settled"):
        return True
    scopes, sublayers = given.get("scopes"), given.get("sublayers", ["mlp"])
    masks = "mask_renormalise" in given.get("kinds", ["mask_renormalise"]) and "all" in given.get("positions", ["all"])
    everywhere = scopes is None or {"early", "middle", "late"} <= set(scopes)
    return masks and everywhere and bool({"self_attn", "mlp"} & set(sublayers)) and given.get("mode") != "integrated"


def is_trail(given: dict[str, Any]) -> bool:
    return all(given.get(name) is None or 0 <= given[name] < 2**63 for name in ("every_n_steps", "until_step"))


IN_FILES = (
    Kind("task files", lambda world: json_texts(TASKS, PLAUSIBLE | HOSTILE), check_task, 300, 25_000),
    Kind("prompt files", lambda world: prompt_files(), check_prompts, 300, 20_000),
    Kind("settings", lambda world: settings_of(), check_settings, 300, 25_000),
)
__all__ = ["IN_FILES"]
