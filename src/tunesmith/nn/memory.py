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


@functools.cache
def keep_freed_memory() -> bool:
    """Set it for this process. False, with nothing changed, where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    never = (1 << 31) - 1
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK) and mallopt(_M_TRIM_THRESHOLD, never)
    )


def give_back_freed_memory() -> None:
    """Once, now: what is kept in pieces may lack where a large block is wanted."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
