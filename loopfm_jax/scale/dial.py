"""The dial: a number of dense parameters -> hidden widths.

All widths of the DNN and of wukong's layers (with `widen="all"` also of the attention scores) are
multiplied by one factor, so that a model keeps its shape; depth is the number of entries in
`hidden` and stays what the configuration says, as do embedding width, encoder and compressor.
Parameters are counted by building the model's shapes, which takes no memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from flax import nnx

from loopfm_jax import loop, rows
from loopfm_jax.backbones import BackboneConfig

ALIGNED = 8
"""Wide layers are multiples of this, which matrix units want."""
TOLERANCE = 0.005
TRIALS = 20
WIDE, FURTHEST = 4.0, 100.0
"""Between factors, and of a step beyond them."""


@dataclass(frozen=True)
class Size:
    """Trained parameters."""

    dense: int
    tables: int


@dataclass(frozen=True)
class Turned:
    """Where the dial stands."""

    backbone: BackboneConfig
    size: Size


def measure(build: Callable[[nnx.Rngs], nnx.Module]) -> Size:
    """Counts a model by its shapes."""
    model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    dense, tables = rows.split(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return Size(loop.count(dense), loop.count(tables))


def widen(config: BackboneConfig, by: float, what: Literal["dnn", "all"]) -> BackboneConfig:
    """Hidden widths times `by`, rounded; at least 1."""
    names = ["hidden", *(["mix_hidden"] if config.name == "wukong" else [])]
    names += ["attention_hidden"] if what == "all" else []
    grown = {name: tuple(_round(by * w) for w in getattr(config, name)) for name in names}
    return replace(config, **grown)


def _round(width: float) -> int:
    step = ALIGNED if width >= 16 * ALIGNED else 1
    return max(1, step * round(width / step))


def turn(
    config: BackboneConfig,
    target: float,
    count: Callable[[BackboneConfig], Size],
    *,
    what: Literal["dnn", "all"] = "dnn",
    known: dict[float, Turned] | None = None,
) -> Turned:
    """The widths whose dense parameters are nearest to `target`, by secants in logarithms.

    Where even one unit a layer is too much, that is what is returned.

    Args:
      known: factor -> what it gave, for further targets to start from.
    """
    known = {} if known is None else known
    for _ in range(TRIALS):
        factor = _next(known, target)
        backbone = widen(config, factor, what)
        if any(backbone == turned.backbone for turned in known.values()):
            break  # nothing lies between
        known[factor] = Turned(backbone, count(backbone))
        if _off(known[factor], target) < TOLERANCE or max(backbone.hidden) == 1:
            break
    return min(known.values(), key=lambda turned: _off(turned, target))


def _next(known: dict[float, Turned], target: float) -> float:
    """The factor that the nearest known ones promise, one on either side if there is."""
    if not known:
        return 1.0
    dense = {factor: turned.size.dense for factor, turned in known.items()}
    below = max((f for f in dense if dense[f] < target), default=None)
    above = min((f for f in dense if dense[f] >= target), default=None)
    if below is None or above is None:
        one, *others = sorted(dense, key=lambda f: _off(known[f], target))
        other = others[0] if others else None
    elif above > WIDE * below:
        return math.sqrt(above * below)  # parameters bend between them
    else:
        one, other = below, above
    slope = 4 / 3  # parameters grow between linearly and quadratically
    if other is not None and dense[one] != dense[other]:
        slope = math.log(dense[other] / dense[one]) / math.log(other / one)
    step = (target / dense[one]) ** (1 / slope)
    return one * min(max(step, 1 / FURTHEST), FURTHEST)


def _off(turned: Turned, target: float) -> float:
    """Relative to the target, alike in both directions."""
    return abs(math.log(turned.size.dense / target))
