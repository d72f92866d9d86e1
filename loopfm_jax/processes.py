"""Several processes that make one run: who leads, what the others wait for, and how all end.

Every process runs the same program over the same working directory, and computes together with the
others wherever a mesh is. What is done once (preparing a log, manifests, reports) the leader does,
process 0, alone; `first` tells the others what it found. They meet at JAX's coordination service,
never on the devices: waiting there for hours holds up no collective.

A process that fails says so, and all others stop with its message. One that dies without a word is
missed after `deadline_s`, and JAX ends the rest.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from loopfm_jax.errors import UserError, check_limits

AUTO = "auto"
FAILED = "loopfm/failed"
LISTEN_S = 1.0
"""Between two looks at whether another process has failed."""
FAREWELL_S = 10
"""How long a process that fails waits until the others have heard of it."""
PATIENCE_MS = 2**31 - 1
"""Waiting for the leader ends by its answer or its death, not by the clock."""


@dataclass(frozen=True)
class ProcessesConfig:
    """Processes of one run, each started with the same command but for its index."""

    coordinator: str = ""
    """host:port of process 0, or `auto`: Cloud TPU, SLURM, GKE and Open MPI know it, and the
    numbers below. Empty: there is one process."""
    count: int | None = None
    """How many there are; default: one."""
    index: int = 0
    """Which of them this is."""
    deadline_s: int = 100
    """Silence after which a process is taken for dead, and all others end."""

    def __post_init__(self) -> None:
        count = 1 if self.count is None else self.count
        check_limits("processes", {"count": count, "deadline_s": self.deadline_s}, low=1)
        if self.count is None and self.coordinator not in ("", AUTO):
            raise UserError(
                f"processes.coordinator is {self.coordinator}, but nobody knows who comes there: "
                "give --processes.count, and --processes.index to each; one process needs none"
            )
        check_limits("processes", {"index": self.index}, low=0, high=count - 1)
        if count > 1 and not self.coordinator:
            raise UserError(
                f"processes.count is {count}, but nobody knows where they meet: give the "
                "address of process 0, --processes.coordinator HOST:PORT, or auto on a cluster"
            )


class _Group:
    """The processes of this run; one until `start`."""

    def __init__(self):
        self.count, self.index = 1, 0
        self.alone = False
        """Whether the leader is at work that the others wait for."""
        self.meetings = itertools.count()
        self.ended = threading.Event()

    @property
    def many(self) -> bool:
        return self.count > 1 and not self.alone

    @property
    def client(self) -> Any:
        """JAX's coordination service, for which it has no public name (Orbax uses it so too)."""
        from jax._src import distributed

        return distributed.global_state.client

    def meeting(self) -> str:
        """All processes come to the same ones in the same order."""
        return f"loopfm/{next(self.meetings)}"


_group = _Group()


def start(config: ProcessesConfig) -> None:
    """Joins the other processes; call it once, before anything asks JAX for devices.

    Raises:
      UserError: they did not come together.
    """
    if not config.coordinator:
        return
    known: dict[str, Any] = {}
    if config.coordinator != AUTO:
        known = {
            "coordinator_address": config.coordinator,
            "num_processes": config.count,
            "process_id": config.index,
        }
    try:
        jax.distributed.initialize(**known, heartbeat_timeout_seconds=config.deadline_s)
    except (RuntimeError, ValueError) as error:
        where = "by themselves" if config.coordinator == AUTO else f"at {config.coordinator}"
        raise UserError(
            f"the processes did not come together {where} ({error}): start all of them with the "
            "same --processes.coordinator HOST:PORT and --processes.count, and an index each"
        ) from None
    _group.count, _group.index = jax.process_count(), jax.process_index()
    threading.Thread(target=_listen, daemon=True).start()


def many() -> bool:
    """Whether others take part in what this process does now."""
    return _group.many


def alone() -> bool:
    """Whether others wait for what this process does now."""
    return _group.alone


def leads() -> bool:
    """Whether this is process 0, or the only one."""
    return _group.index == 0


def first(work: Callable[[], Any]) -> Any:
    """What `work` returns in process 0, told to all as a JSON value. Work within it is the
    leader's own: whoever is asked to wait there does not."""
    if not _group.many:
        return work()
    name = _group.meeting()
    if not leads():
        return json.loads(_group.client.blocking_key_value_get(name, PATIENCE_MS))
    _group.alone = True
    try:
        told = json.dumps(work())
    finally:
        _group.alone = False
    _group.client.key_value_set(name, told)
    return json.loads(told)


def wait() -> None:
    """Until every process is here."""
    if _group.many:
        _group.client.wait_at_barrier(_group.meeting(), PATIENCE_MS)


def end() -> None:
    """All is done; JAX says goodbye to the others when the program ends."""
    _group.ended.set()


def fail(message: str, *, status: int) -> None:
    """Ends all processes of the run, others with this message; returns where there are none."""
    if _group.count == 1:
        return
    _group.ended.set()
    try:
        _group.client.key_value_set(FAILED, f"process {_group.index}: {message}")
    except Exception:  # another one has failed before, or process 0 is gone
        pass
    _leave(status)


def _listen() -> None:
    """Stops this process when another one has failed, whatever it is waiting for."""
    while not _group.ended.wait(LISTEN_S):
        try:
            message = _group.client.key_value_try_get(FAILED)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            message = "process 0 is gone"
        if not _group.ended.is_set():
            print(f"loopfm: stopped, as another process failed: {message}", file=sys.stderr)
            _leave(2)


def _leave(status: int) -> None:
    """Without JAX's own farewell, which would wait for processes that hang; but process 0 keeps
    the messages, so nobody goes before all have heard."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        _group.client.wait_at_barrier(f"{FAILED}/heard", FAREWELL_S * 1000)
    except Exception:  # somebody is dead or does not listen
        pass
    if leads():  # without it JAX aborts those that have heard and not yet gone
        time.sleep(LISTEN_S)
    os._exit(status)
