"""How long lists of names are told in messages."""

from collections.abc import Iterable


def first_names(names: Iterable[str], most: int = 4) -> str:
    """Return the first names, and dots if there are more."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
