"""A configuration file with options of the command line on top."""

import traceback
from collections.abc import Sequence
from pathlib import Path

import tyro

from loopfm_jax.config import Config, load
from loopfm_jax.errors import UserError

CONTROLS = ("swapped-histories", "shuffled-labels")
SHORT = {"--tables": "--study.tables", "--topology": "--compile.topology"}
"""Options that are asked for often have a short name."""


def parse(path: Path, options: Sequence[str], *, command: str = "run") -> Config:
    """The configuration of a file with command-line options on top."""
    options = [_long(option) for option in options]
    if "--control" in options:  # bare: all of them
        at = options.index("--control") + 1
        if at == len(options) or options[at].startswith("-"):
            options[at:at] = CONTROLS
    return tyro.cli(
        Config,
        default=_load(path),
        args=options,
        prog=f"loopfm {command} {path}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _long(option: str) -> str:
    name, *value = option.split("=", 1)
    return "=".join([SHORT.get(name, name), *value])


def _load(path: Path) -> Config:
    """A configuration file is a program of the user's: where it fails is a line of it."""
    try:
        return load(path)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        calls = traceback.extract_tb(error.__traceback__)
        lines = [call.lineno for call in calls if call.filename == str(path)]
        at = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{at}: {type(error).__name__}: {error}") from None
