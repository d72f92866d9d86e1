"""A point's process: `python -m loopfm_jax.scale.worker` answers `bench.protocol`."""

from loopfm_jax.bench.limits import Limits
from loopfm_jax.bench.worker import main
from loopfm_jax.scale.job import Machine, Needs, Pace

JOBS = {"machine": Machine, "limits": Limits, "needs": Needs, "pace": Pace}

if __name__ == "__main__":
    main(lambda spec: JOBS[spec["job"]](spec))
