"""Our side of a benchmark: `python -m loopfm_jax.bench.worker` answers `bench.protocol`."""

from collections.abc import Callable
from importlib import import_module

from loopfm_jax.bench.child import PACKAGES, versions
from loopfm_jax.bench.protocol import Job, Spec, serve
from loopfm_jax.compiler import keep_programs

JOBS = {
    "structure": "structuring.Structure",
    "structure-loop": "structuring.StructureLoop",
    "export": "exporting.Export",
    "forward": "exporting.Forward",
    "feed": "feeding.Feed",
    "bytes": "feeding.Bytes",
    "train": "jobs.Train",
    "train-grown": "jobs.Grown",
    "encode": "encoding.Encode",
    "compress": "compressing.Compress",
    "read": "compressing.Read",
    "infer": "jobs.Infer",
    "latency": "jobs.Latency",
    "limits": "limits.Limits",
}
"""Modules and their jobs, imported by who needs them: TFDS and scipy take a second."""


def job_of(spec: Spec) -> Job:
    """The job that a specification names."""
    module, name = JOBS[spec["job"]].split(".")
    return getattr(import_module(f"loopfm_jax.bench.{module}"), name)(spec)


def main(make: Callable[[Spec], Job] = job_of) -> None:
    """Compiled programs, small ones too, are kept between runs."""
    keep_programs(from_s=0)
    serve(make, versions=versions(PACKAGES))


if __name__ == "__main__":
    main()
