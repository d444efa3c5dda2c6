"""Errors as sentences: what the user gave, or what the machine refuses, in one line with its remedy.

A bug of ours is none of these and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator

from safetensors import SafetensorError

GO_ON = "what is finished is kept, and the same command goes on from there"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
REMEDIES = dict.fromkeys(FULL, "free some space there; what was written before is whole, and the same command goes on")
REMEDIES |= dict.fromkeys(FORBIDDEN, "change its permissions, or name another place")
REMEDIES |= {
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EMFILE: "raise the limit (`ulimit -n 4096`), or use fewer workers",
    errno.EIO: "look after that disk; what was written before is whole, and the same command goes on",
}


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and the remedy."""


def sentence_of(error: BaseException) -> str | None:
    """What to say of an error that is no bug of ours: bad input, a disk that refuses, memory that is not there."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError) or _out_of_memory(error):
        told = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return f"not enough memory{told}; lower batch_size, image_size, jobs or workers, or take a larger machine"
    if isinstance(error, SafetensorError):  # its own kind of error for a disk that refuses
        number = next((number for number in REMEDIES if f"(os error {number})" in str(error)), None)
        return None if number is None else f"a file could not be written ({error}); {REMEDIES[number]}"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f"{error.filename}: " if error.filename else "the disk refuses: "
        return f"{where}{error.strerror}; {REMEDIES[error.errno]}"
    return None


def _out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch found no memory, of a GPU or of the CPU; told by name, so that this room needs no PyTorch."""
    told = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, RuntimeError) and told


@contextlib.contextmanager
def sentences_instead_of_tracebacks(stopped: str = GO_ON) -> Iterator[None]:
    """Around a command line: errors that are no bugs become one line on stderr and exit code 2, Ctrl-C 130.

    stopped : what is left where the user stopped it
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        raise SystemExit(130) from None
    except (InputError, OSError, MemoryError, RuntimeError, SafetensorError) as error:
        said = sentence_of(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(2) from None
