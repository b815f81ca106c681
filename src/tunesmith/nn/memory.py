"""Keep the memory that a step freed for the next step, instead of giving it back to the kernel.

Every step allocates the same large tensors. glibc maps a large block afresh each time, and each of
its pages then costs a fault: a third of the time of the products that write such blocks.
"""

import contextlib
import ctypes
import functools

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_HEAP_BLOCK = 32 << 20
"""The most that glibc accepts; larger blocks are mapped as before."""
_SMALLEST_OWN_BLOCK = 1 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Set it for this process. False, with nothing changed, where the C library is not glibc."""
    return _set_thresholds(_LARGEST_HEAP_BLOCK, (1 << 31) - 1)


def give_back_at_once() -> bool:
    """The opposite, for a model that is shared out: blocks of weights come and go all the time,
    and glibc fits no aligned block into the hole that one of the same size has left."""
    return _set_thresholds(_SMALLEST_OWN_BLOCK, _SMALLEST_OWN_BLOCK)


def _set_thresholds(mapped: int, trimmed: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, mapped) and mallopt(_M_TRIM_THRESHOLD, trimmed))


def give_back_freed_memory() -> None:
    """Once, now: what is kept in pieces may lack where a large block is wanted."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
