"""Read JSON that users or other programs wrote, which may hold anything."""

import json
from pathlib import Path


def read_json(path: Path) -> object:
    """
    Return the content of a JSON file in UTF-8, with or without a mark at its beginning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is not JSON. The message says why, and begins with a verb.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not JSON in UTF-8: {error}") from error
    return parse_json(text)


def parse_json(text: str) -> object:
    """
    Return the value of a JSON text.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or has a number that is too long. The message begins with
            a verb.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    except ValueError as error:  # Python's limit on the digits of a number
        raise ValueError("has a number of too many digits") from error
