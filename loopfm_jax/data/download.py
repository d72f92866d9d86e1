"""Fetching a release: streamed, checked where something is known, unpacked without trusting it."""

import gzip
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from loopfm_jax.errors import UserError
from loopfm_jax.identity import sha256
from loopfm_jax.progress import track

CHUNK = 1 << 20
ARCHIVE = "archive.tar.gz"
SEEN = "archive.sha256"
NETWORK = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    ValueError,  # not a URL
)
ARCHIVE_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


def fetch_archive(url: str, cache: Path, *, members: Sequence[str]) -> str:
    """Makes sure that `cache` holds the named files of the archive behind `url`.

    Only the wanted files are written, under their base names: paths inside the archive are never
    followed. The sha256 of the archive is kept beside them.

    Returns:
      The sha256 of the archive that was seen.

    Raises:
      UserError: no network, a cut-off archive, or a missing member.
    """
    seen = cache / SEEN
    if seen.exists() and all((cache / name).exists() for name in members):
        return seen.read_text()
    if not seen.exists() and cache.exists():
        raise UserError(
            f"{cache} is in the way: it has no {SEEN}, so it was not downloaded by this program; "
            "give it as --data.raw-dir if it holds the files, or choose another --data.cache-dir"
        )
    partial = cache.with_name(f".{cache.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _download(url, partial / ARCHIVE)
        _unpack(partial / ARCHIVE, partial, members)
        digest = sha256(partial / ARCHIVE)
        (partial / ARCHIVE).unlink()
        (partial / seen.name).write_text(digest)
        shutil.rmtree(cache, ignore_errors=True)
        partial.rename(cache)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest


def _download(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, target.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with track(f"download {url.rsplit('/', 1)[-1]}", total=size, unit="B") as advance:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    advance(len(chunk))
    except NETWORK as error:
        raise UserError(
            f"{url} cannot be downloaded ({error}): fetch it by other means, unpack it, and give "
            "its folder with --data.raw-dir"
        ) from None
    if size and target.stat().st_size != size:
        raise UserError(
            f"{url} was cut off after {target.stat().st_size:,} of {size:,} bytes: try again"
        )


def _unpack(archive: Path, target: Path, members: Sequence[str]) -> None:
    missing = set(members)
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                content = tar.extractfile(member) if member.isfile() and name in missing else None
                if content is not None:
                    with content, (target / name).open("wb") as file:
                        shutil.copyfileobj(content, file, CHUNK)
                    missing.discard(name)
            while stream.read(CHUNK):  # the checksum stands at the very end
                pass
    except ARCHIVE_DAMAGE as error:
        raise UserError(
            f"the downloaded archive is damaged or cut off ({error}): try again"
        ) from None
    if missing:
        raise UserError(f"the archive does not hold {', '.join(sorted(missing))}")
