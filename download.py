"""Fetch the official archives of ISIC 2018 Task 1 or Oxford-IIIT Pet: resumable, checked, into whole folders or none.

Nothing is fetched unless asked for (`python dataset.py download --dataset isic|pet --to FOLDER`). An archive arrives in
`NAME.zip.part`, becomes `NAME.zip` once its size is the server's, is unpacked beside it into a hidden folder, and only
a complete folder takes the name NAME. So what is there is whole, and running the command again continues. Of Pet, whose
archives are `NAME.tar.gz`, addresses and MD5 sums are those that torchvision keeps.
"""

from __future__ import annotations

import errno
import gzip
import http.client
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from utils import InputError, pick, progress, write_text

BASE_URL = "https://isic-challenge-data.s3.amazonaws.com/2018/"
SPLITS = ("Training", "Validation", "Test")
DATASETS = ("isic", "pet")
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
# JPEG and PNG do not shrink: an archive that claims to grow tenfold is no archive of images.
MAX_GROWTH = 10
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
)
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
    base_url = _web_address(base_url)
    urls = {name: f"{base_url}{name}.zip" for name in archive_names(splits)}
    _fetch_all(Path(to), urls, unpack, keep_archives, attempts)
    print(f"{to} holds {', '.join(splits)}; look it over with `python dataset.py check --data {to}`")
    return 0


def download_pet(to: Path, base_url: str | None = None, keep_archives: bool = False, attempts: int = 5) -> int:
    """Download and unpack Oxford-IIIT Pet (0.8 GB): `images` and `annotations` in the folder `to`.

    A folder that is already there is left alone; a `NAME.tar.gz` that was put there by hand is unpacked, not fetched.
    The other arguments are those of `download`; base_url: another place that has the same files.

    Returns: 0. Raises InputError as `download` does, and when an archive has not the MD5 sum that torchvision knows.
    """
    from torchvision.datasets import OxfordIIITPet  # here because only this command needs it
    from torchvision.datasets.utils import check_md5

    known = {url.rsplit("/", 1)[-1]: (url, md5) for url, md5 in OxfordIIITPet._RESOURCES}
    urls = {file.removesuffix(".tar.gz"): url for file, (url, _) in known.items()}
    if base_url is not None:
        urls = {name: _web_address(base_url) + url.rsplit("/", 1)[-1] for name, url in urls.items()}

    def unpack_known(archive: Path, folder: Path) -> None:
        if not check_md5(str(archive), known[archive.name][1]):
            raise InputError(
                f"archive {archive} has not the MD5 sum {known[archive.name][1]} of the official one: it is damaged or "
                "another file; delete it and run the same command again"
            )
        unpack_tar(archive, folder)

    _fetch_all(Path(to), urls, unpack_known, keep_archives, attempts)
    print(f"{to} holds Oxford-IIIT Pet; look it over with `python dataset.py check --data {to}`")
    return 0


def fetch_dataset(
    dataset: str,
    to: Path,
    splits: Sequence[str] | None = None,
    base_url: str | None = None,
    keep_archives: bool = False,
) -> int:
    """Download and unpack ISIC 2018 Task 1 (12.8 GB) or Oxford-IIIT Pet (0.8 GB); see `download`, `download_pet`."""
    if dataset == "isic":
        return download(to, splits or SPLITS, base_url or BASE_URL, keep_archives)
    pick("data set", dataset, dict.fromkeys(DATASETS))
    if splits is not None:
        raise InputError("--splits is of ISIC's archives; Pet comes as a whole, so leave it out")
    return download_pet(to, base_url, keep_archives)


def _web_address(base_url: str) -> str:
    if not base_url.startswith(("https://", "http://")):
        raise InputError(f"base URL {base_url} is not a web address; it starts with https:// or http://")
    try:
        host = urlsplit(base_url).hostname
    except ValueError as error:
        raise InputError(f"base URL {base_url} is not a web address ({error}); correct it") from error
    if not host:
        raise InputError(f"base URL {base_url} names no server; write https://SERVER/FOLDER")
    return base_url.rstrip("/") + "/"


def _fetch_all(
    to: Path, urls: dict[str, str], unpack: Callable[[Path, Path], None], keep_archives: bool, attempts: int
) -> None:
    """Bring each folder NAME of `urls` about in `to`, from the archive at its address or one that is there already."""
    if to.exists() and not to.is_dir():
        raise InputError(f"{to} is a file; name a folder with --to")
    archives = {name: to / url.rsplit("/", 1)[-1] for name, url in urls.items() if not _holds_files(to / name)}
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {to} ({error.strerror}); name another with --to") from error
    absent = {name: urls[name] for name, archive in archives.items() if not archive.exists()}
    remotes = {name: _ask(url, to, [*absent.values()]) for name, url in absent.items()}
    _check_space(to, remotes, archives, keep_archives)
    for name, archive in archives.items():
        if name in remotes:
            print(f"fetching {name} ({remotes[name].size / 1e9:.2f} GB)")
            fetch(remotes[name], archive, attempts=attempts)
        unpack(archive, to / name)
        if not keep_archives:
            archive.unlink()


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _remedy(urls: Sequence[str], folder: Path) -> str:
    places = [f"{url} elsewhere and put it at {folder / url.rsplit('/', 1)[-1]}" for url in urls]
    return f"check the connection and run the same command again (it continues), or fetch {', and '.join(places)}"


def _ask(url: str, folder: Path, wanted: Sequence[str]) -> Remote:
    """Size and version of the file at `url`, from a HEAD request; `wanted`: the addresses to name where that fails."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        raise InputError(f"{url} answers {error.code} {error.reason}; check --base-url and the name") from error
    except TRANSFER_ERRORS as error:
        raise InputError(
            f"cannot reach {url} ({getattr(error, 'reason', error)}); {_remedy(wanted, folder)}"
        ) from error
    length = headers.get("Content-Length", "")
    if not length.isdigit():
        raise InputError(f"{url} does not tell its size, so it cannot be checked; use another --base-url")
    return Remote(url, int(length), headers.get("ETag") or headers.get("Last-Modified") or "")


def _check_space(to: Path, remotes: dict[str, Remote], archives: dict[str, Path], keep_archives: bool) -> None:
    """Refuse before the first byte when the archives and their contents do not fit (contents: as large as those)."""
    sizes = [remotes[name].size if name in remotes else path.stat().st_size for name, path in archives.items()]
    parts = [archives[name].with_name(archives[name].name + ".part") for name in remotes]
    begun = sum(part.stat().st_size for part in parts if part.exists())
    kept = sum(remote.size for remote in remotes.values()) if keep_archives else max(sizes, default=0)
    needed, free = sum(sizes) + kept - begun, shutil.disk_usage(to).free
    if needed > free:
        raise InputError(
            f"{to} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; free some space, name another "
            "folder with --to, or (of ISIC) ask for fewer --splits"
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
        f"{remote.url} stopped after {size:,} of {remote.size:,} bytes ({reason}); "
        + _remedy([remote.url], target.parent)
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
    with _whole_folder(archive, folder) as temporary, zipfile.ZipFile(archive) as source:
        members = [member for member in source.infolist() if not member.is_dir()]
        _refuse_unsafe(archive, members)
        for member in progress(members, desc=f"unpacking {folder.name}", unit="file"):
            path = temporary / member.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            # zipfile stops at the declared size and checks the CRC at the end, so no second pass is needed.
            with source.open(member) as stream, open(path, "wb") as file:
                shutil.copyfileobj(stream, file, CHUNK)


def unpack_tar(archive: Path, folder: Path) -> None:
    """As `unpack`, of a .tar.gz, in one pass: it has no table of contents, so each member is looked at in its turn."""
    total, limit = 0, MAX_GROWTH * archive.stat().st_size
    with (
        _whole_folder(archive, folder) as temporary,
        gzip.open(archive) as stream,
        tarfile.open(fileobj=stream) as source,
    ):
        temporary.mkdir(parents=True)
        for member in progress(source, desc=f"unpacking {folder.name}", unit="file"):
            total += member.size
            if _odd(member.name) or not (member.isreg() or member.isdir()):
                raise _unsafe(archive, member.name)
            if total > limit:
                raise InputError(_too_large(archive, "files", total, limit))
            source.extract(member, temporary, filter="data")
        if not total:
            raise InputError(_too_large(archive, "0 files", total, limit))
        while stream.read(CHUNK):  # gzip compares its checksum at the very end, which a tar's reader does not reach
            pass


@contextmanager
def _whole_folder(archive: Path, folder: Path) -> Iterator[Path]:
    """A hidden place beside `folder` that takes its name once the block has filled it; else nothing of it stays."""
    temporary = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        yield temporary
        inner = temporary / folder.name
        (inner if inner.is_dir() else temporary).rename(folder)
    except tarfile.FilterError as error:
        raise _unsafe(archive, error.tarinfo.name) from error
    except DAMAGED as error:
        raise InputError(
            f"archive {archive} is damaged ({error}); delete {archive} and run the same command again"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot unpack {archive} ({error.strerror or error}); free some space or use another --to"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _odd(name: str) -> bool:
    """Whether a member's name may lead out of the folder that it is unpacked into."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or any(sign in name for sign in "\\:\0")


def _unsafe(archive: Path, name: str) -> InputError:
    return InputError(
        f"archive {archive} holds {name!r}: a path outside the folder, a link or an encrypted file; "
        "nothing was unpacked: delete it and fetch the official one"
    )


def _too_large(archive: Path, files: str, total: int, limit: int) -> str:
    return (
        f"archive {archive} claims {files} of {total:,} bytes in all (limit {limit:,}); "
        "nothing was unpacked: delete it and fetch the official one"
    )


def _refuse_unsafe(archive: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    for member in members:
        if _odd(member.filename) or stat.S_ISLNK(member.external_attr >> 16) or member.flag_bits & 1:
            raise _unsafe(archive, member.filename)
    total, limit = sum(member.file_size for member in members), MAX_GROWTH * archive.stat().st_size
    if not members or total > limit:
        raise InputError(_too_large(archive, f"{len(members)} files", total, limit))
