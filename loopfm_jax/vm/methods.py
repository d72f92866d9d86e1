"""The transfer methods by name: which channels from FM to VM are open.

A method is `base` or channels joined by `+`: `kd+loopfm`, `raw+loopfm+outcome`.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from loopfm_jax.errors import UserError
from loopfm_jax.history.reader import Content
from loopfm_jax.history.store import Side

Head = Literal["kd", "adapter", "fitnets"]
Feature = Literal["current", "entity"]
Teacher = Literal["fm", "self"]


@dataclass(frozen=True)
class Method:
    """One row of the comparison; the channels of a method are added up."""

    heads: tuple[Head, ...] = ()
    """What the trunk also learns to predict. `kd`: the FM's soft label (ExFM's auxiliary head,
    arXiv 2502.17494); `adapter`: the soft label corrected by labels (ExFM's student adapter);
    `fitnets`: the FM's code of the row itself (FitNets, arXiv 1412.6550)."""
    contents: tuple[Content, ...] = ()
    """What is read of histories."""
    features: tuple[Feature, ...] = ()
    """Codes that join as features: `current`, of the row itself (the FM would have to run when
    the VM serves), or `entity`, of the key's own fields (no interaction in it)."""
    side: tuple[Side, ...] = ()
    """What is told of every entry besides its content (off in the paper's setting)."""
    teacher: Teacher = "fm"
    """`self`: the FM of a second round, which reads histories of the first one's codes."""

    def __add__(self, other: "Method") -> "Method":
        return Method(
            heads=self.heads + other.heads,
            contents=self.contents + other.contents,
            features=self.features + other.features,
            side=self.side + other.side,
            teacher="self" if "self" in (self.teacher, other.teacher) else "fm",
        )

    @property
    def reads_export(self) -> bool:
        """Whether it needs what the FM says of the rows themselves."""
        return bool(self.heads or self.features)

    @property
    def needs_fm(self) -> bool:
        """Whether serving would have to run the FM: not a channel one can deploy."""
        return "current" in self.features


CHANNELS = {
    "kd": Method(heads=("kd",)),
    "adapter": Method(heads=("adapter",)),
    "fitnets": Method(heads=("fitnets",)),
    "loopfm": Method(contents=("loopfm",)),
    "item-only": Method(contents=("item-only",)),
    "soft": Method(contents=("soft",)),
    "raw": Method(contents=("raw",)),
    "current": Method(features=("current",)),
    "entity": Method(features=("entity",)),
    "self": Method(contents=("loopfm",), teacher="self"),
    "outcome": Method(side=("outcome", "age")),
}
"""Name on the command line -> what the channel opens."""


def find_method(name: str, *, side: tuple[Side, ...] = ()) -> Method:
    """The method of a name; `side` is told of history entries on top of what the method tells.

    Raises:
      UserError: no such channel, one named twice, or `outcome` without a history to tell it of.
    """
    if name == "base":
        return Method()
    method = Method()
    for channel in (names := name.split("+")):
        if channel not in CHANNELS:
            close = difflib.get_close_matches(channel, CHANNELS, n=1)
            hint = f", did you mean {close[0]!r}?" if close else "."
            raise UserError(
                f"method {name!r}: no channel {channel!r}{hint} A method is base, or some of "
                f"{', '.join(CHANNELS)} joined by `+`"
            )
        method += CHANNELS[channel]
    if len(set(names)) < len(names) or len(set(method.contents)) < len(method.contents):
        raise UserError(f"method {name!r} opens a channel twice; name each once")
    if method.side and not method.contents:
        raise UserError(
            f"method {name!r}: outcome is told of history entries, but the method reads none; add "
            "loopfm or raw"
        )
    if not method.contents:
        return method
    return method + Method(side=tuple(s for s in side if s not in method.side))
