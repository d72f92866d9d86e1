"""Stage folders: complete or absent, and provably made from what they say they were made from.

A stage works in a hidden sibling folder and renames it last. `manifest.json` holds the stage's
configuration, the content hash of every input's manifest and sha256 and size of every file, so a
flipped bit, a half-copied folder or a mix of two runs is found before a model reads it.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loopfm_jax import attempt, processes
from loopfm_jax.attempt import Stage
from loopfm_jax.errors import UserError
from loopfm_jax.identity import as_stored, differences, fingerprints, long_digest, sha256

MANIFEST = "manifest.json"
COMMANDS = {"data": "prepare", "teacher": "train-fm", "export": "export", "history": "structure"}
"""Folder name -> the command that fills it; every other folder is a VM's, or of a study, which
has a folder per command."""
PACKAGES = ("loopfm-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "polars")
COUNTED = ("stage", "config", "inputs", "facts", "files")
"""Parts of a manifest that are the identity of what was made: rates and versions do not count."""

REVISION = {"prepare": 1, "train-fm": 1, "export": 1, "train-vm": 1}
"""Of what a command makes from the same inputs. Raised where that changes: folders of before are
not up to date."""
SHARED_S = 120
"""After which a file that another machine has written must be seen."""

Report = dict[str, Any]
Work = Callable[[Path], Report]
"""Fills a folder and returns the facts about it."""


def run(
    stage: Stage, work: Work, *, force: bool = False, together: bool = False
) -> tuple[Report, bool]:
    """Makes the stage unless it is up to date; of several processes, the first alone looks at what
    is there and puts the result in its place.

    Args:
      work: fills the given folder and returns the stage's facts for the manifest; what differs
        from run to run (rates) goes under `measured`.
      force: redo it even if it is up to date or was made with another configuration.
      together: all processes do the work, in one folder; otherwise the others wait for the first.

    Returns:
      The manifest, and whether work was done.

    Raises:
      UserError: the folder was made with another configuration or by something else, or is being
        made, or an input is missing or damaged.
    """
    manifest, _ = processes.first(lambda: _look(stage, force=force))
    if manifest is not None:
        return manifest, False
    with ExitStack() as held:
        processes.first(lambda: attempt.hold(stage, held))
        manifest, identity = processes.first(lambda: _look(stage, force=force))
        if manifest is not None:  # by another process, meanwhile
            return manifest, False
        manifest = _make(stage, work, identity, together=together)
    _see(stage.directory, manifest)
    return manifest, True


def _look(stage: Stage, *, force: bool) -> tuple[Report | None, Report]:
    """The manifest of a stage that is up to date, and what it is, or is to be, made from."""
    _refuse_foreign(stage.directory)
    made_from = {name: verify(path)["content"] for name, path in stage.inputs.items()}
    made_from |= stage.sources
    if stage.command in REVISION:
        made_from["revision"] = f"{stage.command} {REVISION[stage.command]}"
    identity = {"config": as_stored(stage.config), "inputs": made_from}
    if (stage.directory / MANIFEST).exists() and not force:
        manifest = _read(stage.directory)
        _same_config(stage, manifest["config"], identity["config"])
        if manifest["inputs"] == made_from:
            return manifest, identity
    return None, identity


def _make(stage: Stage, work: Work, identity: Report, *, together: bool) -> Report:
    """Works in the hidden folder, and removes it on failure unless there is a way to go on."""
    started = time.monotonic()
    try:
        processes.first(lambda: attempt.open_partial(stage, identity))
        if together:
            facts = work(stage.partial)
            processes.wait()  # until all have written what is theirs
        else:
            facts = processes.first(lambda: work(stage.partial))
        return processes.first(lambda: _finish(stage, identity, facts, started))
    except BaseException:
        if processes.leads():
            attempt.clear(stage)
        raise


def _finish(stage: Stage, identity: Report, facts: Report, started: float) -> Report:
    """Writes the manifest and puts the folder in its place."""
    measured = facts.pop("measured", {})
    (stage.partial / attempt.MARK).unlink()
    made = {
        "stage": stage.command,
        **identity,
        "input_paths": _relative(stage.inputs, stage.directory),
        "facts": facts,
        "versions": {name: version(name) for name in PACKAGES},
        "files": fingerprints(stage.partial),
        "measured": {"seconds": round(time.monotonic() - started, 3), **measured},
    }
    manifest = _sealed(made)
    (stage.partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    attempt.put_in_place(stage)
    return manifest


def _see(directory: Path, manifest: Report) -> None:
    """Waits until what process 0 has put there is seen from here: file systems that machines share
    take their time."""
    until = time.monotonic() + SHARED_S
    while not processes.leads():
        with suppress(OSError, UserError):
            if _manifest(directory)["seal"] == manifest["seal"]:
                return
        if time.monotonic() > until:
            raise UserError(
                f"process 0 has made {directory}, but another process does not see it after "
                f"{SHARED_S} s: --workdir must be on a file system that all processes share"
            )
        time.sleep(0.1)


def verify(directory: Path) -> Report:
    """The manifest of a complete, undamaged stage folder whose inputs are still what they were."""
    manifest = _read(directory)
    _check_origin(directory, manifest)
    return manifest


def _check_origin(directory: Path, manifest: Report) -> None:
    """Nothing upstream was remade since; inputs that are no longer there are taken on trust."""
    for name, relative in manifest["input_paths"].items():
        source = Path(os.path.normpath(directory / relative))
        if not (source / MANIFEST).exists():
            continue
        now = _manifest(source)
        if now["content"] != manifest["inputs"][name]:
            raise UserError(
                f"{directory} was made from an earlier {name} than {source} holds now: run "
                f"`loopfm {manifest['stage']}` again"
            )
        _check_origin(source, now)


def _read(directory: Path) -> Report:
    path = directory / MANIFEST
    if not path.exists():
        command = _command(directory)
        raise UserError(f"{directory} is missing or incomplete: run `loopfm {command}` first")
    return _checked(directory, path.stat().st_mtime_ns)


def _command(directory: Path) -> str:
    """What fills a folder of which there is no manifest to say it."""
    parent = directory.parent.name
    own = parent if parent in COMMANDS.values() else "train-vm"
    return COMMANDS.get(directory.name, own)


def require(stage: Stage) -> Report:
    """The manifest of a stage that is there, up to date and made with this configuration.

    Raises:
      UserError: it is not.
    """
    manifest = verify(stage.directory)
    _same_config(stage, manifest["config"], as_stored(stage.config))
    return manifest


def _manifest(directory: Path) -> Report:
    """The manifest, if it is as it was written; the files are not looked at."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        intact = long_digest({k: v for k, v in manifest.items() if k != "seal"}) == manifest["seal"]
    except (ValueError, KeyError, TypeError, AttributeError):
        intact, manifest = False, {}
    if not intact:
        command = _command(directory)
        raise UserError(f"{directory / MANIFEST} is damaged: redo `loopfm {command}` with --force")
    return manifest


@lru_cache(maxsize=4096)
def _checked(directory: Path, _mtime: int) -> Report:
    """Hashes every file once per process; of several, the first does it for all."""
    manifest = _manifest(directory)
    if not processes.leads():
        return manifest
    for name, said in manifest["files"].items():
        file = directory / name
        if not file.is_file() or sha256(file) != said["sha256"]:
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


def _refuse_foreign(directory: Path) -> None:
    """Finished stages replace their folder: it must not be somebody else's."""
    if directory.exists() and not (directory / MANIFEST).exists():
        if not directory.is_dir() or any(directory.iterdir()):
            raise UserError(
                f"{directory} is in the way: it has no {MANIFEST}, so no stage made it or it was "
                "damaged; remove it or choose another --workdir"
            )


def _relative(inputs: Mapping[str, Path], directory: Path) -> dict[str, str]:
    return {name: os.path.relpath(path, directory) for name, path in inputs.items()}


def _sealed(manifest: Report) -> Report:
    """As it will be read again, with its identity (`content`) and a hash of all of it (`seal`)."""
    manifest = json.loads(json.dumps(manifest))
    manifest["content"] = long_digest({name: manifest[name] for name in COUNTED})
    return manifest | {"seal": long_digest(manifest)}
