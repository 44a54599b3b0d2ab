"""What a failed command tells its user: one line, in the words of the command line."""

import argparse
import re
from collections.abc import Collection

from .launched import own_rank


# torch's errors where memory is not there, or cannot even be counted; on a GPU it has a class of its own.
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|Storage size calculation overflowed|integer multiplication overflow"
)
_RENAMED = {"num_inference_steps": "steps"}
_LOWER = {
    "window_size": "a smaller --window-size",
    "height": "a smaller --height and --width",
    "kv_cache_dtype": "--kv-cache-dtype fp8 or nvfp4",
    "nvfp4": "--nvfp4 auto",
    "offload": "--offload model",
}


def one_line(error: Exception, args: argparse.Namespace | None) -> str | None:
    """Describe an error that is the user's to mend, in one line; None for any other, which is a bug to be shown whole.

    Args:
        error: What was raised.
        args: The arguments of the command; None where they were not parsed.
    """
    names = set() if args is None else vars(args).keys() - {"run", "prompts", "argv"}  # which are no options
    if is_out_of_memory(error):
        helps = [text for name, text in _LOWER.items() if name in names and (name != "offload" or _is_of_gpu(error))]
        advice = f"; what needs less: {', '.join(helps)}" if helps else ""
        return f"out of memory{advice} ({_first_sentence(error)})"
    if isinstance(error, OSError):
        if error.strerror is None:
            return _joined(str(error))
        return _joined(error.strerror + (f": '{error.filename}'" if error.filename else ""))
    if _is_named(error, "RanksParted"):
        return _joined(str(error))
    if isinstance(error, ValueError):
        return _joined(with_option_names(str(error), names))
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, on a GPU or for the process."""
    if isinstance(error, MemoryError):
        return True
    return _is_of_gpu(error) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None)


def with_option_names(message: str, names: Collection[str]) -> str:
    """Replace what the library calls its arguments, such as `height`, by the options of the command that set them."""

    def option(match: re.Match[str]) -> str:
        name: str = _RENAMED.get(match[1], match[1])
        return f"--{name.replace('_', '-')}" if name in names else match[0]

    return re.sub(r"`(\w+)`", option, message)


def is_told_by_another(error: Exception) -> bool:
    """Whether this is one of several processes that make a video, and another one tells the user of the error: that
    which failed, where this one only ends with it; or the first on this machine, of arguments that all were given."""
    rank = own_rank()
    if _is_named(error, "RanksParted"):  # of a ValueError, the process that had it says nothing: see below
        return not (rank.leads and "failed with ValueError" in str(error))
    return rank.local_index > 0 and isinstance(error, ValueError)


def _is_of_gpu(error: Exception) -> bool:
    return _is_named(error, "OutOfMemoryError")


def _is_named(error: Exception, name: str) -> bool:
    """Whether an error is of a class of torch's or of this package's that only the commands import which need it."""
    return type(error).__name__ == name and type(error).__module__.split(".")[0] in ("torch", "longlive_diffusers")


def _first_sentence(error: Exception) -> str:
    return re.split(r"(?<=[a-z])\. ", _joined(str(error)))[0].removesuffix(".") or type(error).__name__


def _joined(message: str) -> str:
    return " ".join(message.split())
