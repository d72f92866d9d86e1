"""What identifies JSON values and files, and how two values differ."""

import hashlib
import json
from pathlib import Path
from typing import Any


def as_stored(value: Any) -> Any:
    """A JSON value as a file holds it: tuples are lists, paths are text."""
    return json.loads(json.dumps(value, default=str))


def digest(value: Any) -> str:
    """A short name for a JSON value."""
    return long_digest(as_stored(value))[:12]


def long_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprints(directory: Path) -> dict[str, dict[str, Any]]:
    """sha256 and bytes of every file below a folder."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {
        str(p.relative_to(directory)): {"sha256": sha256(p), "bytes": p.stat().st_size}
        for p in files
    }


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """`path: old, now new` for every leaf of two JSON values that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        found = [differences(old.get(k), new.get(k), f"{at}.{k}" if at else k) for k in keys]
        return [line for lines in found for line in lines]
    return [] if old == new else [f"{at} was {old!r}, now {new!r}"]
