"""The cleaning that every prompt and caption goes through before the tokenizer, in generation and in training; and
what the tokenizer cuts off.

The model's captions went through it, so prompts must too: to the model, text cleaned differently is different text.
"""

import html
import re

import ftfy
from transformers import PreTrainedTokenizerBase


def clean_prompt(prompt: str) -> str:
    """
    Repair text, undo HTML escapes (twice: some captions were escaped twice), and collapse whitespace.

    `ftfy.fix_text` repairs mojibake, straightens curly quotes, and replaces ligatures and full-width forms with plain
    letters. LongLive-2.0 and Wan2.2 clean their captions in the same way.
    """
    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", repaired).strip()


def shortened(text: str, *, at_start: bool = False, length: int = 60) -> str:
    """Quote a text of any length in a message: a long one without its end, or (`at_start`) without its start."""
    if len(text) <= length:
        return repr(text)
    return repr("..." + text[-length:] if at_start else text[:length] + "...")


def describe_cuts(prompts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Say of every prompt that is longer than `max_length` tokens where it is cut."""
    cuts = []
    for ids in tokenizer(prompts, add_special_tokens=True, truncation=False, verbose=False).input_ids:
        if len(ids) <= max_length:
            continue
        end = max_length - tokenizer.num_special_tokens_to_add()  # what is kept ends with special tokens, too
        kept, rest = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:end], ids[end:]))
        end_of_kept = shortened(kept, at_start=True)
        cuts.append(
            f"A prompt of {len(ids)} tokens is cut to {max_length}: it ends with {end_of_kept}, and {shortened(rest)} "
            "is left out."
        )
    return cuts
