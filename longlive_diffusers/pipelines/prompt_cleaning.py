"""The cleaning that every prompt and caption goes through before the tokenizer, in generation and in training.

The model's captions went through it, so prompts must too: to the model, text cleaned differently is different text.
"""

import html
import re

import ftfy


def clean_prompt(prompt: str) -> str:
    """
    Repair text, undo HTML escapes (twice: some captions were escaped twice), and collapse whitespace.

    `ftfy.fix_text` repairs mojibake, straightens curly quotes, and replaces ligatures and full-width forms with plain
    letters. LongLive-2.0 and Wan2.2 clean their captions in the same way.
    """
    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", repaired).strip()
