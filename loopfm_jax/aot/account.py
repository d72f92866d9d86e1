"""What a compiled program needs: bytes by kind, collectives, and a roofline of its time.

The time is an estimate, never a measurement: that of the slowest of arithmetic, HBM and links if
they overlap wholly (`at_best_s`), of all three one after the other if not at all (`at_worst_s`),
each at its published peak. Operations are the model's (`bench.flops`). HBM traffic is the least
that a step can move: what it goes over from end to end and its activations, read and written
once; the compiler's own count takes a loop's body once and a lookup for its whole table.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax

from loopfm_jax.aot.chips import Chip
from loopfm_jax.aot.hlo import collectives
from loopfm_jax.aot.programs import Program

Account = dict[str, Any]
USABLE = 0.94
"""Of HBM: the rest is the runtime's own."""


def account(program: Program, compiled: jax.stages.Compiled, *, devices: int) -> Account:
    """Per device: bytes by kind of what the step is given, and of what else it holds; collectives
    of a step."""
    told: Any = compiled.memory_analysis()
    held = {kind: held_bytes(tree) for kind, tree in program.held.items()}
    made = told.output_size_in_bytes - told.alias_size_in_bytes
    held["padding"] = max(0, told.argument_size_in_bytes - sum(held.values()))
    held["activations"] = told.temp_size_in_bytes + max(0, made)
    held["program"] = told.generated_code_size_in_bytes
    sent = collectives(compiled.as_text() or "", devices=devices)
    return {
        "examples": program.examples,
        "bytes": held,
        "total_bytes": sum(held.values()),
        "moved_bytes": 2 * (held_bytes(program.swept) + held["activations"]),
        "collectives": [asdict(one) for one in sent],
        "collective_bytes": sum(one.bytes for one in sent),
    }


def held_bytes(tree: Any) -> int:
    """On one device, of shapes with shardings, as arrays count (layouts may need more)."""

    def one(leaf: Any) -> int:
        shard = leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shard) * leaf.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def estimate(told: Mapping[str, Any], chip: Chip, *, flops: float, devices: int) -> Account:
    """Whether it fits, and between which seconds a step lies.

    Args:
      flops: of a step, all devices together.
    """
    parts = {
        "arithmetic_s": flops / devices / chip.flops,
        "memory_s": told["moved_bytes"] / chip.bandwidth,
        "links_s": told["collective_bytes"] / chip.links,
    }
    best, worst = max(parts.values()), sum(parts.values())
    return {
        "fits": told["total_bytes"] <= USABLE * chip.memory,
        "memory_bytes": chip.memory,
        "flops": flops,
        **parts,
        "at_best_s": best,
        "at_worst_s": worst,
        "bound": max(parts, key=lambda name: parts[name]).removesuffix("_s"),
        "examples_s": [told["examples"] / worst, told["examples"] / best],
        "mfu_at_best": parts["arithmetic_s"] / best,
    }
