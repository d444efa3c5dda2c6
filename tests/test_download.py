"""The downloader against a local server: whole, interrupted, changed, cut short, wrong and hostile archives."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import shutil
import stat
import tarfile
import threading
import zipfile
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import OxfordIIITPet

import dataset
import download as room
from download import Remote, archive_names, download, download_pet, fetch, unpack, unpack_tar
from utils import InputError


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.faults` says how the next answers misbehave."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        data = self.server.files.get(self.path.lstrip("/"))
        if data is None:
            return self.send_error(404)
        if body:
            self.server.ranges.append(self.headers.get("Range"))
        start = 0
        wanted = self.headers.get("Range")
        fresh = self.headers.get("If-Range", self.server.etag) == self.server.etag
        if wanted and fresh and self.server.ranged:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            stop = self.server.faults.pop(0) if self.server.faults else None
            self.wfile.write(data[start:] if stop is None else data[start : start + stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.faults, running.ranges = {}, [], []
        running.ranged, running.etag = True, '"v1"'
        running.url = f"http://127.0.0.1:{running.server_port}/"
        thread = threading.Thread(target=functools.partial(running.serve_forever, poll_interval=0.01))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def publish(server, split: str = "Test", ids=("ISIC_1", "ISIC_2")) -> None:
    """Put the two archives of a split on the server, as the official ones are laid out."""
    inputs, masks = archive_names([split])
    generator = np.random.default_rng(0)
    photos = {f"{inputs}/{id_}.jpg": encoded(generator.integers(0, 255, (20, 24, 3), np.uint8), "JPEG") for id_ in ids}
    mask = np.pad(np.full((8, 8), 255, np.uint8), ((6, 6), (8, 8)))
    server.files[f"{inputs}.zip"] = zipped({f"{inputs}/": b"", f"{inputs}/LICENSE.txt": b"terms", **photos})
    server.files[f"{masks}.zip"] = zipped({f"{masks}/{id_}_segmentation.png": encoded(mask, "PNG") for id_ in ids})


def remote(server, name: str = "a.zip") -> Remote:
    return Remote(server.url + name, len(server.files[name]), server.etag)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_command_fetches_folders_that_find_splits_reads(server, tmp_path):
    publish(server)
    command = ["download", "--to", str(tmp_path / "data"), "--splits", "Test", "--base-url", server.url]
    assert dataset.main(command) == 0
    assert names(tmp_path / "data") == set(archive_names(["Test"]))
    assert [pair.id for pair in dataset.find_splits(tmp_path / "data")["test"]] == ["ISIC_1", "ISIC_2"]


def test_complete_folders_are_not_fetched_again_and_archives_stay_on_request(server, tmp_path):
    publish(server)
    download(tmp_path, ["Test"], server.url, keep_archives=True)
    assert names(tmp_path) == {name + end for name in archive_names(["Test"]) for end in ("", ".zip")}
    seen = len(server.ranges)
    download(tmp_path, ["Test"], server.url)
    assert len(server.ranges) == seen == 2


def test_an_archive_put_there_by_hand_needs_no_network(server, tmp_path):
    publish(server)
    for name in archive_names(["Test"]):
        (tmp_path / f"{name}.zip").write_bytes(server.files[f"{name}.zip"])
    download(tmp_path, ["Test"], "http://127.0.0.1:9/")
    assert names(tmp_path) == set(archive_names(["Test"]))


def test_an_interrupted_transfer_goes_on_from_its_last_byte(server, tmp_path):
    server.files["a.zip"] = data = bytes(np.random.default_rng(1).integers(0, 256, 300_000, np.uint8))
    server.faults = [100_000]
    with pytest.raises(InputError, match=r"stopped after 100,000 of 300,000 bytes.*run the same command again"):
        fetch(remote(server), tmp_path / "a.zip", attempts=1)
    assert not (tmp_path / "a.zip").exists()
    fetch(remote(server), tmp_path / "a.zip", attempts=1)
    assert server.ranges == [None, "bytes=100000-"]
    assert (tmp_path / "a.zip").read_bytes() == data and names(tmp_path) == {"a.zip"}


def test_a_dropped_connection_is_tried_again_at_once(server, tmp_path):
    server.files["a.zip"] = data = bytes(range(256)) * 500
    server.faults = [10, 1000]
    fetch(remote(server), tmp_path / "a.zip", attempts=3, pause=0.01)
    assert (tmp_path / "a.zip").read_bytes() == data
    assert server.ranges == [None, "bytes=10-", "bytes=1010-"]


def test_a_server_without_ranges_is_asked_for_the_whole(server, tmp_path):
    server.files["a.zip"] = data = bytes(range(256)) * 500
    server.faults, server.ranged = [1000], False
    fetch(remote(server), tmp_path / "a.zip", attempts=2, pause=0.01)
    assert (tmp_path / "a.zip").read_bytes() == data


@pytest.mark.parametrize("noticed", ["before", "during"])
def test_halves_of_two_versions_are_never_joined(server, tmp_path, noticed):
    server.files["a.zip"] = b"a" * 5000
    server.faults = [2000]
    old = remote(server)
    with pytest.raises(InputError):
        fetch(old, tmp_path / "a.zip", attempts=1)
    server.files["a.zip"], server.etag = b"b" * 5000, '"v2"'
    fetch(remote(server) if noticed == "before" else old, tmp_path / "a.zip", attempts=1)
    assert (tmp_path / "a.zip").read_bytes() == b"b" * 5000


def test_a_file_of_another_size_than_announced_is_refused(server, tmp_path):
    server.files["a.zip"] = b"a" * 5000
    for size in (4000, 6000):
        with pytest.raises(InputError, match=r"a\.zip"):
            fetch(Remote(server.url + "a.zip", size, ""), tmp_path / "a.zip", attempts=1)
        assert not (tmp_path / "a.zip").exists()


def test_offline_says_where_to_put_the_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot reach http://127\.0\.0\.1:9/.*put it at .*Test_Input\.zip"):
        download(tmp_path, ["Test"], "http://127.0.0.1:9/")


def test_a_missing_archive_an_unknown_split_and_a_file_as_folder_are_named(server, tmp_path):
    with pytest.raises(InputError, match=r"answers 404.*--base-url"):
        download(tmp_path, ["Test"], server.url)
    with pytest.raises(InputError, match="unknown split 'Tset'"):
        download(tmp_path, ["Tset"], server.url)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        download(tmp_path / "file", ["Test"], server.url)
    with pytest.raises(InputError, match="cannot make the folder"):
        download(tmp_path / "file" / "below", ["Test"], server.url)


def test_too_little_space_is_said_before_the_first_byte(server, tmp_path, monkeypatch):
    publish(server)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 100, 100))
    with pytest.raises(InputError, match=r"GB free and .* GB are needed"):
        download(tmp_path, ["Test"], server.url)
    assert server.ranges == []


# ---- unpacking ----


def archive(tmp_path, data: bytes):
    path = tmp_path / "set.zip"
    path.write_bytes(data)
    return path


def link() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zip_:
        info = zipfile.ZipInfo("set/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        zip_.writestr(info, "/etc/passwd")
    return stream.getvalue()


HOSTILE = {
    "parent": lambda: zipped({"set/a.png": b"1", "set/../../out.txt": b"2"}),
    "absolute": lambda: zipped({"/tmp/out.txt": b"1"}),
    "backslash": lambda: zipped({"set\\..\\..\\out.txt": b"1"}),
    "drive": lambda: zipped({"C:/out.txt": b"1"}),
    "link": link,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_members_that_leave_the_folder_are_refused_and_nothing_is_unpacked(tmp_path, kind):
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(InputError, match="outside the folder, a link or an encrypted file"):
        unpack(archive(inner, HOSTILE[kind]()), inner / "set")
    assert names(inner) == {"set.zip"} and names(tmp_path) == {"inner"}


def test_an_archive_that_grows_too_much_is_refused(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as zip_:
        zip_.writestr("set/zeros.png", bytes(5_000_000))
    with pytest.raises(InputError, match=r"claims 1 files of 5,000,000 bytes"):
        unpack(archive(tmp_path, stream.getvalue()), tmp_path / "set")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: flipped(data, 60), lambda data: b"<html>sorry</html>"]
)
def test_a_damaged_archive_is_named_and_leaves_no_folder(tmp_path, damage):
    path = archive(tmp_path, damage(zipped({"set/a.png": bytes(range(200))})))
    with pytest.raises(InputError, match=r"set\.zip is damaged .*delete .* run the same command again"):
        unpack(path, tmp_path / "set")
    assert names(tmp_path) == {"set.zip"}


def test_members_at_the_top_and_leftovers_of_a_killed_run_are_no_obstacle(tmp_path):
    leftover = tmp_path / ".set.unpacking" / "set"
    leftover.mkdir(parents=True)
    (leftover / "old.png").touch()
    unpack(archive(tmp_path, zipped({"a.png": b"1", "b.png": b"2"})), tmp_path / "set")
    assert names(tmp_path / "set") == {"a.png", "b.png"} and names(tmp_path) == {"set", "set.zip"}
    shutil.rmtree(tmp_path / "set")
    unpack(archive(tmp_path, zipped({"set/a.png": b"1", "__MACOSX/x": b"2"})), tmp_path / "set")
    assert names(tmp_path / "set") == {"a.png"} and names(tmp_path) == {"set", "set.zip"}


# ---- Oxford-IIIT Pet ----


def tarred(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    """A .tar.gz; of other kinds than files, what a member holds is where it links to."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "" if kind == tarfile.REGTYPE else data.decode()
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture
def pets(server, monkeypatch):
    """The two archives on the server, as the official ones are laid out, with the sums that torchvision would know."""
    generator = np.random.default_rng(0)
    names = [f"Abyssinian_{number}" for number in range(1, 41)] + ["pug_1"]
    trimap = np.pad(np.full((8, 8), 1, np.uint8), ((6, 6), (8, 8)), constant_values=2)
    trimap[6, 8:16] = 3
    lists = {split: "".join(f"{name} 1 1 1\n" for name in part) for split, part in
             {"trainval": names[:-1], "test": names[-1:]}.items()}  # fmt: skip
    photos = {f"images/{n}.jpg": encoded(generator.integers(0, 255, (20, 24, 3), np.uint8), "JPEG") for n in names}
    server.files["images.tar.gz"] = tarred({**photos, "images/Abyssinian_100.mat": b"MATLAB", "._images": b"x"})
    server.files["annotations.tar.gz"] = tarred(
        {f"annotations/trimaps/{name}.png": encoded(trimap, "PNG") for name in names}
        | {f"annotations/trimaps/._{name}.png": b"x" for name in names}
        | {f"annotations/{split}.txt": text.encode() for split, text in lists.items()}
        | {"annotations/README": b"terms", "annotations/xmls/pug_1.xml": b"<x/>"}
    )
    sums = tuple((server.url + name, hashlib.md5(data).hexdigest()) for name, data in server.files.items())
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", sums)
    return server


def test_torchvision_knows_two_pet_archives_with_addresses_and_sums():
    urls, sums = zip(*OxfordIIITPet._RESOURCES)
    assert [url.rsplit("/", 1)[-1] for url in urls] == ["images.tar.gz", "annotations.tar.gz"]
    assert all(url.startswith("https://") for url in urls) and all(len(bytes.fromhex(md5)) == 16 for md5 in sums)


def test_the_pet_command_fetches_what_torchvision_and_find_splits_read(pets, tmp_path, capsys):
    to = tmp_path / "oxford-iiit-pet"  # the folder that torchvision looks in
    assert dataset.main(["download", "--dataset", "pet", "--to", str(to)]) == 0
    assert names(to) == {"images", "annotations"}
    splits = dataset.find_splits(to)
    for split, ours in (("trainval", splits["train"] + splits["validation"]), ("test", splits["test"])):
        theirs = OxfordIIITPet(tmp_path, split=split, target_types="segmentation")
        assert {(pair.image, pair.mask) for pair in ours} == set(zip(theirs._images, theirs._segs))
    assert dataset.main(["check", "--data", str(to), "--size", "24"]) == 0
    assert "every file can be used" in capsys.readouterr().out
    seen = len(pets.ranges)
    download_pet(to)
    assert len(pets.ranges) == seen == 2


def test_an_interrupted_pet_transfer_goes_on(pets, tmp_path):
    pets.faults = [1000]
    with pytest.raises(InputError, match=r"images\.tar\.gz stopped after 1,000 of"):
        download_pet(tmp_path, attempts=1)
    download_pet(tmp_path, attempts=1)
    assert pets.ranges == [None, "bytes=1000-", None] and names(tmp_path) == {"images", "annotations"}


def test_a_pet_archive_with_another_sum_is_refused_and_left(pets, tmp_path):
    (tmp_path / "images.tar.gz").write_bytes(tarred({"images/a.jpg": b"1"}))
    with pytest.raises(InputError, match=r"images\.tar\.gz has not the MD5 sum .* delete it and run"):
        download_pet(tmp_path)
    assert "images" not in names(tmp_path) and "images.tar.gz" in names(tmp_path)


def test_pet_archives_put_there_by_hand_need_no_network(pets, tmp_path):
    for name, data in pets.files.items():
        (tmp_path / name).write_bytes(data)
    download_pet(tmp_path, "http://127.0.0.1:9", keep_archives=True)
    assert names(tmp_path) == {"images", "annotations", "images.tar.gz", "annotations.tar.gz"}


def test_offline_both_pet_addresses_and_places_are_named(tmp_path, capsys):
    command = ["download", "--dataset", "pet", "--to", str(tmp_path / "pet"), "--base-url", "http://127.0.0.1:9"]
    assert dataset.main(command) == 2
    said = capsys.readouterr().err
    for name in ("images.tar.gz", "annotations.tar.gz"):
        assert f"fetch http://127.0.0.1:9/{name}" in said or f"and http://127.0.0.1:9/{name}" in said
        assert f"put it at {tmp_path / 'pet' / name}" in said
    assert dataset.main([*command, "--splits", "Test"]) == 2
    assert "--splits is of ISIC" in capsys.readouterr().err


HOSTILE_TARS = {
    "parent": lambda: tarred({"set/a.png": b"1", "set/../../out.txt": b"2"}),
    "absolute": lambda: tarred({"/tmp/out.txt": b"1"}),
    "symbolic link": lambda: tarred({"set/link": b"/etc/passwd"}, tarfile.SYMTYPE),
    "link inside": lambda: tarred({"set/link": b"a.png"}, tarfile.SYMTYPE),
    "hard link": lambda: tarred({"set/link": b"../../a.png"}, tarfile.LNKTYPE),
    "device": lambda: tarred({"set/tty": b""}, tarfile.CHRTYPE),
}


@pytest.mark.parametrize("kind", HOSTILE_TARS)
def test_tar_members_that_leave_the_folder_are_refused_and_nothing_stays(tmp_path, kind):
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(InputError, match="outside the folder, a link or an encrypted file"):
        unpack_tar(archive(inner, HOSTILE_TARS[kind]()), inner / "set")
    assert names(inner) == {"set.zip"} and names(tmp_path) == {"inner"}


def test_a_tar_that_grows_too_much_or_holds_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"claims files of 5,000,000 bytes"):
        unpack_tar(archive(tmp_path, tarred({"set/zeros.png": bytes(5_000_000)})), tmp_path / "set")
    with pytest.raises(InputError, match=r"claims 0 files"):
        unpack_tar(archive(tmp_path, tarred({})), tmp_path / "set")
    assert names(tmp_path) == {"set.zip"}


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: flipped(data, 200), lambda data: b"<html>sorry</html>"]
)
def test_a_damaged_tar_is_named_and_leaves_no_folder(tmp_path, damage):
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    path = archive(tmp_path, damage(tarred({"set/a.png": noise})))
    with pytest.raises(InputError, match=r"set\.zip is damaged .*delete .* run the same command again"):
        unpack_tar(path, tmp_path / "set")
    assert names(tmp_path) == {"set.zip"}
