"""Our side of a benchmark: `python -m loopfm_jax.bench.worker` answers `bench.protocol`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from loopfm_jax.bench.child import PACKAGES, versions
from loopfm_jax.bench.compressing import Compress, Read
from loopfm_jax.bench.encoding import Encode
from loopfm_jax.bench.exporting import Export, Forward
from loopfm_jax.bench.feeding import Bytes, Feed
from loopfm_jax.bench.jobs import Grown, Infer, Latency, Train
from loopfm_jax.bench.limits import Limits
from loopfm_jax.bench.protocol import Job, Spec, serve
from loopfm_jax.bench.structuring import Structure, StructureLoop

JOBS = {
    "structure": Structure,
    "structure-loop": StructureLoop,
    "export": Export,
    "forward": Forward,
    "feed": Feed,
    "bytes": Bytes,
    "train": Train,
    "train-grown": Grown,
    "encode": Encode,
    "compress": Compress,
    "read": Read,
    "infer": Infer,
    "latency": Latency,
    "limits": Limits,
}
XLA_CACHE = Path("~/.cache/loopfm_jax/xla")


def main(jobs: Mapping[str, Callable[[Spec], Job]] = JOBS) -> None:
    """Answers for these jobs; compiled programs are kept between runs."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(XLA_CACHE.expanduser())
    jax.config.update("jax_compilation_cache_dir", cache)
    serve(jobs, versions=versions(PACKAGES))


if __name__ == "__main__":
    main()
