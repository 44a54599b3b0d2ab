"""What a process holds: its memory without what the allocator keeps for later, and without mapped files."""

import ctypes
import ctypes.util
import gc
import sys

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
