"""Other people's programs, on our models. `make test-clients` installs them; a module without its client skips."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import SMALL_SHAPE


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the words w0, w1, …, as many as a small model knows."""
    special = ["<pad>", "<unk>", "<eos>"]
    words = [f"w{i}" for i in range(SMALL_SHAPE["vocab_size"] - len(special))]
    vocabulary = {word: i for i, word in enumerate(special + words)}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture
def save(tmp_path, tokenizer) -> Callable[[PreTrainedModel], str]:
    """Put a model and the tokenizer into a folder, as a user of the clients has them."""

    def save(model: PreTrainedModel) -> str:
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save
