"""What `loopfm bench` is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loopfm_jax.errors import check_limits


@dataclass(frozen=True)
class BenchConfig:
    """Rates of this package beside a peer's and the machine's limits, in one run."""

    rows: tuple[str, ...] = ()
    """Rows (`fm-train`) or single cases (`fm-train/din-bars`); default: the standard set."""
    peer: Literal["none", "fuxictr"] = "none"
    """Whom to compare with; the extra [peers]."""
    peer_python: Path | None = None
    """The interpreter that has the peer's packages; default: this one."""
    rounds: int = 5
    """In each of which every side runs once."""
    seconds: float = 2.0
    """Of a side in a round; at least one step."""
    out: Path | None = None
    """A folder for <device>-<date>.json and its picture."""

    def __post_init__(self) -> None:
        check_limits("bench", {"rounds": self.rounds}, low=1)
        check_limits("bench", {"seconds": self.seconds}, low=0)
