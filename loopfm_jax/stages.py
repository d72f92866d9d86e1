"""Stage folders: complete or absent, and provably made from what they say they were made from.

A stage works in a hidden sibling folder and renames it last. `manifest.json` holds the stage's
configuration, the content hash of every input's manifest and sha256 and size of every file, so a
flipped bit, a half-copied folder or a mix of two runs is found before a model reads it.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loopfm_jax.errors import UserError

MANIFEST = "manifest.json"
PACKAGES = ("loopfm-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "polars")

Report = dict[str, Any]


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
    """Keep an interrupted attempt, for `work` to go on from."""

    @property
    def partial(self) -> Path:
        return self.directory.with_name(f".{self.directory.name}.partial")


def run(stage: Stage, work: Callable[[Path], Report], *, force: bool = False) -> tuple[Report, bool]:
    """Makes the stage unless it is up to date.

    Args:
      work: fills the given folder and returns the stage's facts for the manifest; what differs
        from run to run (rates) goes under `measured`.
      force: redo it even if it is up to date or was made with another configuration.

    Returns:
      The manifest, and whether work was done.

    Raises:
      UserError: the folder was made with another configuration, or an input is missing or damaged.
    """
    made_from = {name: verify(path)["content"] for name, path in stage.inputs.items()}
    made_from |= stage.sources
    config = json.loads(json.dumps(dict(stage.config), default=str))
    if (stage.directory / MANIFEST).exists() and not force:
        manifest = _read(stage.directory)
        _same_config(stage, manifest["config"], config)
        if manifest["inputs"] == made_from:
            return manifest, False
    _open_partial(stage, {"config": config, "inputs": made_from})
    started = time.monotonic()
    try:
        facts = work(stage.partial)
    except UserError:
        if not stage.resumable:
            shutil.rmtree(stage.partial, ignore_errors=True)
        raise
    measured = facts.pop("measured", {})
    manifest = {
        "stage": stage.command,
        "config": config,
        "inputs": made_from,
        "input_paths": {n: os.path.relpath(p, stage.directory) for n, p in stage.inputs.items()},
        "facts": facts,
        "versions": {name: version(name) for name in PACKAGES},
        "files": _fingerprints(stage.partial),
        "measured": {"seconds": round(time.monotonic() - started, 3), **measured},
    }
    manifest["content"] = _content(manifest)
    (stage.partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    if stage.directory.exists():
        shutil.rmtree(stage.directory)
    stage.partial.rename(stage.directory)
    return manifest, True


def verify(directory: Path) -> Report:
    """The manifest of a complete, undamaged stage folder whose inputs are still what they were."""
    manifest = _read(directory)
    for name, relative in manifest["input_paths"].items():
        source = directory / relative / MANIFEST
        if source.exists() and json.loads(source.read_text())["content"] != manifest["inputs"][name]:
            raise UserError(
                f"{directory} was made from an earlier {name} than {source.parent.resolve()} holds "
                f"now: run `loopfm {manifest['stage']}` again"
            )
    return manifest


def _read(directory: Path) -> Report:
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{directory} is missing or incomplete: run the stage that makes it first")
    return _checked(directory, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _checked(directory: Path, _mtime: int) -> Report:
    """Hashes every file once per process."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        intact = _content(manifest) == manifest["content"]
    except (ValueError, KeyError, TypeError):
        intact, manifest = False, {}
    if not intact:
        raise UserError(f"{directory / MANIFEST} is damaged: redo its stage with --force")
    for name, said in manifest["files"].items():
        file = directory / name
        if not file.exists() or sha256(file) != said["sha256"]:
            raise UserError(
                f"{file} is missing or damaged (its sha256 is not the one in {MANIFEST}): "
                f"redo `loopfm {manifest['stage']}` with --force"
            )
    return manifest


def _same_config(stage: Stage, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = differences(old, new)
    if changed:
        raise UserError(
            f"{stage.directory} was made with another configuration ({'; '.join(changed[:4])}): "
            "use another --workdir, or --force to redo it"
        )


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """`path: old, now new` for every leaf of two JSON values that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        found = [differences(old.get(k), new.get(k), f"{at}.{k}" if at else k) for k in keys]
        return [line for lines in found for line in lines]
    return [] if old == new else [f"{at} was {old!r}, now {new!r}"]


def _open_partial(stage: Stage, identity: Report) -> None:
    mark = stage.partial / "attempt.json"
    text = json.dumps(identity, sort_keys=True)
    if stage.resumable and mark.exists() and mark.read_text() == text:
        return
    shutil.rmtree(stage.partial, ignore_errors=True)
    stage.partial.mkdir(parents=True)
    mark.write_text(text)


def _fingerprints(directory: Path) -> dict[str, dict[str, Any]]:
    (directory / "attempt.json").unlink()
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {
        str(p.relative_to(directory)): {"sha256": sha256(p), "bytes": p.stat().st_size}
        for p in files
    }


def _content(manifest: Report) -> str:
    """Identity of what was made; measured rates and versions do not count."""
    counted = {k: manifest[k] for k in ("stage", "config", "inputs", "facts", "files")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
