"""Tables in Markdown, as reports and READMEs have them."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right_aligned: bool = False) -> str:
    """
    Format a table.

    Args:
        header: The names of the columns.
        rows: The cells of each row.
        right_aligned: Whether all columns but the first are aligned to the right, as numbers are.
    """
    rest = "---:" if right_aligned else "---"
    lines = [header, ["---", *[rest] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
