"""EleutherAI's lm-evaluation-harness, on tasks of our own in a local file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import SOURCES

lm_eval = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
tasks = pytest.importorskip("lm_eval.tasks")

NUM_DOCUMENTS = 12
TASKS = {
    "multiple_choice": {"doc_to_choice": "choices", "doc_to_target": "answer"},
    "loglikelihood": {"doc_to_target": "{{' ' + choices[answer]}}"},  # continues the text without a delimiter
}


def words(rng: random.Random, shortest: int, longest: int) -> str:
    return " ".join(f"w{rng.randrange(37)}" for _ in range(rng.randint(shortest, longest)))


def greedy(model, tokenizer, context: str) -> str:
    """The word that the model finds most likely."""
    logits = model(tokenizer(context, return_tensors="pt")["input_ids"]).logits[0, -1]
    logits[:3] = -torch.inf  # special tokens are no words
    return tokenizer.decode(logits.argmax())


def loglikelihood(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation alone in its batch, and whether it is the greedy one."""
    num_context = len(tokenizer(context)["input_ids"])
    input_ids = tokenizer(f"{context} {continuation}", return_tensors="pt")["input_ids"]
    log_probs = model(input_ids).logits[0, num_context - 1 : -1].log_softmax(-1)
    targets = input_ids[0, num_context:]
    return log_probs.gather(-1, targets[:, None]).sum().item(), torch.equal(log_probs.argmax(-1), targets)


def evaluate(folder: Path, documents: list[dict], output_type: str, **model) -> dict:
    """Write a task as its users do, a YAML file beside the documents, and run the harness on it by name."""
    data = folder / "documents.json"
    data.write_text(json.dumps(documents))
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "{{question}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "ours.yaml").write_text(yaml.safe_dump(task | TASKS[output_type]))
    # Without the hundreds of tasks that it comes with, whose files take ten seconds to read.
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(tasks=["ours"], task_manager=manager, bootstrap_iters=0, batch_size=4, **model)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("output_type", TASKS)
@pytest.mark.parametrize("how", ["model", "folder"])
@torch.no_grad()
def test_loglikelihoods_and_accuracy_are_the_models(make_model, tokenizer, save, tmp_path, source, output_type, how):
    model = make_model(attnres_source=source)
    rng = random.Random(0)
    documents = []
    for i in range(NUM_DOCUMENTS):
        question = words(rng, 2, 6)
        # Half of the answers are greedy, so that both outcomes of the harness' own check are seen.
        choices = [greedy(model, tokenizer, question), words(rng, 1, 3), words(rng, 1, 3)]
        documents.append({"question": question, "choices": choices, "answer": i % 2})
    if how == "model":
        evaluated = {"model": huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)}
    else:
        evaluated = {"model": "hf", "model_args": {"pretrained": save(model), "device": "cpu"}}
    results = evaluate(tmp_path, documents, output_type, **evaluated)

    correct = []
    samples = sorted(results["samples"]["ours"], key=lambda sample: sample["doc_id"])
    for document, sample in zip(documents, samples, strict=True):
        choices, answer = document["choices"], document["answer"]
        asked = choices if output_type == "multiple_choice" else [choices[answer]]
        expected = [loglikelihood(model, tokenizer, document["question"], choice) for choice in asked]
        for (value, is_greedy), (response,) in zip(expected, sample["resps"], strict=True):
            assert response[0] == pytest.approx(value, abs=1e-4)
            assert response[1] == is_greedy
        values = [value for value, _ in expected]
        correct.append(values.index(max(values)) == answer if len(values) > 1 else expected[0][1])
    assert results["results"]["ours"]["acc,none"] == pytest.approx(sum(correct) / NUM_DOCUMENTS)
    assert 0 < sum(correct) < NUM_DOCUMENTS
