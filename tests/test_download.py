"""Fetching a release from a local server: whole, once, and nothing outside the cache."""

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kuairand_files import EARLY_LOG, LATE_LOG, log_rows, write_release

from loopfm_jax.data.download import fetch_archive
from loopfm_jax.data.kuairand import KuaiRandPure
from loopfm_jax.errors import UserError

NAMES = (EARLY_LOG, LATE_LOG, "user_features_pure.csv", "video_features_basic_pure.csv")


@dataclass
class Server:
    """Answers every request with `body`, of which it sends the first `sent` bytes only."""

    body: bytes = b""
    status: int = 200
    sent: int | None = None
    chunked: bool = False
    requests: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.requests.append(self.path)
            body = state.body[: state.sent]
            self.send_response(state.status)
            if state.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                body = b"%x\r\n%s\r\n" % (len(state.body), body)
            else:
                self.send_header("Content-Length", str(len(state.body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/KuaiRand-Pure.tar.gz"
    yield state
    http.shutdown()
    http.server_close()


def pack(members: list[tuple[tarfile.TarInfo | str, bytes]]) -> bytes:
    text = io.BytesIO()
    with tarfile.open(fileobj=text, mode="w:gz") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return text.getvalue()


@pytest.fixture
def release(tmp_path: Path) -> dict[str, bytes]:
    """The official members, with a tiny log."""
    folder = write_release(tmp_path / "raw", log=log_rows()[60:], early=log_rows()[:60])
    return {name: (folder / name).read_bytes() for name in NAMES}


def official(release: dict[str, bytes]) -> bytes:
    return pack([(f"KuaiRand-Pure/data/{name}", content) for name, content in release.items()])


def everything_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def test_fetches_the_named_members_and_records_the_hash(server, release, tmp_path):
    server.body = pack([("KuaiRand-Pure/README.md", b"hello"), *release.items()])
    cache = tmp_path / "cache" / "kuairand_pure"
    digest = fetch_archive(server.url, cache, members=NAMES)
    assert digest == hashlib.sha256(server.body).hexdigest()
    assert (cache / "archive.sha256").read_text() == digest
    assert {name: (cache / name).read_bytes() for name in NAMES} == release
    assert everything_in(tmp_path / "cache") == sorted(
        f"kuairand_pure/{name}" for name in (*NAMES, "archive.sha256")
    )


def test_a_second_call_does_not_download_and_a_lost_member_does(server, release, tmp_path):
    server.body = official(release)
    cache = tmp_path / "cache"
    first = fetch_archive(server.url, cache, members=NAMES)
    assert fetch_archive(server.url, cache, members=NAMES) == first
    assert len(server.requests) == 1
    (cache / NAMES[2]).unlink()
    assert fetch_archive(server.url, cache, members=NAMES) == first
    assert len(server.requests) == 2 and (cache / NAMES[2]).exists()


def test_an_archive_that_is_not_the_release_is_refused_by_its_rows(server, release, tmp_path):
    server.body = official(release)
    source = KuaiRandPure(url=server.url, cache_dir=tmp_path)
    with pytest.raises(UserError) as error:
        source.read()
    for word in ("120 standard rows", "1,436,609", "--data.raw-dir", str(tmp_path)):
        assert word in str(error.value)
    assert source.fingerprint() == {"url": server.url}
    raw = KuaiRandPure(raw_dir=tmp_path / "kuairand_pure").read()  # the way the message names
    assert len(raw.frame) == 120


def cut_off(server: Server) -> None:
    server.sent = len(server.body) // 2


def cut_off_in_chunks(server: Server) -> None:
    server.sent, server.chunked = len(server.body) // 2, True


def truncated(server: Server) -> None:
    server.body = server.body[: len(server.body) // 2]


def flipped(server: Server) -> None:
    text = bytearray(server.body)
    text[len(text) // 2] ^= 16
    server.body = bytes(text)


def not_an_archive(server: Server) -> None:
    server.body = b"<html>please log in</html>"


def not_a_tar(server: Server) -> None:
    server.body = gzip.compress(b"hello")


def not_found(server: Server) -> None:
    server.status = 404


def refused(server: Server) -> None:
    server.url = "http://127.0.0.1:9/x.tar.gz"


def no_url(server: Server) -> None:
    server.url = "kuairand.tar.gz"


FAILURES = {
    cut_off: "cut off after",
    cut_off_in_chunks: "cannot be downloaded",
    truncated: "damaged or cut off",
    flipped: "damaged or cut off",
    not_an_archive: "damaged or cut off",
    not_a_tar: "damaged or cut off",
    not_found: "404",
    refused: "--data.raw-dir",
    no_url: "cannot be downloaded",
}


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
def test_a_failed_download_leaves_nothing(server, release, tmp_path, fail: Callable):
    server.body = official(release)
    fail(server)
    with pytest.raises(UserError, match=FAILURES[fail]):
        fetch_archive(server.url, tmp_path / "cache" / "x", members=NAMES)
    assert everything_in(tmp_path / "cache") == []


def test_a_failed_download_keeps_what_was_there(server, release, tmp_path):
    server.body = official(release)
    fetch_archive(server.url, tmp_path / "cache", members=NAMES)
    (tmp_path / "cache" / NAMES[0]).unlink()
    not_found(server)
    with pytest.raises(UserError):
        fetch_archive(server.url, tmp_path / "cache", members=NAMES)
    assert (tmp_path / "cache" / NAMES[1]).read_bytes() == release[NAMES[1]]


def test_a_folder_of_somebody_else_is_not_replaced(server, release, tmp_path):
    server.body = official(release)
    (tmp_path / "kuairand_pure").mkdir()
    (tmp_path / "kuairand_pure" / "mine.txt").write_text("years of work")
    with pytest.raises(UserError, match="in the way.*--data.cache-dir"):
        KuaiRandPure(url=server.url, cache_dir=tmp_path).read()
    assert (tmp_path / "kuairand_pure" / "mine.txt").read_text() == "years of work"
    assert not server.requests


def test_a_missing_member_is_named(server, release, tmp_path):
    del release[EARLY_LOG]
    server.body = official(release)
    with pytest.raises(UserError, match=EARLY_LOG):
        fetch_archive(server.url, tmp_path / "cache", members=NAMES)
    assert not (tmp_path / "cache").exists()


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_names_that_climb_out_stay_inside(server, release, tmp_path):
    home = tmp_path / "a" / "b" / "cache"
    server.body = pack(
        [
            ("../../evil.txt", b"evil"),
            (f"{tmp_path}/absolute.txt", b"evil"),
            *((f"../../../{name}", content) for name, content in release.items()),
        ]
    )
    before = everything_in(tmp_path)
    fetch_archive(server.url, home, members=NAMES)
    found = set(everything_in(tmp_path)) - set(before)
    assert found == {f"a/b/cache/{name}" for name in (*NAMES, "archive.sha256")}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_are_not_followed_and_are_no_members(server, release, tmp_path, kind):
    secret = tmp_path / "secret.csv"
    secret.write_text("secret")
    del release[LATE_LOG]
    server.body = pack([(link(f"data/{LATE_LOG}", kind, str(secret)), b""), *release.items()])
    with pytest.raises(UserError, match=LATE_LOG):
        fetch_archive(server.url, tmp_path / "cache", members=NAMES)
    assert secret.read_text() == "secret"
    assert not (tmp_path / "cache").exists()


def test_a_link_before_the_file_does_not_redirect_it(server, release, tmp_path):
    victim = tmp_path / "victim.csv"
    victim.write_text("mine")
    trap = link(f"data/{LATE_LOG}", tarfile.SYMTYPE, str(victim))
    server.body = pack([(trap, b""), *release.items()])
    fetch_archive(server.url, tmp_path / "cache", members=NAMES)
    assert victim.read_text() == "mine"
    assert (tmp_path / "cache" / LATE_LOG).read_bytes() == release[LATE_LOG]
