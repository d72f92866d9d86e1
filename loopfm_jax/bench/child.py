"""A side of a benchmark as a process: own memory, own allocator settings, own threads."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import loopfm_jax
from loopfm_jax.bench.protocol import Measured, Spec
from loopfm_jax.errors import UserError

ROOT = Path(loopfm_jax.__file__).parents[1]
PACKAGES = ("loopfm-jax", "jax", "jaxlib", "flax", "optax", "numpy")
PATIENCE_S = 900.0
"""An answer that takes longer ends the process."""
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""glibc keeps freed memory, in large pages, as `memory.keep_freed` makes it in our processes."""


class Failed(Exception):
    """A side could not start or answer."""


def versions(names: Sequence[str]) -> dict[str, str]:
    return {name: version(name) for name in names}


class Child:
    """A worker that is starting. Use as a context; leaving ends the process.

    Args:
      module: what python runs with -m.
      python: interpreter.
      env: on top of this process's environment.
    """

    def __init__(self, module: str, *, python: Path, env: Mapping[str, str]):
        self._module, self._log = module, tempfile.TemporaryFile("w+")
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [str(python), "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, **env},
        )
        self._versions: dict[str, str] = {}
        self.peak_rss_bytes: int | None = None

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def versions(self) -> dict[str, str]:
        """Waits until the worker is up, which takes seconds of imports."""
        if not self._versions:
            self._versions = self._answer()["versions"]
        return self._versions

    def setup(self, spec: Spec) -> dict[str, Any]:
        """Builds what `spec` says; returns facts."""
        self.versions()
        return self._ask({"do": "setup", "spec": dict(spec)})["facts"]

    def run(self, *, seconds: float, steps: int = 1, batch: int | None = None) -> Measured:
        """A slice of time; leaves the worker's peak memory so far in `peak_rss_bytes`.

        batch: which requests, of a job that answers several sizes.
        """
        of = {} if batch is None else {"batch": batch}
        found = self._ask({"do": "run", "seconds": seconds, "steps": steps, **of})
        self.peak_rss_bytes = found.pop("peak_rss_bytes")
        return Measured(**found)

    def cpu_seconds(self) -> float:
        """CPU time of the process and of those it started, so far; 0 where there is no /proc."""
        return sum(map(ticks, family(self._process.pid))) / os.sysconf("SC_CLK_TCK")

    def leave(self) -> None:
        """Asks it to end, and does not wait."""
        if self._process.poll() is None:
            self._send({"do": "close"})

    def close(self) -> None:
        try:
            self.leave()
            self._process.wait(timeout=5)
        except (Failed, subprocess.TimeoutExpired):
            self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            if file is not None:
                file.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._send(question)
        return self._answer()

    def _send(self, question: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise Failed(self._last_words()) from None

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        if not ready:
            self._process.kill()
            raise Failed(f"{self._module} gave no answer for {PATIENCE_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        if status == -9:
            return f"{self._module} was killed (signal 9): is there enough memory?"
        self._log.seek(0)
        said = self._log.read().strip().splitlines() or ["no message"]
        return f"{self._module} ended with status {status}: {said[-1]}"


def ours(env: Mapping[str, str] | None = None) -> Child:
    """Our worker, in the interpreter that runs."""
    return Child("loopfm_jax.bench.worker", python=Path(sys.executable), env=env or {})


def find_python(path: Path | None) -> Path:
    """The peer's interpreter.

    Raises:
      UserError: there is none at `path`.
    """
    if path is None:
        return Path(sys.executable)
    if not os.access(path, os.X_OK) or path.is_dir():
        raise UserError(f"bench --peer-python {path}: no interpreter there")
    return path.absolute()


def family(pid: int) -> list[int]:
    """A process and all that it started (the worker of a peer's loader)."""
    found = [pid]
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [one for child in listed.read_text().split() for one in family(int(child))]
        except OSError:  # the thread has ended
            continue
    return found


def ticks(pid: int) -> int:
    """User and system clock ticks of a process, all threads, and of its children that ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0
    return sum(int(n) for n in after_name[11:15])
