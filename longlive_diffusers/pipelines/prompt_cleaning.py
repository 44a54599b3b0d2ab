"""The cleaning that every prompt and caption goes through before the tokenizer, in generation and in training.

The model's captions went through it, so prompts must: text that was cleaned differently is another text to it.
"""

import html
import re

import ftfy


def clean_prompt(prompt: str) -> str:
    """
    Repair text, undo HTML escapes (twice: some captions were escaped twice), and collapse white space.

    `ftfy.fix_text` decodes mojibake again, straightens curly quotes, and replaces ligatures and full-width forms by
    plain letters. LongLive-2.0 and Wan2.2 clean their captions so.
    """
    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", repaired).strip()
