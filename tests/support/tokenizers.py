"""Small tokenizers of several families, trained on the task's own prompts."""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from attnres.tasks import TextRecall

KINDS = ("qwen", "gpt2", "metaspace", "wordpiece")
"""Digits one by one, as Qwen's; digits in runs; spaces joined to words, and a BOS; lower case, with CLS and SEP."""


def texts() -> list[str]:
    tasks = [
        TextRecall(num_pairs=8, template=template, alphabet=alphabet, code_length=length, distance=2)
        for template in ("list", "sentences", "question")
        for alphabet, length in (("digits", 4), ("letters", 3), ("words", 2))
    ]
    return [example.prompt + example.answer for task in tasks for example in map(task.example, range(25))]


@cache
def make(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `KINDS`; "greedy" is one that joins whatever often stands together, across words."""
    is_bytes = kind in ("qwen", "gpt2")
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
        tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
        trainer = trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=None if is_bytes else "<unk>"))
        split = [] if kind == "greedy" else [_pre_tokenizer(kind)]
        if is_bytes:
            split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2"))
            tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        if split:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<unk>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if is_bytes else [],
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts(), trainer)
    before, after = {"wordpiece": ("[CLS] ", " [SEP]"), "metaspace": ("<s> ", "")}.get(kind, ("", ""))
    if before:
        added = [(token, tokenizer.token_to_id(token)) for token in f"{before}{after}".split()]
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{before}$A{after}", special_tokens=added
        )
    unknown = {"wordpiece": "[UNK]", "metaspace": "<unk>", "greedy": "<unk>"}.get(kind)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind == "metaspace":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        )
    # Qwen's own expression, but for its contractions; GPT-2's comes with ByteLevel.
    qwen = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Split(Regex(qwen if kind == "qwen" else "$^"), "isolated")
