"""One experiment = one `Config`: a file's `get_config()`, overridden by the command line."""

import runpy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loopfm_jax.aot.config import CompileConfig
from loopfm_jax.data.bars_sets import AmazonElectronicsX1, KuaiVideoX1, TaobaoAdX1
from loopfm_jax.data.kuairand import KuaiRandPure
from loopfm_jax.data.log import LogResidency
from loopfm_jax.data.raw import Holdout
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.data.tabular import TabularLog
from loopfm_jax.data.taobao_ad import TaobaoAd
from loopfm_jax.engine import BeamConfig, Engine
from loopfm_jax.errors import UserError, check_limits, check_tuples
from loopfm_jax.fm.exporter import ExportConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.processes import ProcessesConfig
from loopfm_jax.scale.config import ScaleConfig
from loopfm_jax.sharding import MeshConfig
from loopfm_jax.study.config import StudyConfig
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.student import VMConfig

MOST_SEED = 2_000_000_000
"""Further seeds, and days of a refreshed FM, count on from it, in 32 bits."""
Control = Literal["swapped-histories", "shuffled-labels"]


@dataclass(frozen=True)
class Config:
    """A whole LoopFM experiment."""

    data: (
        Synthetic
        | KuaiRandPure
        | TaobaoAd
        | TaobaoAdX1
        | KuaiVideoX1
        | AmazonElectronicsX1
        | TabularLog
    ) = field(default_factory=Synthetic)
    fm: FMConfig = field(default_factory=FMConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    history: HistoryConfig = field(default_factory=HistoryConfig)
    vm: VMConfig = field(default_factory=VMConfig)
    methods: tuple[str, ...] = ("base", "kd", "loopfm", "kd+loopfm")
    """Transfer methods to compare; `base` is always trained."""
    transfer: Literal["listed", "auto"] = "listed"
    """`auto` adds a row: the channels and their weight that the validation window favours."""
    control: tuple[Control, ...] = ()
    """Extra VMs: histories of other keys, and an FM trained on shuffled labels."""
    seeds: int = 1
    """VMs per method; the FM is trained once, with the first seed."""
    seed: int = 0
    """The first seed."""
    holdout: Holdout = "test"
    """Judge VMs on this window; `validation` leaves the test window alone (for choices)."""
    study: StudyConfig = field(default_factory=StudyConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    log_residency: LogResidency = "auto"
    """Where the prepared log waits for training and inference: whole in `memory`, or in its
    `blocks` on disk, of which some dozens are decoded at a time. `auto`: in memory while it takes a
    quarter of it, or where `order` is `shuffled`, a full permutation, which needs that; `mixed`
    does not. Batches are the same."""
    engine: Engine = "polars"
    """What prepares and structures: this machine (`polars`), or the workers of an Apache Beam
    pipeline (`beam`; the extra [beam]). The files are the same."""
    beam: BeamConfig = field(default_factory=BeamConfig)
    workdir: Path = Path("runs/default")
    """Where everything is written."""
    force: bool = False
    """Redo stages even if they are up to date or were made with another configuration."""

    @property
    def pipeline(self) -> BeamConfig | None:
        """Where Beam pipelines run, if these are asked for."""
        return self.beam if self.engine == "beam" else None

    def __post_init__(self) -> None:
        check_tuples("", self)
        for method in self.methods:
            find_method(method)
        for encoder in (self.vm.encoder, self.fm.encoder):
            encoder.check_code(self.export.code)
        if self.export.refresh == "anchored" and self.fm.compressor.kind != "autoencoder":
            raise UserError(
                f"export.refresh anchored trains the compressor, but {self.fm.compressor.kind} has "
                "nothing to train: use linear, or --fm.compressor.kind autoencoder"
            )
        if self.export.refresh != "fixed" and self.log_residency == "blocks":
            raise UserError(
                f"--export.refresh {self.export.refresh} needs the log in memory, as every day is "
                "learned in a full permutation: --log-residency memory"
            )
        check_limits("config", {"seeds": self.seeds}, low=1)
        check_limits("config", {"seed": self.seed}, low=0, high=MOST_SEED)


def load(path: Path) -> Config:
    """Runs `get_config()` of a Python file.

    Raises:
      UserError: no such file, no `get_config`, or it returns something else.
    """
    if not path.is_file():
        raise UserError(f"no configuration file {path}; see configs/ for examples")
    get_config: Callable[[], Any] | None = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise UserError(f"{path} defines no get_config()")
    config = get_config()
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {path} returned {type(config).__name__}, not a Config")
    return config


def as_json(part: Any) -> Any:
    """A part of a configuration as JSON values."""
    return _plain(asdict(part))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
