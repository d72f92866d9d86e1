"""The one exception a user may cause: its text is the whole message, and the exit status is 2."""

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

DISK = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]


class UserError(Exception):
    """A mistake in the input, the configuration or the surroundings of a command.

    The message names the value, the limit and the fix; `cli.main` prints it without a traceback.
    """


def check_limits(
    owner: str, values: Mapping[str, float], *, low: float, high: float = math.inf
) -> None:
    """Raises UserError for the first of the named settings that is outside [low, high]."""
    for name, value in values.items():
        if not low <= value <= high:
            limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise UserError(f"{owner}.{name} is {value}; it must be {limit}")


def check_tuples(owner: str, part: Any) -> None:
    """Raises UserError for the first setting of a configuration, or of its parts, that is to hold
    several values and is one: `("item")` lacks a comma, and its letters would be the values.
    """
    for f in fields(part):
        value, name = getattr(part, f.name), f"{owner}.{f.name}" if owner else f.name
        if is_dataclass(value):
            check_tuples(name, value)
        several = any(get_origin(kind) is tuple for kind in (f.type, *get_args(f.type)))
        if several and isinstance(value, (str, int, float)):
            kind = "string" if isinstance(value, str) else "number"
            raise UserError(f"{name} is the {kind} {value!r}: write ({value!r},)")


@contextmanager
def writing(folder: Path, option: str = "--workdir") -> Iterator[None]:
    """Turns what the surroundings of a command do to it into one message.

    Args:
      folder: where it writes, and the option that chooses it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _disk_message(error, folder, option)
        if message is None:
            raise
        raise UserError(message) from None


def _disk_message(error: Exception, folder: Path, option: str) -> str | None:
    """What to say if the surroundings are at fault. Libraries wrap what the system says."""
    for words in DISK:
        if words in str(error):
            while not folder.exists():
                folder = folder.parent
            free = shutil.disk_usage(folder).free
            return (
                f"{words}: {folder} ({free:,} bytes free there now); free some space or choose "
                f"another {option}; nothing half-written was kept as complete"
            )
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"{error.filename}: a file is in the way; remove it or choose another {option}"
    if isinstance(error, OSError) and error.filename:
        told = f"{error.strerror}: {error.filename}: is it there, and what are its permissions?"
        return f"{told} Or choose another {option}" if _meets(error.filename, folder) else told
    return None


def _meets(file: str | int, folder: Path) -> bool:
    """Whether one of them is, or lies in, the other."""
    path = Path(str(file))
    return path.is_relative_to(folder) or folder.is_relative_to(path)
