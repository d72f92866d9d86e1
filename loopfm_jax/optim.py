"""The public reference's optimiser (PAPER section 5): whole-table L2, gradient-norm clip, Adam."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import optax

from loopfm_jax.errors import check_limits


@dataclass(frozen=True)
class OptimConfig:
    """Adam as FuxiCTR runs it: dense, the L2 penalty inside the clipped gradient."""

    learning_rate: float = 1e-3
    clip_norm: float = 10.0
    """Global gradient norm."""
    embedding_l2: float = 0.0
    """Penalty l2/2 * |table|^2 on the whole tables at every step (TaobaoAd: 5e-6)."""
    cooldown: float = 0.0
    """Last share of the steps, over which the learning rate falls to 0 in a straight line."""

    def __post_init__(self) -> None:
        positive = {"learning_rate": self.learning_rate, "clip_norm": self.clip_norm}
        check_limits("optim", positive, low=1e-12)
        check_limits("optim", {"embedding_l2": self.embedding_l2}, low=0)
        check_limits("optim", {"cooldown": self.cooldown}, low=0, high=1)


def make_optimiser(config: OptimConfig, *, steps: int) -> optax.GradientTransformation:
    """The optimiser of a training run of so many steps."""
    rate, cooling = config.learning_rate, round(config.cooldown * steps)
    if cooling:
        rate = optax.linear_schedule(rate, 0.0, cooling, transition_begin=steps - cooling)
    return optax.chain(
        optax.add_decayed_weights(config.embedding_l2, mask=_tables),
        optax.partition(
            {part: optax.clip_by_global_norm(config.clip_norm) for part in ("model", "compressor")},
            _part,  # a compressor trains beside the FM and must not weaken its updates
        ),
        optax.adam(rate, eps=1e-8),
    )


def _tables(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: bool(re.search(r"rows_VE|numeric_NE", jax.tree_util.keystr(path))), params
    )


def _part(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: "compressor" if "compressors" in jax.tree_util.keystr(path) else "model",
        params,
    )
