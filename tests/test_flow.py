"""The whole loop through the command line, on a planted signal, and what its files promise."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopfm_jax import cli, stages

CONFIG = """
from pathlib import Path
from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config
from loopfm_jax.data.batches import OrderConfig
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.history.store import HistoryConfig
from loopfm_jax.loop import TrainConfig
from loopfm_jax.optim import OptimConfig
from loopfm_jax.tables import TableConfig
from loopfm_jax.history.encoders import EncoderConfig
from loopfm_jax.vm.student import VMConfig

BACKBONE = BackboneConfig(hidden=(32, 16), tables=TableConfig(width=8, init_std=0.01))

def get_config():
    return Config(
        data=Synthetic(rows=80000, topics=4, items_per_topic=10, gap=0.95),
        fm=FMConfig(
            backbone=BACKBONE,
            train=TrainConfig(order=OrderConfig(order="shuffled", epochs=2, batch=256),
                              optim=OptimConfig(learning_rate=3e-3)),
        ),
        history=HistoryConfig(length=10),
        vm=VMConfig(
            backbone=BACKBONE,
            encoder=EncoderConfig(name="mean", width=16),
            train=TrainConfig(order=OrderConfig(batch=256), optim=OptimConfig(learning_rate=3e-3)),
        ),
        seeds=2, workdir=Path(WORKDIR),
    )
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration file, run directory) of a complete run with one control."""
    root = tmp_path_factory.mktemp("flow")
    config = root / "config.py"
    config.write_text(CONFIG.replace("WORKDIR", repr(str(root / "run"))))
    cli.main(["run", str(config), "--control", "swapped-histories"])
    return config, root / "run"


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_transfer_beats_base_on_the_planted_signal(finished: tuple[Path, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    methods = report["methods"]
    assert methods["kd+loopfm"]["delta_auc"] > 0.02
    assert methods["kd+loopfm"]["seeds_won"] == 2
    assert methods["loopfm"]["delta_auc"] > 0.02
    assert report["fm"]["ne"] < methods["base"]["ne"]
    assert 0.1 < report["transfer_ratio"]["loopfm"]["value"] < 1.5
    assert report["bayes"]["oracle"] < report["bayes"]["bayes_vm"] < methods["base"]["ne"]


def test_histories_of_other_keys_transfer_nothing(finished: tuple[Path, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    control = report["controls"]["swapped-histories"]["loopfm"]
    assert control["delta_auc"] < report["methods"]["loopfm"]["delta_auc"] / 4


def test_the_last_line_is_the_report(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("manifest.json")}
    cli.main(["run", str(config), "--control", "swapped-histories"])
    line = last_line(capsys)
    assert set(line) >= {
        "workdir", "dataset", "rows", "seeds", "fm", "methods", "transfer_ratio", "history",
        "seconds",
    }  # fmt: skip
    for row in line["methods"].values():
        assert set(row) >= {
            "auc", "gauc", "logloss", "ne", "calibration", "params", "train_examples_per_s",
            "auc_std",
        }  # fmt: skip
    assert set(line["history"]) >= {"mean_length", "store_bytes", "bytes_per_row"}
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("manifest.json")} == before, "skipped"


def test_every_stage_folder_is_complete_and_verifiable(finished: tuple[Path, Path]) -> None:
    folders = [p.parent for p in finished[1].rglob("manifest.json")]
    assert len(folders) == 4 + 4 * 2 + 2  # four stages, four methods and a control, two seeds
    for folder in folders:
        stages.verify(folder)
    for name in ("report.json", "report.md", "report.html", "config.json"):
        assert (finished[1] / name).stat().st_size > 0
    assert not list(finished[1].rglob(".*partial"))


def test_the_same_command_gives_the_same_bytes(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir = finished
    for command in ("prepare", "train-fm", "export", "structure"):
        cli.main([command, str(config), "--workdir", str(tmp_path / "again")])
    capsys.readouterr()
    for stage in ("data", "fm/export", "history"):
        first = json.loads((workdir / stage / "manifest.json").read_text())
        again = json.loads((tmp_path / "again" / stage / "manifest.json").read_text())
        assert first["files"] == again["files"], stage


def test_a_sharded_run_agrees_with_one_device(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Stage by stage: what each makes of the same input, on one device and on 4 x 2."""
    one, many = tmp_path / "one", tmp_path / "many"
    # fp32 codes: a rounding difference of the FM would flip a few int4 levels
    small = "--data.rows 6000 --seeds 1 --methods kd+loopfm --export.code fp32".split()
    mesh = ["--mesh.data", "4", "--mesh.model", "2"]

    def command(name: str, workdir: Path, *more: str) -> None:
        cli.main([name, str(finished[0]), "--workdir", str(workdir), *small, *more])

    def curve(folder: Path) -> list[float]:
        facts = json.loads((folder / "manifest.json").read_text())["facts"]
        return [point["logloss"] for point in facts["curve"]]

    command("run", one)
    shutil.copytree(one, many)
    for folder in ("fm", "vm"):
        shutil.rmtree(many / folder)
    for name in ("train-fm", "export"):
        command(name, many, *mesh)
    np.testing.assert_allclose(curve(many / "fm/teacher"), curve(one / "fm/teacher"), rtol=1e-4)
    soft, codes = (
        [np.load(run / "fm/export" / f"{array}.npy") for run in (one, many)]
        for array in ("soft", "codes_hidden_0")
    )
    np.testing.assert_allclose(*soft, atol=1e-5)
    assert np.abs(codes[0] - codes[1]).mean() < 5e-3  # small units are scaled up, with their noise
    shutil.rmtree(many / "fm")
    shutil.copytree(one / "fm", many / "fm")
    command("train-vm", many, *mesh)
    for method in ("base", "kd+loopfm"):
        folder = Path("vm") / method / "seed_0"
        np.testing.assert_allclose(curve(many / folder), curve(one / folder), rtol=1e-4)
        predictions = [np.load(run / folder / "prediction.npy") for run in (one, many)]
        np.testing.assert_allclose(*predictions, atol=1e-3)


def test_report_can_be_rendered_again(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir = finished
    (workdir / "report.html").unlink()
    cli.main(["report", str(config)])
    assert "<html" in (workdir / "report.html").read_text()
