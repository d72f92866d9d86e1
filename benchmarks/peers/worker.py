"""The peer's side of a benchmark: `python -m benchmarks.peers.worker` answers `bench.protocol`.

Needs torch, fuxictr and numpy beside this repository's root on PYTHONPATH; no JAX.
"""

import importlib.util
import sys
from importlib.metadata import version

from loopfm_jax.bench.protocol import refuse, serve

NEEDED = ("torch", "fuxictr")


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        refuse(f"{sys.executable} has no {' and no '.join(missing)}")
        return
    from benchmarks.peers.feeding import Bytes, Feed
    from benchmarks.peers.jobs import Infer, Latency, Train

    models = {"train": Train, "infer": Infer, "latency": Latency}
    jobs = {**models, "feed": Feed, "bytes": Bytes}
    serve(lambda spec: jobs[spec["job"]](spec), versions={name: version(name) for name in NEEDED})


if __name__ == "__main__":
    main()
