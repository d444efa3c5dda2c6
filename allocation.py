"""Let a CPU process keep the memory it frees: training asks for the same large blocks at every step.

glibc gives every freed block above 32 MB back to the system and gets it again, zeroed page by page, at the next step.
"""

from __future__ import annotations

import ctypes
import platform

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """For the rest of this process; True where the C library took the advice (glibc, so: most Linux systems).

    Other threads share one pool, so that what one frees the others can use. The peak stays what it was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_ARENA_MAX, 1)])
