"""Eight simulated CPU devices, a compile cache that outlives the run, and shared tiny data."""

import os
import shutil
from pathlib import Path

os.environ["NPROC"] = "32"  # fewer abort the process when many async collectives are queued
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # a process per core: t-SNE's threads would wait for each other
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # These programs run for less time than they compile.
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"  # other cores have tests of their own
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/loopfm_jax/test-xla").expanduser())
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402
from command_line import SYNTHETIC, CommandLine, configuration  # noqa: E402

from loopfm_jax import cli  # noqa: E402
from loopfm_jax.data.prepare import prepare  # noqa: E402
from loopfm_jax.data.synthetic import Synthetic  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = Synthetic(rows=2000, rows_per_user=20, topics=3, items_per_topic=5)


@pytest.fixture(scope="session")
def kuairand_window() -> Path:
    """The real KuaiRand-Pure window that lies beside the repository (or under $LOOPFM_SHARED)."""
    beside = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("LOOPFM_SHARED", beside)) / "data" / "kuairand_pure_window"
    if not folder.is_dir():
        pytest.skip(f"no real log: {folder} is not there (set LOOPFM_SHARED)")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a prepared log of 2,000 simulated rows; nobody writes to it."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    folder.mkdir()
    prepare(TINY.read(), TINY.windows, name=TINY.name, card=TINY.card, directory=folder)
    return folder


@pytest.fixture
def loopfm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line with a tiny configuration and a working directory of its own."""
    return CommandLine(tmp_path, capsys)


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the log, FM and histories of the tiny configuration; not written to."""
    folder = tmp_path_factory.mktemp("exported")
    config, workdir = folder / "config.py", folder / "run"
    config.write_text(configuration(SYNTHETIC))
    for command in ("prepare", "train-fm", "export", "structure"):
        cli.main([command, str(config), "--workdir", str(workdir)])
    return workdir


@pytest.fixture
def exported(exported_run: Path, loopfm: CommandLine) -> CommandLine:
    """`loopfm` after these stages, in a copy of that directory."""
    shutil.copytree(exported_run, loopfm.workdir)
    return loopfm
