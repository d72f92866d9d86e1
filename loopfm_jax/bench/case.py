"""One case of `rows`: starts its sides, checks that they compute the same, times them in rounds."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopfm_jax.bench.child import Child, Failed, ours
from loopfm_jax.bench.measure import Round, ratios, spread, take_rounds
from loopfm_jax.bench.terms import Case, Facts, Side
from loopfm_jax.progress import say

BFLOAT16_TIMES = 10
"""A side in bfloat16 may differ by so much more."""


@dataclass
class Bench:
    """What the cases of a run share."""

    folder: Path
    rounds: int
    seconds: float
    peer: Path | None
    """Interpreter of the peer; None: not there, or not wanted."""
    limits: Facts
    prepared: dict[Any, Facts] = field(default_factory=dict)
    ended: ExitStack = field(default_factory=ExitStack)
    """The sides of the last case, told to end: a second or two, in which the next ones import."""

    def prepare(self, case: Case) -> Facts:
        """Writes what the sides read, once for all cases with the same."""
        if case.prepare not in self.prepared:
            folder = self.folder / str(len(self.prepared))
            folder.mkdir()
            self.prepared[case.prepare] = case.prepare(folder)
        return self.prepared[case.prepare]


@dataclass
class Timed:
    """A side's process and what is known of it."""

    side: Side
    child: Child
    facts: dict[str, Any]
    losses: Mapping[int | None, Sequence[float]] = field(default_factory=dict)
    """The first, by the size of requests."""


def run_case(case: Case, bench: Bench) -> list[dict[str, Any]]:
    """A result per side of ours and peer that came up.

    Raises:
      Failed: a side of ours did not.
    """
    facts = bench.prepare(case)
    with ExitStack() as stack:
        timed = _start(case, facts, bench, stack)
        found = [
            result for batch in case.batches for result in _rows(case, facts, timed, batch, bench)
        ]
        for one in timed:
            one.child.leave()
        bench.ended = stack.pop_all()
    return found


def _rows(
    case: Case, facts: Facts, timed: list[Timed], batch: int | None, bench: Bench
) -> list[dict[str, Any]]:
    sides = {t.side.key: t.child for t in timed}
    seconds = bench.seconds if case.seconds is None else case.seconds
    rounds = take_rounds(sides, rounds=bench.rounds, seconds=seconds, batch=batch)
    mine = [t for t in timed if t.side in case.ours]
    others = [t for t in timed if t.side in case.peers]
    return [
        _result(case, facts, one, other, rounds, batch, bench)
        for one in mine
        for other in others or [None]
    ]


def _start(case: Case, facts: Facts, bench: Bench, stack: ExitStack) -> list[Timed]:
    """All sides built and warm, at once but for peers, who start from the weights that the first of
    ours leaves."""
    weights = bench.folder / "weights.npz"
    sides = [
        side
        for side in (*case.ours, *case.peers)
        if (side.worker == "ours" or bench.peer) and side.runs(bench.limits)
    ]
    children = [stack.enter_context(_open(side, bench)) for side in sides]  # imports overlap
    bench.ended.close()
    told = {**case.spec, **facts, "platform": bench.limits["platform"]}
    read = any(side.worker != "ours" for side in sides)

    def warm(at: int) -> Timed:
        more = {"weights_to": str(weights)} if read and at == 0 else {}
        if sides[at].worker != "ours":
            starting[0].result()
            more = {"weights": str(weights)}
        return _warm(case, sides[at], {**told, **sides[at].spec, **more}, children[at])

    with ThreadPoolExecutor(len(sides)) as pool:
        starting: list[Future[Timed]] = []  # peers look there for the first
        for at in range(len(sides)):
            starting.append(pool.submit(warm, at))
        timed = [_came(case, *one) for one in zip(sides, starting, strict=True)]
    weights.unlink(missing_ok=True)
    return [one for one in timed if one is not None]


def _came(case: Case, side: Side, starting: Future[Timed]) -> Timed | None:
    """None for a peer that did not."""
    try:
        return starting.result()
    except Failed as error:
        if side in case.ours:
            raise
        say(f"{case.name}: {side.name} fails, and is left out: {error}")
        return None


def _open(side: Side, bench: Bench) -> Child:
    if side.worker == "ours":
        return ours(side.env)
    assert bench.peer is not None
    return Child("benchmarks.peers.worker", python=bench.peer, env=side.env)


def _warm(case: Case, side: Side, spec: dict[str, Any], child: Child) -> Timed:
    """Built, compiled, its first losses known."""
    timed = Timed(side, child, child.setup(spec))
    steps = case.check.steps if case.check else 1
    timed.losses = {
        batch: child.run(seconds=0, steps=steps, batch=batch).losses for batch in case.batches
    }
    return timed


def _result(
    case: Case,
    facts: Facts,
    one: Timed,
    other: Timed | None,
    rounds: list[Round],
    batch: int | None,
    bench: Bench,
) -> dict[str, Any]:
    key = one.side.key
    value = spread([r.measured[key].value for r in rounds])
    flops = case.flops(facts) if case.flops else None
    peak = bench.limits.get(f"flops_{one.side.dtype}", bench.limits["flops"])
    return {
        "name": case.row(batch),
        "mode": one.side.mode,
        "dtype": one.side.dtype,
        "value": value.median,
        "value_quartiles": [value.low, value.high],
        "unit": case.unit,
        **_beside(case, one, other, rounds, batch),
        "roofline_share": flops * value.median / peak if flops else None,
        "flops_per_example": flops,
        "peak_rss_bytes": one.child.peak_rss_bytes,
        "cpu_seconds_per_example": _cpu(rounds, key),
        "batch": one.facts.get("batch") if batch is None else batch,
        "params": one.facts.get("params"),
        "tokens": facts.get("tokens"),
        "rounds": len(rounds),
        "disturbed": max(r.others for r in rounds),
        **{name: v for name, v in rounds[-1].measured[key].more.items()},
    }


def _beside(
    case: Case, one: Timed, other: Timed | None, rounds: list[Round], batch: int | None
) -> dict[str, Any]:
    """What compares the two."""
    if other is None:
        names = ("peer", "peer_value", "ratio", "ratio_quartiles", "rss_ratio", "loss_difference")
        return {**dict.fromkeys(names), "valid": True}
    key, peer = one.side.key, other.side.key
    found = ratios(rounds, key, peer, more_is_better=case.more_is_better)
    ratio, apart = spread(found), difference(case, one, other, batch)
    peak, theirs = one.child.peak_rss_bytes, other.child.peak_rss_bytes
    slack = BFLOAT16_TIMES if "bfloat16" in (one.side.dtype, other.side.dtype) else 1
    return {
        "peer": other.side.name,
        "peer_value": spread([r.measured[peer].value for r in rounds]).median,
        "peer_dtype": other.side.dtype,
        "ratio": ratio.median,
        "ratio_quartiles": [ratio.low, ratio.high],
        "peer_peak_rss_bytes": theirs,
        "rss_ratio": theirs / peak if theirs and peak else None,
        "peer_cpu_seconds_per_example": _cpu(rounds, peer),
        "peer_facts": {**other.facts, **rounds[-1].measured[peer].more},
        "loss_difference": apart,
        "valid": case.check is None
        or (apart is not None and apart <= slack * case.check.tolerance),
    }


def difference(case: Case, one: Timed, other: Timed, batch: int | None = None) -> float | None:
    """Largest relative difference of the first losses; of the very first if updates differ."""
    if case.check is None:
        return None
    steps = 1 if "fast" in (one.side.mode, other.side.mode) else case.check.steps
    first = (side.losses.get(batch, ())[:steps] for side in (one, other))
    pairs = list(zip(*first, strict=False))
    if len(pairs) < steps:
        return None
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def _cpu(rounds: list[Round], key: str) -> float | None:
    examples = sum(r.measured[key].examples for r in rounds)
    return sum(r.measured[key].cpu_seconds for r in rounds) / examples if examples else None
