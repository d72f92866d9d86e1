"""What a study makes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StudyConfig:
    """`loopfm study`."""

    tables: tuple[str, ...] = ("transfers",)
    """Names of study/tables.py, also as one comma-separated word."""
    taps: tuple[str, ...] = ("item", "entity")
    """Exported besides fm.taps: what the tables `transfers` and `tap` read. A log without columns
    of the item or of the key has no tap of that name."""
    vms: tuple[str, ...] = ("deepfm", "dmin")
    """Backbones of the VM in the table `transfers`."""
    lengths: tuple[int, ...] = (5, 10, 25, 50)
    """L in the table `length`."""
    keys: tuple[str, ...] = ("key",)
    """Rows of the table `key`: what histories are grouped by, several kinds joined by a comma."""
