"""Collectives of a compiled program, from its text: which, how often a step runs them, how much.

Bodies of loops whose trip count the compiler knows count so often; of other loops (the passes of
`exchange`, as a rule one) once. Bytes are what a device receives of the result: all of it but its
own part, of a reduction twice that (it is reduced, then spread).
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8": 1, "bf16": 2}
"""Bytes of a number whose type does not end in its bits."""
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
CALL = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
SCATTER = "all-reduce-scatter"
"""How TPUs name a computation that runs as a reduce-scatter and is written as an all-reduce that is
cut."""
TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One kind of communication of a step, on one device."""

    kind: str
    calls: int
    bytes: float
    """Received."""


@dataclass(frozen=True)
class _Call:
    """One in the text; what is written twice under one channel (a transfer that the compiler
    spreads over other work) is one."""

    kind: str
    channel: str
    bytes: float


def collectives(text: str, *, devices: int) -> list[Collective]:
    """Of a module's text, the largest first."""
    computations, entry = _computations(text)
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for call, times in _walk(computations, entry, 1, devices):
        before = found.get((call.kind, call.channel), (0, 0.0))
        found[call.kind, call.channel] = max(before, (times, call.bytes * times))
    total: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for (kind, _), told in found.items():
        total[kind].append(told)
    every = [
        Collective(kind, sum(n for n, _ in told), sum(b for _, b in told))
        for kind, told in total.items()
    ]
    return sorted(every, key=lambda c: -c.bytes)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines, and which one is the whole program."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in map(str.strip, text.splitlines()):
        head = HEAD.match(line)
        if head:
            name = head[1]
            found[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            found[name].append(line)
    return found, entry


def _walk(
    computations: dict[str, list[str]], name: str, times: int, devices: int
) -> Iterator[tuple[_Call, int]]:
    """The collectives of a computation and of what it calls, with how often a step runs them."""
    for number, line in enumerate(computations.get(name, ())):
        call = CALL.match(line)
        if not call:
            continue
        kind = call[2].removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"channel_id=(\d+)", line)
            told = channel[1] if channel else f"{name}/{number}"
            size = _received(kind, call[1], line, devices)
            if name.startswith(SCATTER):
                kind, size = "reduce-scatter", size / 2
            yield _Call(kind, told, size), times
            continue
        trips = TRIPS.search(line)
        inner = times * int(trips[1]) if trips and call[2] == "while" else times
        branches = BRANCHES.search(line)
        names = CALLED.findall(line) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])
        for one in names:
            yield from _walk(computations, one, inner, devices)


def _received(kind: str, result: str, line: str, devices: int) -> float:
    arrays = [_bytes(*found) for found in ARRAY.findall(result)]
    group = _group(line, devices)
    others = (group - 1) / group
    if (
        "-start(" in line
        and result.startswith("(")
        and kind in ("all-gather", "collective-permute")
    ):
        arrays = arrays[1:2]  # its argument stands first, what it needs beside last
    whole = sum(arrays)
    match kind:
        case "all-reduce":
            return 2 * others * whole
        case "reduce-scatter":
            return (group - 1) * whole
        case "collective-permute":
            return whole
    return others * whole


def _bytes(kind: str, shape: str) -> float:
    bits = re.search(r"(\d+)$", kind)
    size = SIZES.get(kind) or SIZES.get(kind[:2]) or (int(bits[1]) / 8 if bits else 1)
    return size * math.prod(int(n) for n in shape.split(",") if n)


def _group(line: str, devices: int) -> int:
    """Devices that take part in one transfer."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    shaped = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if shaped:
        return int(shaped[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return devices
