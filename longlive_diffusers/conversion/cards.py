"""What the card of a pipeline that was made from another one says of its origin: where it is, and its license."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..pipelines.sharing import load_model_card
from ..user_path import user_path


_LICENSE_FIELDS = ("license", "license_name", "license_link")


def origin_details(source: str | os.PathLike) -> dict[str, Any]:
    """
    Return what the card of a pipeline that is made from another one inherits from the other's.

    Args:
        source: The folder or the repository of the other pipeline.

    Returns:
        Arguments of `render_model_card`: the license, if its card states one, and `base_model`: the repository, or,
        for a folder, what the folder's card names. A folder of this machine means nothing to others.
    """
    folder = user_path(source)
    card = _local_card(folder / "README.md") if folder.is_dir() else load_model_card(str(source))
    stated = {} if card is None else card.data.to_dict()
    details = {name: stated[name] for name in _LICENSE_FIELDS if isinstance(stated.get(name), str)}
    base = stated.get("base_model") if folder.is_dir() else str(source)
    return {**details, "base_model": base if isinstance(base, str) else None}


def _local_card(path: Path) -> ModelCard | None:
    """Read a card as a person wrote it; None if there is none, or its front matter is not what the Hub reads."""
    try:
        return ModelCard.load(path)
    except (OSError, ValueError):
        return None
