"""One process in a results folder at once: the second is refused by a sentence that names the first.

A lock is the system's, on the file `.lock` in the folder, which also says who has it. So it goes with the process that
held it, however that ended: what is found of a dead one is taken over without a question. The cells of a grid have
locks of their own (`studies.grid`), since several processes share that folder on purpose.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which locks in another way
    fcntl = None
    import msvcrt

from sentences import InputError

LOCK = ".lock"
BYTE = 1 << 30  # the byte that is locked: far behind the text, which Windows then lets others read
# Folders of this process: the system's locks do not tell a process from itself, and closing the file again gives the
# lock up.
_HELD: dict[Path, int] = {}


def _claim(stream) -> bool:
    """Lock the file; False when another process has it. OSError where the disk knows no locks."""
    if fcntl is None:
        stream.seek(BYTE)
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _refusal(folder: Path) -> InputError:
    try:
        who = (folder / LOCK).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        who = ""
    return InputError(
        f"another process is at work in {folder}{f': {who}' if who else ''}; wait for it, end it, or choose another "
        "folder with --out"
    )


def refuse_busy(folder: Path) -> None:
    """Refuse a folder that another process is at work in; writes nothing."""
    path = Path(folder) / LOCK
    if path.resolve() in _HELD or not path.is_file():
        return
    with contextlib.suppress(OSError), open(path, "r+b") as stream:  # not ours to write, or a disk without locks
        if not _claim(stream):
            raise _refusal(Path(folder))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Around work in a folder that is there: a second process is refused. This process may enter several times."""
    path = Path(folder) / LOCK
    key = path.resolve()
    if key in _HELD:
        yield
        return
    with open(path, "a+b") as stream:
        try:
            free = _claim(stream)
        except OSError:  # a disk that knows no locks: two processes in one folder then go unnoticed
            free = True
        if not free:
            raise _refusal(Path(folder))
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name}), since ".encode())
        stream.write(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}\n".encode())
        stream.flush()
        _HELD[key] = os.getpid()
        try:
            yield
        finally:
            del _HELD[key]
