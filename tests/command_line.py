"""Running commands in this process, and a configuration whose models are next to nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loopfm_jax import cli, stages

CONFIG = """
from pathlib import Path

from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.bars_sets import AmazonElectronicsX1, KuaiVideoX1, TaobaoAdX1
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.kuairand import KuaiRandPure
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.data.tabular import TabularLog
from loopfm_jax.data.taobao_ad import TaobaoAd
from loopfm_jax.fm.compressor import CompressorConfig
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.vm.student import VMConfig

TRAIN = TrainConfig(order=OrderConfig(batch=64))
DEEPFM = BackboneConfig(hidden=(8,), tables=TableConfig(width=4))


def get_config() -> Config:
    return Config(
        data={data},
        fm=FMConfig(
            backbone=DEEPFM,
            compressor=CompressorConfig(width=4, prefixes=(), hidden=(8,)),
            train=TRAIN,
        ),
        vm=VMConfig(backbone=DEEPFM, encoder=EncoderConfig(name="mean"), train=TRAIN),
        history=HistoryConfig(length=5),
        methods=("base",),
    )
"""
SYNTHETIC = "Synthetic(rows=2000, rows_per_user=20, topics=3, items_per_topic=5)"


def configuration(data: str) -> str:
    """A configuration file over this data set."""
    return CONFIG.replace("{data}", data)


class CommandLine:
    """`loopfm` with a configuration file and a working directory of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.config, self.workdir, self._capsys = folder / "config.py", folder / "run", capsys
        self.configure(SYNTHETIC)

    def configure(self, data: str) -> None:
        """`data`: the data set as Python text."""
        self.config.write_text(configuration(data))

    def argv(self, command: str, *options: str) -> list[str]:
        return [command, str(self.config), "--workdir", str(self.workdir), *options]

    def succeed(self, command: str, *options: str) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        stages._checked.cache_clear()
        cli.main(self.argv(command, *options))
        last = self._capsys.readouterr().out.splitlines()[-1]
        return json.loads(last, parse_constant=_no_constant)

    def fail(self, argv: Sequence[str]) -> str:
        """The one message of a command that must be refused."""
        stages._checked.cache_clear()
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(argv))
        captured = self._capsys.readouterr()
        assert stopped.value.code == 2
        assert "Traceback" not in captured.err and not captured.out
        messages = [line for line in captured.err.splitlines() if line.startswith("loopfm: ")]
        if not messages:  # tyro's own words, in a box
            assert "For full helptext" in captured.err
            return " ".join(captured.err.split())
        assert len(messages) == 1 and captured.err.endswith(messages[0] + "\n")
        return messages[0]

    def refuse(self, command: str, *options: str, leaves: Sequence[str] = ()) -> str:
        """As `fail`, and the working directory must hold nothing but `leaves`."""
        message = self.fail(self.argv(command, *options))
        assert set(self.files()) <= set(leaves), self.files()
        return message

    def files(self) -> list[str]:
        paths = self.workdir.rglob("*")
        return sorted(str(p.relative_to(self.workdir)) for p in paths if p.is_file())


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
