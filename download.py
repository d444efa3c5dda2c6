"""Fetch the official ISIC 2018 Task 1 archives and unpack them: resumable, size-checked, into whole folders or none.

Nothing is fetched unless `download` is called (`python dataset.py download --to FOLDER`). An archive arrives in
`NAME.zip.part`, becomes `NAME.zip` once its size is the server's, is unpacked beside it into a hidden folder, and only
a complete folder takes the name NAME. So what is there is whole, and running the command again continues.
"""

from __future__ import annotations

import errno
import http.client
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from utils import InputError, progress, write_text

BASE_URL = "https://isic-challenge-data.s3.amazonaws.com/2018/"
SPLITS = ("Training", "Validation", "Test")
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
# JPEG and PNG do not shrink: an archive that claims to grow tenfold is no archive of images.
MAX_GROWTH = 10
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
TRANSFER_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Remote:
    """What the server says of an archive: `version` (ETag or date) tells a changed file from the one begun."""

    url: str
    size: int
    version: str


def archive_names(splits: Sequence[str] = SPLITS) -> list[str]:
    """The names of the image and mask archives, without '.zip'; each holds one folder of that name."""
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise InputError(f"unknown split {unknown[0]!r}; choose among {', '.join(SPLITS)}")
    return [
        name for split in splits for name in (f"ISIC2018_Task1-2_{split}_Input", f"ISIC2018_Task1_{split}_GroundTruth")
    ]


def download(
    to: Path,
    splits: Sequence[str] = SPLITS,
    base_url: str = BASE_URL,
    keep_archives: bool = False,
    attempts: int = 5,
) -> int:
    """Download and unpack ISIC 2018 Task 1 (Training 10.4 GB, Validation 0.2 GB, Test 2.2 GB).

    A folder that is already there is left alone; a `NAME.zip` that was put there by hand is unpacked, not fetched.

    Args:
        to: folder to unpack into
        splits: which of Training, Validation and Test
        base_url: where the archives are
        keep_archives: keep each .zip after it has been unpacked
        attempts: how often one archive's transfer is tried before giving up

    Returns: 0. Raises InputError with the remedy when offline, out of space, or when an archive is not what it should.
    """
    to, base_url = Path(to), base_url.rstrip("/") + "/"
    if not base_url.startswith(("https://", "http://")):
        raise InputError(f"base URL {base_url} is not a web address; it starts with https:// or http://")
    if to.exists() and not to.is_dir():
        raise InputError(f"{to} is a file; name a folder with --to")
    missing = [name for name in archive_names(splits) if not _holds_files(to / name)]
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {to} ({error.strerror}); name another with --to") from error
    remotes = {name: _ask(base_url + name + ".zip", to) for name in missing if not (to / f"{name}.zip").exists()}
    _check_space(to, remotes, missing, keep_archives)
    for name in missing:
        archive = to / f"{name}.zip"
        if name in remotes:
            print(f"fetching {name} ({remotes[name].size / 1e9:.2f} GB)")
            fetch(remotes[name], archive, attempts=attempts)
        unpack(archive, to / name)
        if not keep_archives:
            archive.unlink()
    print(f"{to} holds {', '.join(splits)}; look it over with `python dataset.py check --data {to}`")
    return 0


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _remedy(url: str, folder: Path) -> str:
    name = url.rsplit("/", 1)[-1]
    return (
        f"check the connection and run the same command again (it continues), or fetch {url} elsewhere and put it "
        f"at {folder / name}"
    )


def _ask(url: str, folder: Path) -> Remote:
    """Size and version of the file at `url`, from a HEAD request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        raise InputError(f"{url} answers {error.code} {error.reason}; check --base-url and the name") from error
    except TRANSFER_ERRORS as error:
        raise InputError(f"cannot reach {url} ({getattr(error, 'reason', error)}); {_remedy(url, folder)}") from error
    length = headers.get("Content-Length", "")
    if not length.isdigit():
        raise InputError(f"{url} does not tell its size, so it cannot be checked; use another --base-url")
    return Remote(url, int(length), headers.get("ETag") or headers.get("Last-Modified") or "")


def _check_space(to: Path, remotes: dict[str, Remote], missing: Sequence[str], keep_archives: bool) -> None:
    """Refuse before the first byte when the archives and their contents do not fit (contents: as large as the zip)."""
    sizes = [remotes[name].size if name in remotes else (to / f"{name}.zip").stat().st_size for name in missing]
    begun = sum(part.stat().st_size for name in remotes if (part := to / f"{name}.zip.part").exists())
    archives = sum(remote.size for remote in remotes.values()) if keep_archives else max(sizes, default=0)
    needed, free = sum(sizes) + archives - begun, shutil.disk_usage(to).free
    if needed > free:
        raise InputError(
            f"{to} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; free some space, name another "
            "folder with --to, or ask for fewer --splits"
        )


def fetch(remote: Remote, target: Path, *, attempts: int = 5, pause: float = 2.0) -> None:
    """Download into `target`.part, continuing what is there, and give it its name when its size is right.

    `pause`: seconds before the second attempt, doubled before each further one.
    """
    if attempts < 1:
        raise InputError(f"{attempts} attempts were asked for; use at least 1")
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".version")
    if part.exists() and (not note.exists() or note.read_text(encoding="utf-8") != remote.version):
        part.unlink()  # begun from another version of the file: the halves would not fit
    write_text(note, remote.version)
    for attempt in range(attempts):
        reason = _transfer(remote, part)
        size = part.stat().st_size if part.exists() else 0
        if size == remote.size:
            part.replace(target)
            note.unlink()
            return
        if size > remote.size:
            part.unlink()
            raise InputError(f"{remote.url} sent more than its {remote.size:,} bytes; run the same command again")
        if attempt + 1 < attempts:
            time.sleep(pause * 2**attempt)
    raise InputError(
        f"{remote.url} stopped after {size:,} of {remote.size:,} bytes ({reason}); {_remedy(remote.url, target.parent)}"
    )


def _transfer(remote: Remote, part: Path) -> str:
    """One attempt at the rest of the file; what stopped it, in words."""
    start = part.stat().st_size if part.exists() else 0
    if start >= remote.size:
        return "nothing was left to send"
    request = urllib.request.Request(remote.url)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if remote.version and not remote.version.startswith("W/"):  # a weak tag cannot promise the same bytes
            request.add_header("If-Range", remote.version)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            _receive(answer, part, start, remote)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # our part does not fit this file: begin again
            part.unlink()
        return f"{error.code} {error.reason}"
    except TRANSFER_ERRORS as error:
        return str(getattr(error, "reason", error) or type(error).__name__)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            return str(error)
        raise InputError(f"cannot write {part} ({error.strerror}); free some space or use another --to") from error
    return "the connection ended early"


def _receive(answer, part: Path, start: int, remote: Remote) -> None:
    """Append when the server continues at our byte (206), start over when it sends the whole file (200)."""
    continued = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-") and answer.status == 206
    if answer.status == 206 and not continued:
        raise http.client.HTTPException(f"asked from byte {start}, got {answer.headers.get('Content-Range')}")
    first = start if continued else 0
    options = {"total": remote.size, "initial": first, "unit": "B", "unit_scale": True, "desc": part.stem}
    with open(part, "ab" if continued else "wb") as file, progress(**options) as bar:
        while (chunk := answer.read(CHUNK)) and file.tell() <= remote.size:
            file.write(chunk)
            bar.update(len(chunk))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip into `folder`, which appears only when every member has been read and its checksum was right.

    The members may lie in a folder of the same name or at the top. Refused: absolute paths, '..', links, encrypted
    members, and contents of more than MAX_GROWTH times the archive's size. The archive itself is left as it is.
    """
    temporary = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    again = f"delete {archive} and run the same command again"
    try:
        with zipfile.ZipFile(archive) as source:
            members = [member for member in source.infolist() if not member.is_dir()]
            _refuse_unsafe(archive, members)
            for member in progress(members, desc=f"unpacking {folder.name}", unit="file"):
                path = temporary / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                # zipfile stops at the declared size and checks the CRC at the end, so no second pass is needed.
                with source.open(member) as stream, open(path, "wb") as file:
                    shutil.copyfileobj(stream, file, CHUNK)
        inner = temporary / folder.name
        (inner if inner.is_dir() else temporary).rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(f"archive {archive} is damaged ({error}); {again}") from error
    except OSError as error:
        raise InputError(
            f"cannot unpack {archive} ({error.strerror or error}); free some space or use another --to"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_unsafe(archive: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    for member in members:
        path = PurePosixPath(member.filename)
        odd = path.is_absolute() or ".." in path.parts or any(sign in member.filename for sign in "\\:\0")
        if odd or stat.S_ISLNK(member.external_attr >> 16) or member.flag_bits & 1:
            raise InputError(
                f"archive {archive} holds {member.filename!r}: a path outside the folder, a link or an encrypted file; "
                "nothing was unpacked: delete it and fetch the official one"
            )
    total, limit = sum(member.file_size for member in members), MAX_GROWTH * archive.stat().st_size
    if not members or total > limit:
        raise InputError(
            f"archive {archive} claims {len(members)} files of {total:,} bytes in all (limit {limit:,}); "
            "nothing was unpacked: delete it and fetch the official one"
        )
