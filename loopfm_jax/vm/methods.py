"""The transfer methods by name: which channels from FM to VM are open."""

from dataclasses import dataclass, replace

from loopfm_jax.errors import UserError
from loopfm_jax.history.store import Side


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    kd: bool = False
    """Distil the FM's soft label through an auxiliary head (ExFM, arXiv 2502.17494)."""
    history: bool = False
    """Read histories of the FM's codes."""
    side: tuple[Side, ...] = ()
    """What is told of every entry besides its code (off in the paper's setting)."""


METHODS = {
    "base": Method(),
    "kd": Method(kd=True),
    "loopfm": Method(history=True),
    "kd+loopfm": Method(kd=True, history=True),
    "loopfm+outcome": Method(history=True, side=("outcome", "age")),
    "kd+loopfm+outcome": Method(kd=True, history=True, side=("outcome", "age")),
}


def find_method(name: str, *, side: tuple[Side, ...] = ()) -> Method:
    """The method of a name; `side` is told of history entries on top of what the method tells.

    Raises:
      UserError: no such method.
    """
    if name not in METHODS:
        raise UserError(f"no method {name!r}: methods are {', '.join(METHODS)}")
    method = METHODS[name]
    if not method.history:
        return method
    return replace(method, side=tuple(dict.fromkeys((*side, *method.side))))
