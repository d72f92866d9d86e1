"""One step of the flow, and the hidden folder in which one process at a time makes it."""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from loopfm_jax.errors import UserError

MARK, CHECKPOINTS = "attempt.json", "checkpoints"
"""In an unfinished stage: what it is being made from, and where it may go on."""


@dataclass(frozen=True)
class Stage:
    """One step of the flow."""

    command: str
    """The command that makes it: prepare, train-fm, .."""
    directory: Path
    config: Mapping[str, Any]
    """Everything in the configuration that decides the result."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Stage folders it reads."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Raw files it reads: name -> sha256."""
    resumable: bool = False
    """Keep the folder `checkpoints` of an interrupted attempt, for `work` to go on from."""

    @property
    def partial(self) -> Path:
        return self.directory.with_name(f".{self.directory.name}.partial")

    @property
    def old(self) -> Path:
        """Where the result before this one waits until the new one is in its place."""
        return self.directory.with_name(f".{self.directory.name}.old")

    @property
    def lock(self) -> Path:
        """Held by who makes it."""
        return self.directory.with_name(f".{self.directory.name}.lock")


def hold(stage: Stage, held: ExitStack) -> None:
    """Until `held` closes or the process dies: two would clear each other's files."""
    stage.lock.parent.mkdir(parents=True, exist_ok=True)
    file = held.enter_context(stage.lock.open("w"))
    if _taken(file, stage.lock):
        raise UserError(
            f"another process is making {stage.directory}: wait for it, or use another --workdir"
        )
    held.callback(stage.lock.unlink, missing_ok=True)


def _taken(file: IO[str], lock: Path) -> bool:
    """Whether another process holds the lock, or has just removed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not os.path.samefile(file.fileno(), lock)
    except (BlockingIOError, FileNotFoundError):
        return True
    except OSError:
        return False  # of a file system without locks nobody knows


def open_partial(stage: Stage, identity: Mapping[str, Any]) -> None:
    """Empty, but for what an attempt at the same left to go on from."""
    mark = stage.partial / MARK
    text = json.dumps(identity, sort_keys=True)
    if not (mark.exists() and mark.read_text() == text):
        shutil.rmtree(stage.partial, ignore_errors=True)
    clear(stage)
    stage.partial.mkdir(parents=True, exist_ok=True)
    mark.write_text(text)


def clear(stage: Stage) -> None:
    """Leaves of an attempt what can be gone on from: its checkpoints, or nothing."""
    checkpoints, mark = stage.partial / CHECKPOINTS, stage.partial / MARK
    kept = (checkpoints, mark) if stage.resumable and mark.exists() and _any(checkpoints) else ()
    for path in stage.partial.glob("*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    if not kept:
        shutil.rmtree(stage.partial, ignore_errors=True)


def _any(folder: Path) -> bool:
    return any(p.is_file() for p in folder.rglob("*"))


def put_in_place(stage: Stage) -> None:
    """Two renames: whenever the process dies, the folder is complete or is not there."""
    shutil.rmtree(stage.old, ignore_errors=True)
    if stage.directory.exists():
        stage.directory.rename(stage.old)
    stage.partial.rename(stage.directory)
    shutil.rmtree(stage.old, ignore_errors=True)
