"""What a process holds: its memory without what the allocator keeps for later, and without mapped files."""

import ctypes
import ctypes.util
import gc
import sys
from collections.abc import Sequence

import psutil


def held_bytes() -> int:
    """
    Return the memory that this process holds, in bytes.

    Resident memory alone is no measure of a leak: the allocator keeps freed blocks, as many as happened to lie between
    others, and the kernel drops and reads again the pages of mapped files. On Linux, freed blocks are given back
    first, and what the process wrote itself is counted, in memory or swapped out. Elsewhere, this is resident memory.
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        return psutil.Process().memory_info().rss
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "malloc_trim"):  # glibc has it, musl has not
        libc.malloc_trim(0)
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return sum(1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def growth(held: Sequence[int]) -> int:
    """
    Return by how many bytes more is held in the later half than in the earlier one, each at its least.

    Peaks are of what was being computed just then; what is never given back raises the least as well.

    Args:
        held: What was held after equal pieces of work. The first does not count: some things stay from then on.
    """
    half = (len(held) + 1) // 2
    return min(held[half:]) - min(held[1:half])
