"""What a sweep measures: points, each a model of known size, described in JSON for its process."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from flax import nnx

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.bench.data import HistorySpec, read_codes
from loopfm_jax.bench.flops import COUNTED
from loopfm_jax.bench.public import PUBLIC
from loopfm_jax.config import Config
from loopfm_jax.data.schema import Field, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.fm.teacher import FMConfig, Teacher
from loopfm_jax.history.codes import Codec
from loopfm_jax.scale.config import Sweep
from loopfm_jax.scale.dial import Growth, Size, Turned, measure, turn
from loopfm_jax.units import short
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.student import Student, VMConfig

SMALL = 1000
"""Fields with fewer rows than this keep them, however large the tables are."""
HISTORY = HistorySpec()
FAR = 0.05
"""A size is refused when the nearest that its shape allows is further off than this."""


@dataclass(frozen=True)
class Point:
    """A model to measure."""

    sweep: Sweep
    target: float
    """Dense parameters; of the sweep `tables`, table rows."""
    size: Size
    table_rows: int
    spec: dict[str, Any]
    """Of its process, without what only a run knows: the examples' path, the machine."""

    @property
    def name(self) -> str:
        return f"{self.sweep} {short(self.target)}"


def plan(config: Config, *, dtype: str) -> list[Point]:
    """The points in the order in which they run, smallest first.

    Raises:
      UserError: a backbone that cannot be widened, or a size that none of its widths has.
    """
    points = []
    for sweep in config.scale.sweeps:
        _check(config, sweep)
        points += _tables(config, dtype) if sweep == "tables" else _dense(config, sweep, dtype)
    return points


def _side(config: Config, sweep: Sweep) -> FMConfig | VMConfig:
    return config.vm if sweep == "vm" else config.fm


def _check(config: Config, sweep: Sweep) -> None:
    """What would fail only in the process of a point."""
    side, backbone = "vm" if sweep == "vm" else "fm", _side(config, sweep).backbone
    batch = _side(config, sweep).train.order.batch
    if batch > config.scale.examples or batch % config.mesh.data:
        raise UserError(
            f"{side}.train.order.batch is {batch}; it must be at most scale.examples "
            f"({config.scale.examples}) and a multiple of mesh.data ({config.mesh.data})"
        )
    if sweep == "vm" and config.vm.encoder.trainable_codes:
        raise UserError(
            "the histories that scale generates are int4, whose codes name no vectors to train: "
            "leave --vm.encoder.trainable-codes out"
        )
    if backbone.name not in COUNTED:
        raise UserError(
            f"{side}.backbone.name is {backbone.name}, whose operations are not counted: scale "
            f"sweeps {', '.join(COUNTED)} (--{side}.backbone.name {COUNTED[0]}), or leave {sweep} "
            "out of --scale.sweeps"
        )


def _dense(config: Config, sweep: Sweep, dtype: str) -> list[Point]:
    schema, known = schema_of(config.scale.table_rows), {}
    side = _side(config, sweep)

    def count(backbone: BackboneConfig) -> Size:
        return measure(builder(config, sweep, backbone, schema))

    points = []
    for target in sorted(config.scale.sizes):
        turned = turn(side.backbone, target, count, growth=Growth(config.scale.widen), known=known)
        _check_size(sweep, target, turned)
        spec = _spec(config, sweep, turned.backbone, schema, dtype)
        points.append(Point(sweep, target, turned.size, schema.table_rows, spec))
    return points


def _tables(config: Config, dtype: str) -> list[Point]:
    """The FM as configured over ever larger tables; exact rules would learn all rows a step."""
    rule = config.fm.train.optim.tables
    optim = replace(config.fm.train.optim, tables="rowwise_adagrad" if rule == "adam" else rule)
    config = replace(config, fm=replace(config.fm, train=replace(config.fm.train, optim=optim)))
    points = []
    for target in sorted(config.scale.rows):
        schema, backbone = schema_of(round(target)), config.fm.backbone
        size = measure(builder(config, "tables", backbone, schema))
        spec = _spec(config, "tables", backbone, schema, dtype)
        points.append(Point("tables", target, size, schema.table_rows, spec))
    return points


def _check_size(sweep: Sweep, target: float, turned: Turned) -> None:
    dense = turned.size.dense
    if abs(dense / target - 1) > FAR:
        widths = " ".join(map(str, turned.backbone.hidden))
        raise UserError(
            f"scale.sizes holds {short(target)}, but the {sweep} nearest to it (--{sweep}.backbone"
            f".hidden {widths}) has {dense:,} dense parameters: name another size, or change what "
            f"is not widened ({sweep}.backbone, the compressor or the encoder)"
        )


def schema_of(rows: int) -> Schema:
    """TaobaoAd's fields, their vocabularies scaled to so many table rows in all."""
    schema = PUBLIC["TaobaoAd_x1"].schema
    kept = sum(f.rows for f in schema.owners if f.rows < SMALL)
    by = (rows - kept) / (schema.table_rows - kept)

    def scaled(f: Field) -> Field:
        return f if f.rows < SMALL else replace(f, rows=max(2, round(by * f.rows)))

    return replace(schema, fields=tuple(scaled(f) for f in schema.fields))


def builder(
    config: Config,
    sweep: Sweep,
    backbone: BackboneConfig,
    schema: Schema,
    codec: Codec | None = None,
) -> Callable[[nnx.Rngs], nnx.Module]:
    """What a sweep trains, with this backbone.

    codec: of the histories that a VM reads; default: int4, as they are generated.
    """
    schema = schema.read(behaviours=backbone.reads_behaviours)
    if sweep == "vm":
        vm: VMConfig = replace(config.vm, backbone=backbone)
        reading = read_codes(codec or Codec("int4", config.fm.compressor.width))
        method = find_method("loopfm")
        return lambda rngs: Student(schema, vm, method, reading, rngs=rngs)
    fm: FMConfig = replace(config.fm, backbone=backbone)
    return lambda rngs: Teacher(schema, fm, rngs=rngs)


def _spec(
    config: Config, sweep: Sweep, backbone: BackboneConfig, schema: Schema, dtype: str
) -> dict[str, Any]:
    """What `bench.model` builds from."""
    side = _side(config, sweep)
    spec = {
        "schema": schema.read(behaviours=backbone.reads_behaviours).to_json(),
        "backbone": asdict(backbone),
        "optim": asdict(side.train.optim),
        "batch": side.train.order.batch,
        "dtype": dtype,
        "mesh": asdict(config.mesh),
        "seed": config.seed,
    }
    if sweep != "vm":
        return spec | {"taps": list(config.fm.taps), "compressor": asdict(config.fm.compressor)}
    histories = replace(
        HISTORY,
        length=config.history.length,
        mean=max(1, round(config.history.length * HISTORY.mean / HISTORY.length)),
        width=config.fm.compressor.width,
    )
    return spec | {"encoder": asdict(config.vm.encoder), "histories": asdict(histories)}
