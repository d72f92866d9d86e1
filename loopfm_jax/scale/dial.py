"""The dial: a number of dense parameters -> hidden widths and depth.

All widths of the DNN and of a stack's layers (with `widen="all"` also of the attention scores) are
multiplied by one factor, so that a model keeps its shape. A stack's depth grows with the square
root of that factor, rounded: four times as wide is twice as deep. What the configuration says stays
of the rest: the number of entries in `hidden`, embedding width, encoder and compressor. Parameters
are counted by building the model's shapes, which takes no memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from flax import nnx

from loopfm_jax import loop, rows
from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.backbones.config import MIXING, STACKED, TOKEN_BACKBONES
from loopfm_jax.rngs import Rngs

ALIGNED = 8
"""Wide layers are multiples of this, which matrix units want."""
WIDE_LAYER, WIDE_TOKEN = 128, 512
"""From here on: a step of 8 must be a small part of what parameters grow by, and they grow with the
square of the tokens' width."""
TOLERANCE = 0.005
TRIALS = 20
WIDE, FURTHEST = 4.0, 100.0
"""Between factors, and of a step beyond them."""


@dataclass(frozen=True)
class Growth:
    """What is widened, and to multiples of what."""

    what: Literal["dnn", "all"] = "dnn"
    aligned: int = ALIGNED
    """Of wide hidden layers; of tokens ALIGNED."""


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
    factor: float
    """Of the widths."""


Known = dict[int, dict[float, Turned]]
"""By depth and factor."""


def measure(build: Callable[[nnx.Rngs], nnx.Module]) -> Size:
    """Counts a model by its shapes."""
    model = nnx.eval_shape(lambda: build(Rngs(0)))
    dense, tables = rows.split(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return Size(loop.count(dense), loop.count(tables))


def widen(config: BackboneConfig, by: float, growth: Growth) -> BackboneConfig:
    """Hidden widths times `by`, rounded; at least 1."""
    names = ["hidden", *(["mix_hidden"] if config.name in MIXING else [])]
    names += ["attention_hidden"] if growth.what == "all" else []
    grow = partial(_round, aligned=growth.aligned)
    grown: dict = {name: tuple(grow(by * w) for w in getattr(config, name)) for name in names}
    if config.name in TOKEN_BACKBONES:
        width, unit = by * config.token_width, config.token_unit
        grown["token_width"] = _round(width, unit=unit, aligned_from=WIDE_TOKEN)
    return replace(config, **grown)


def deepen(config: BackboneConfig, by: float) -> int:
    """Layers of a stack whose widths are multiplied by that; at least 1."""
    grows = config.name in STACKED
    return max(1, round(config.layers * math.sqrt(by))) if grows else config.layers


def _round(
    width: float, *, unit: int = 1, aligned: int = ALIGNED, aligned_from: int = WIDE_LAYER
) -> int:
    step = math.lcm(aligned, unit) if width >= aligned_from else unit
    return max(unit, step * round(width / step))


def turn(
    config: BackboneConfig,
    target: float,
    count: Callable[[BackboneConfig], Size],
    *,
    growth: Growth = Growth(),
    known: Known | None = None,
) -> Turned:
    """The depth and the widths whose dense parameters are nearest to `target`.

    The depth is the one that the widths of that depth ask for. Where two ask for one another, as
    happens where the rounding turns, it is the first of them.

    Args:
      known: what factors gave, for further targets to start from.
    """
    known = {} if known is None else known
    every = [turned for of_depth in known.values() for turned in of_depth.values()]
    near = min(every, key=lambda turned: _off(turned, target), default=None)
    layers, factor = (near.backbone.layers, near.factor) if near else (config.layers, 1.0)
    found: dict[int, Turned] = {}
    while layers not in found:
        deep, of_depth = replace(config, layers=layers), known.setdefault(layers, {})
        found[layers] = _turn(deep, target, count, growth, known=of_depth, start=factor)
        factor = found[layers].factor
        layers = deepen(config, factor)
    return found[layers]


def _turn(
    config: BackboneConfig,
    target: float,
    count: Callable[[BackboneConfig], Size],
    growth: Growth,
    *,
    known: dict[float, Turned],
    start: float,
) -> Turned:
    """The widths alone, by secants in logarithms from the factor `start`.

    Where even one unit a layer is too much, that is what is returned.
    """
    for _ in range(TRIALS):
        factor = _next(known, target) if known else start
        backbone = widen(config, factor, growth)
        if any(backbone == turned.backbone for turned in known.values()):
            break  # nothing lies between
        known[factor] = Turned(backbone, count(backbone), factor)
        if _off(known[factor], target) < TOLERANCE or max(backbone.hidden) == 1:
            break
    return min(known.values(), key=lambda turned: _off(turned, target))


def _next(known: dict[float, Turned], target: float) -> float:
    """The factor that the nearest known ones promise, one on either side if there is."""
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
