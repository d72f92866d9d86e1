"""What prepares and structures a log: this machine, or the workers of an Apache Beam pipeline.

Both write the same bytes, so the choice is no part of what a stage is made from.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from loopfm_jax.errors import UserError

Engine = Literal["polars", "beam"]
Runner = Literal["DirectRunner", "FlinkRunner", "DataflowRunner"]


@dataclass(frozen=True)
class BeamConfig:
    """Where pipelines of `--engine beam` run. Workers need this package, and the working directory
    and the log's files under the same paths."""

    runner: Runner = "DirectRunner"
    """`DirectRunner`: on this machine, for tests."""
    options: tuple[str, ...] = ()
    """Further options of Beam and its runner, without dashes: `flink_master=HOST:8081`,
    `region=us-east1`; a flag stands alone."""

    def __post_init__(self) -> None:
        for option in self.options:
            name = option.partition("=")[0]
            if name.startswith("-") or not name.isidentifier():
                raise UserError(
                    f"beam.options holds {option!r}; write options as name=value, without dashes: "
                    "--beam.options flink_master=localhost:8081 parallelism=4"
                )
            if name == "runner":
                raise UserError(f"beam.options holds {option!r}; use --beam.runner")


def import_beam() -> Any:
    """The module `apache_beam`.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("apache_beam")
    except ImportError as error:
        raise UserError(
            f"--engine beam needs Apache Beam, which cannot be imported ({error}): "
            "pip install -e '.[beam]' in its repository, or use --engine polars"
        ) from None


def run_pipeline(config: BeamConfig, build: Callable[[Any], None]) -> None:
    """Runs what `build` puts into a pipeline, to its end.

    Raises:
      UserError: a worker has raised it.
    """
    beam = import_beam()
    flags = [f"--runner={config.runner}", *(f"--{option}" for option in config.options)]
    options = beam.options.pipeline_options.PipelineOptions(flags)
    try:
        with beam.Pipeline(options=options) as pipeline:
            build(pipeline)
    except Exception as error:
        told = _mistake(error)
        if told is None:
            raise
        raise UserError(told) from None


def _mistake(error: Exception) -> str | None:
    """The message of the UserError that a worker has raised, of which runners hand on some text."""
    text = str(error) if isinstance(error, UserError) else None
    for line in str(error).splitlines() if text is None else ():
        if "UserError: " in line:
            text = line.partition("UserError: ")[2]
    return None if text is None else re.sub(r" \[while running .*", "", text)
