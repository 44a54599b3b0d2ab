"""Names of files and folders as people mean them: numbers are ordered by their value, and an accent is an accent."""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path


def natural_order(name: str) -> list[tuple[str, int, str]]:
    """
    Return a key to sort names by, in which numbers are ordered by their value: 1, 2, ..., 10, 11. Everything else is
    ordered as plain strings are, so names that are padded with zeros to one length keep their plain order.
    """
    key = []
    for part in re.findall(r"[0-9]+|[^0-9]", name):
        if "0" <= part[0] <= "9":
            digits = part.lstrip("0")
            key.append(("0", len(digits), digits))
        else:
            key.append((part, 0, ""))
    return [*key, ("", 0, name)]  # "1" and "01" are equal up to here


def plain_name(name: str) -> str:
    """
    Return a name in the form in which it is compared, printed and stored: with composed accents (macOS stores "é" as
    "e" and an accent), and with escapes for what cannot be written in UTF-8.
    """
    return unicodedata.normalize("NFC", writable(name))


def writable(text: str) -> str:
    """Return a text, for example a message that names a file, with escapes for what cannot be written in UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def visible(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted, but what is hidden."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def by_plain_name(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the paths by their plain names without suffix, in natural order of these."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(plain_name(path.stem), []).append(path)
    return {name: found[name] for name in sorted(found, key=natural_order)}


def find_file(folder: Path, name: str) -> Path | None:
    """Return the path of a file that is named relative to a folder, perhaps with accents encoded in another way; None
    if there is none."""
    path = folder / name
    if not os.path.exists(path) and os.path.isdir(path.parent):
        alike = [other for other in visible(path.parent) if plain_name(other.name) == plain_name(path.name)]
        path = alike[0] if alike else path
    return path if os.path.isfile(path) else None
