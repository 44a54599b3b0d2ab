"""A real tokenizer of a few words."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


WORDS = ("a", "cat", "dog", "fox", "runs", "sleeps", "on", "the", "grass", "in", "snow", ".")
SPECIAL = ("<pad>", "</s>", "<unk>")
VOCABULARY_SIZE = len(SPECIAL) + len(WORDS)


def tiny_tokenizer(words: Sequence[str] = WORDS, *, lowercase: bool = False, **options) -> PreTrainedTokenizerFast:
    """One token for each word; others are unknown."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **options
    )
