"""The tables that a study can make, as functions of its configuration.

Names are those of `--tables`. Each says which of the paper's tables it re-runs (arXiv 2605.29280,
PAPER section 3); the others are ours: what the paper only names.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from loopfm_jax.auto import AUTO
from loopfm_jax.config import Config
from loopfm_jax.errors import UserError
from loopfm_jax.history.encoders import ENCODERS
from loopfm_jax.study.cells import Cell, Table

FOUR = ("base", "kd", "loopfm", "kd+loopfm")
TRANSFERS = (
    *("base", "kd", "kd+adapter", "kd+fitnets", "kd+current", "kd+entity", "item-only", "soft"),
    *("loopfm", "kd+loopfm", "raw", "kd+raw", "raw+loopfm", "self", "kd+self"),
)
OUTCOMES = ("base", "loopfm", "loopfm+outcome", "raw", "raw+outcome", "raw+loopfm+outcome")
WIDTHS = (8, 16, 32, 64)
GAPS = (0.0, 0.4, 0.8, 0.95)
CAPACITIES = {
    "2, 32-16-8": (2, (32, 16, 8)),
    "4, 64-32-16": (4, (64, 32, 16)),
    "8, 128-64-32": (8, (128, 64, 32)),
    "16, 256-128-64": (16, (256, 128, 64)),
    "32, 512-256-128": (32, (512, 256, 128)),
}
"""Embedding width and DNN of the FM (table 10)."""


def transfers(config: Config) -> Table:
    """Every transfer method, for VMs of several backbones (tables 1, 2, 6 and 8)."""
    columns = {name: {"vm.backbone.name": name} for name in config.study.vms}
    return _table("transfers", "Transfer methods (paper: tables 1, 2, 6 and 8)", TRANSFERS, columns)


def unsequenced(config: Config) -> Table:
    """A DeepFM that sees no behaviour sequence of its own (table 7)."""
    alone = {"vm.backbone.name": "deepfm", "vm.backbone.behaviours": False}
    cells = [Cell(method, "", method, alone) for method in ("base", "kd")]
    for method in ("loopfm", "kd+loopfm"):
        for name in ("mean", "dmin"):
            changes = {**alone, "vm.encoder.name": name}
            cells.append(Cell(f"{method}, {name}", "", method, changes))
    title = "DeepFM without behaviour sequences (paper: table 7)"
    return Table("unsequenced", title, tuple(cells))


def seeds(config: Config) -> Table:
    """The four methods with their spread over seeds (table 9)."""
    return _table("seeds", "Spread over seeds (paper: table 9)", FOUR, {"": {}})


def pooling(config: Config) -> Table:
    """How histories are summarised (table 3)."""
    cells = [Cell("base", "", "base", {})]
    cells += [Cell(name, "", "kd+loopfm", {"vm.encoder.name": name}) for name in ENCODERS]
    return Table("pooling", "Encoders of the history, kd+loopfm (paper: table 3)", tuple(cells))


def raw(config: Config) -> Table:
    """Raw id histories against LoopFM, for VMs of two widths (table 4, whose VM is DMIN)."""
    vm = config.vm.backbone
    columns = {
        f"{vm.name}, width {w}": {"vm.backbone.tables.width": w} for w in (vm.tables.width, 2)
    }
    rows = ("base", "raw", "loopfm", "raw+loopfm")
    return _table("raw", "Raw id histories (paper: table 4)", rows, columns)


def tap(config: Config) -> Table:
    """Which activation is exported (tables 5 and 11)."""
    taps = [tap for tap in config.fm.taps if tap not in ("item", "entity")]
    cells = [Cell("base", "", "base", {})]
    cells += [Cell(name, "", "kd+loopfm", {"history.tap": name}) for name in taps]
    cells += [Cell("soft label", "", "kd+soft", {}), Cell("item-only", "", "kd+item-only", {})]
    return Table("tap", "Tap, with kd (paper: tables 5 and 11)", tuple(cells))


def checkpoint(config: Config) -> Table:
    """A frozen FM, and one that goes on learning (table 5; aligned codes are ours)."""
    kinds = ("fixed", "fresh", "linear", "ema", "anchored")
    columns = {"kd": "kd", "loopfm": "loopfm", "kd+loopfm": "kd+loopfm"}
    cells = [Cell("base", column, "base", {}) for column in columns]
    cells += [
        Cell(kind, column, method, {"export.refresh": kind})
        for kind in kinds
        for column, method in columns.items()
    ]
    return Table("checkpoint", "Refreshed FM (paper: table 5)", tuple(cells))


def length(config: Config) -> Table:
    """Entries kept of a history (table 5)."""
    title = "History length L (paper: table 5)"
    return _curve("length", title, "history.length", config.study.lengths)


def dim(config: Config) -> Table:
    """Numbers kept of a code: prefixes of one Matryoshka code, nothing retrained (table 5)."""
    wide = {"fm.compressor.prefixes": WIDTHS, "fm.compressor.width": WIDTHS[-1]}
    return _curve("dim", "Width d of the code (paper: table 5)", "export.prefix", WIDTHS, more=wide)


def growth(config: Config) -> Table:
    """Code width and encoder width, each alone and together (the paper's internal finding)."""
    cells = [Cell("base", "", "base", {})]
    for code in (16, 64):
        for width in (16, 64):
            changes = {
                "fm.compressor.width": WIDTHS[-1],
                "fm.compressor.prefixes": WIDTHS,
                "export.prefix": code,
                "vm.encoder.width": width,
            }
            cells.append(Cell(f"code {code}, encoder {width}", "", "kd+loopfm", changes))
    return Table("growth", "Code and encoder growing together", tuple(cells))


def code(config: Config) -> Table:
    """How a code is stored, kd+loopfm; residual quantisation with 4 and 8 bytes."""
    plain = {"vm.encoder.trainable_codes": False}  # other codes name no vectors to train
    names = ("fp32", "fp16", "int8", "int4", "kmeans4")
    kinds = {name: {"export.code": name, **plain} for name in names}
    kinds |= {f"rq, {k} bytes": {"export.code": "rq", "export.books": k} for k in (4, 8)}
    cells = [Cell("base", "", "base", {})]
    cells += [Cell(name, "", "kd+loopfm", changes) for name, changes in kinds.items()]
    return Table("code", "Codes, kd+loopfm", tuple(cells), reference="fp32")


def capacity(config: Config) -> Table:
    """FMs of growing size (table 10)."""
    cells = [Cell(size, "base", "base", {}) for size in CAPACITIES]
    for size, (width, hidden) in CAPACITIES.items():
        changes = {
            "fm.backbone.tables.width": width,
            "fm.backbone.hidden": hidden,
            "fm.backbone.heads": min(config.fm.backbone.heads, width),
        }
        cells += [Cell(size, method, method, changes) for method in FOUR[1:]]
    return Table("capacity", "Size of the FM (paper: table 10)", tuple(cells), curve=True)


def gap(config: Config) -> Table:
    """What the FM sees and the VM does not, from nothing to nearly all (a simulated log)."""
    if not hasattr(config.data, "gap"):
        raise UserError("the table gap needs a simulated log: configs/synthetic.py")
    cells = [
        Cell(f"{value:g}", method, method, {"data.gap": value}) for value in GAPS for method in FOUR
    ]
    return Table("gap", "Feature gap between FM and VM", tuple(cells), curve=True)


def key(config: Config) -> Table:
    """What histories are grouped by."""
    kinds = [tuple(kind.split(",")) for kind in config.study.keys]
    cells = [Cell("base", "", "base", {})]
    cells += [Cell(" and ".join(k), "", "kd+loopfm", {"history.keys": k}) for k in kinds]
    return Table("key", "Keys of the history, kd+loopfm", tuple(cells))


def stale(config: Config) -> Table:
    """What the soft labels of a stale FM cost, and what removes it (ours)."""
    frozen = ("base", "kd", "adapter", "loopfm", "kd+loopfm", "adapter+loopfm", AUTO)
    cells = [Cell(method, "", method, {}) for method in frozen]
    for kind in ("fresh", "linear"):
        for method in ("kd", "loopfm", "kd+loopfm"):
            cells.append(Cell(f"{method}, {kind}", "", method, {"export.refresh": kind}))
    return Table("stale", "A stale FM, and what helps", tuple(cells))


def keep(config: Config) -> Table:
    """Which entries count: watched ones only, later ones, those of less time."""
    kinds = {
        "as configured": {},
        "positive only": {"history.keep": "positive"},
        "available after 1 hour": {"history.delay_s": 3600.0},
        "available after 1 day": {"history.delay_s": 86_400.0},
        "kept for 1 day": {"history.retention_days": 1.0},
    }
    cells = [Cell("base", "", "base", {})]
    cells += [Cell(name, "", "kd+loopfm", changes) for name, changes in kinds.items()]
    return Table("keep", "Which entries count, kd+loopfm", tuple(cells))


def outcome(config: Config) -> Table:
    """Past outcomes as side information, against raw histories with outcomes."""
    return _table("outcome", "Past outcomes as side information", OUTCOMES, {"": {}})


def decomposition(config: Config) -> Table:
    """The four VMs of the gain decomposition, without and with outcomes (PAPER section 4), and the
    one of codes stored in full."""
    cells = []
    for column, side in (("plain", ""), ("with outcomes", "+outcome")):
        cells.append(Cell("x", column, "base", {}))
        for row, method in (("raw", "raw"), ("loopfm", "loopfm"), ("both", "raw+loopfm")):
            cells.append(Cell(row, column, method + side, {}))
        cells.append(Cell("fp32", column, "loopfm" + side, {"export.code": "fp32"}))
    return Table("decomposition", "Gain decomposition", tuple(cells), reference="x")


TABLES: dict[str, Callable[[Config], Table]] = {
    function.__name__: function
    for function in (
        *(
            transfers,
            unsequenced,
            pooling,
            raw,
            tap,
            checkpoint,
            length,
            dim,
            growth,
            code,
            capacity,
            key,
        ),
        *(keep, outcome, stale, gap, seeds, decomposition),
    )
}


def find_tables(names: Iterable[str], config: Config) -> list[Table]:
    """The tables of these names, or of comma-separated lists of them.

    Raises:
      UserError: no such table, or none at all.
    """
    wanted = [name for part in names for name in part.split(",") if name]
    if not wanted:
        raise UserError(f"--tables names none: give some of {', '.join(TABLES)}")
    for name in wanted:
        if name not in TABLES:
            raise UserError(f"no table {name!r}: tables are {', '.join(TABLES)}")
    return [TABLES[name](config) for name in dict.fromkeys(wanted)]


def _table(
    name: str, title: str, methods: Iterable[str], columns: Mapping[str, Mapping[str, Any]]
) -> Table:
    cells = (Cell(m, column, m, changes) for m in methods for column, changes in columns.items())
    return Table(name, title, tuple(cells))


def _curve(
    name: str,
    title: str,
    option: str,
    values: Iterable[int],
    *,
    more: Mapping[str, Any] | None = None,
) -> Table:
    cells = [
        Cell(str(value), method, method, {**(more or {}), option: value})
        for value in values
        for method in ("base", "loopfm", "kd+loopfm")
    ]
    return Table(name, title, tuple(cells), curve=True)
