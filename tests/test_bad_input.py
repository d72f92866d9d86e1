"""A user's mistake: one message with value, limit and fix, exit 2, and nothing half-written."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import SYNTHETIC, CommandLine

from loopfm_jax import cli, report
from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.data import builder
from loopfm_jax.data.synthetic import Synthetic
from loopfm_jax.errors import UserError
from loopfm_jax.scale.config import ScaleConfig


def has(message: str, *words: str) -> None:
    assert all(word in message for word in words), message


OPTIONS = {
    "unknown option": (["--data.rowz", "500"], ["--data.rowz", "Perhaps you meant", "--data.rows"]),
    "unknown word": (["extra"], ["Unrecognized options: extra"]),
    "option of another data set": (["--data.raw-dir", "/tmp"], ["--data.raw-dir"]),
    "not a number": (["--data.rows", "many"], ["--data.rows", "'many'"]),
    "too few rows": (["--data.rows", "50"], ["50", "between 100 and 5e+07", "--data.rows"]),
    "unknown method": (["--methods", "base", "lopfm"], ["'lopfm'", "did you mean 'loopfm'"]),
    "unknown control": (["--control", "nothing"], ["'nothing'", "swapped-histories"]),
    "unknown backbone": (["--fm.backbone.name", "dcn"], ["'dcn'", "dmin"]),
    "negative seed": (["--seed", "-1"], ["config.seed is -1", "between 0 and"]),
    "huge seed": (["--seed", "4294967296"], ["config.seed is 4294967296", "between 0 and 2e+09"]),
    "no width": (["--vm.backbone.tables.width", "0"], ["tables.width is 0", "at least 1"]),
    "wrong dropout": (["--fm.backbone.dropout", "1.5"], ["dropout is 1.5", "between 0 and 0.99"]),
    "wrong hidden": (["--vm.backbone.hidden", "0"], ["hidden[0] is 0", "at least 1"]),
    "negative clip": (["--fm.train.optim.clip-norm", "-1"], ["optim.clip_norm is -1"]),
    "no checkpoints": (["--fm.train.checkpoint-steps", "0"], ["train.checkpoint_steps is 0"]),
    "no mesh": (["--mesh.data", "0"], ["mesh.data is 0", "at least 1"]),
    "no seeds": (["--seeds", "0"], ["config.seeds is 0", "at least 1"]),
    "batch of 0": (["--fm.train.order.batch", "0"], ["order.batch is 0", "at least 1"]),
    "no epochs": (["--vm.train.order.epochs", "-1"], ["order.epochs is -1"]),
    "bad window": (["--data.windows.fm-end", "half"], ["'half'", "50%", "data.windows"]),
    "no zone": (["--data.windows.fm-end", "2024-01-03"], ["write 2024-01-03T00:00+00:00"]),
    "falling windows": (
        ["--data.windows.vm-end", "40%"],
        ["must rise", "50%, its last quarter, 40%, 100%"],
    ),
    "empty FM window": (["--data.windows.fm-end", "0%"], ["fm window is empty", "2024-01-01T"]),
    "window past the log": (
        ["--data.windows.vm-end", "100%", "--data.windows.test-end", "2030-01-01T00:00Z"],
        ["test window is empty", "the log runs from 2024-01-01T", "move data.windows"],
    ),
    "infinite window": (["--data.windows.fm-end", "inf%"], ["'inf%'"]),
    "unknown holdout": (["--holdout", "tests"], ["'tests'", "validation"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(loopfm, case):
    options, words = OPTIONS[case]
    has(loopfm.refuse("prepare", *options), *words)


def test_commands(loopfm):
    config = str(loopfm.config)
    has(loopfm.fail(["prepar", config]), "'prepar'", "train-fm", "did you mean 'prepare'?")
    has(loopfm.fail(["dance", config]), "'dance'", "evaluate")
    has(loopfm.fail(["prepare"]), "which configuration?")
    has(loopfm.fail(["prepare", "--seeds", "2"]), "which configuration?", "configs/synthetic.py")
    for command in ("scale", "compile"):
        has(loopfm.fail([command]), "which configuration?", "configs/scale.py")


def test_what_cannot_be_anchored(loopfm):
    options = ("--export.refresh", "anchored", "--fm.compressor.kind", "pca")
    has(loopfm.refuse("export", *options), "pca has nothing to train", "use linear")


@pytest.mark.parametrize("order", ["shuffled", "mixed"])
def test_what_cannot_be_refreshed_from_blocks(loopfm, order):
    options = ("--export.refresh", "fresh", "--log-residency", "blocks")
    message = loopfm.refuse("run", *options, "--fm.train.order.order", order)
    has(message, "--export.refresh fresh needs the log in memory", "--log-residency memory")
    assert "mixed" not in message


def test_no_arguments_show_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and not captured.out
    assert all(name in captured.err for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert not stopped.value.code and capsys.readouterr().out == captured.err


CONFIGS = {
    "no get_config": ("x = 1", ["defines no get_config()"]),
    "another type": ("def get_config():\n    return {}", ["returned dict, not a Config"]),
    "syntax": ("def get_config(:\n    pass", ["config.py, line 1"]),
    "import": ("x = 1\nimport loopfm_jux", ["config.py, line 2", "loopfm_jux"]),
    "unknown field": (
        "from loopfm_jax.config import Config\ndef get_config():\n    return Config(sed=1)",
        ["config.py, line 3", "'sed'"],
    ),
    "a value out of its limits": (
        "from loopfm_jax.data.synthetic import Synthetic\nSynthetic(gap=2)",
        ["gap is 2", "between 0 and 1"],
    ),
}


WITHOUT_A_COMMA = {
    "data.categorical": 'TabularLog(files=("a.csv",), categorical=("item_id"))',
    "data.files": 'TabularLog(files="item_id")',
    "data.entity": 'TabularLog(files=("a.csv",), entity="item_id")',
    "history.keys": "HistoryConfig(keys=('item_id'))",
    "fm.taps": "FMConfig(taps=('item_id'))",
    "methods": "'item_id'",
}


@pytest.mark.parametrize("name", WITHOUT_A_COMMA)
def test_a_tuple_without_its_comma(loopfm, name):
    part, value = name.split(".")[0], WITHOUT_A_COMMA[name]
    text = loopfm.config.read_text().split("def get_config")[0]
    loopfm.config.write_text(
        f"{text}\ndef get_config() -> Config:\n    return Config({part}={value})\n"
    )
    message = loopfm.refuse("prepare", leaves=())
    assert message == f"loopfm: {name} is the string 'item_id': write ('item_id',)"


def test_a_number_without_its_comma():
    with pytest.raises(UserError, match=r"backbone.hidden is the number 64: write \(64,\)"):
        BackboneConfig(hidden=(64))  # type: ignore
    with pytest.raises(UserError, match="scale.sizes is the number 1000"):
        ScaleConfig(sizes=(1000))  # type: ignore


def test_a_batch_that_the_mesh_does_not_divide_is_found_first(loopfm):
    message = loopfm.refuse("run", "--vm.train.order.batch", "1001", "--mesh.data", "2")
    has(message, "1001 does not divide over mesh.data = 2")


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_files(loopfm, case):
    text, words = CONFIGS[case]
    loopfm.config.write_text(text)
    has(loopfm.refuse("prepare", leaves=()), *words)


def test_a_missing_configuration_file(loopfm):
    loopfm.config.unlink()
    has(loopfm.refuse("prepare", leaves=()), str(loopfm.config), "see configs/")


def test_a_workdir_of_another_configuration(loopfm):
    loopfm.succeed("prepare")
    before = loopfm.files()
    message = loopfm.refuse("prepare", "--data.rows", "1500", leaves=before)
    has(message, "data.rows was 2000, now 1500", "--workdir", "--force")
    assert loopfm.files() == before
    loopfm.succeed("prepare")
    assert loopfm.succeed("prepare", "--data.rows", "1500", "--force")["rows"]["fm"] < 900


def test_stages_out_of_order(loopfm):
    for command in ("train-fm", "evaluate"):
        has(loopfm.refuse(command), "data is missing or incomplete", "`loopfm prepare`")
    has(loopfm.refuse("report"), "report.json is missing", "`loopfm evaluate`")
    (loopfm.workdir / "report.json").write_text("{")
    has(loopfm.fail(loopfm.argv("report")), "report.json is damaged", "`loopfm evaluate`")


def test_a_damaged_stage(loopfm):
    loopfm.succeed("prepare")
    file = next(loopfm.workdir.rglob("*fm.array_record*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for command in ("prepare", "train-fm"):
        has(loopfm.fail(loopfm.argv(command)), str(file), "sha256", "--force")
    loopfm.succeed("prepare", "--force")


def test_a_workdir_that_is_a_file(loopfm):
    loopfm.workdir.write_text("")
    has(loopfm.fail(loopfm.argv("prepare")), str(loopfm.workdir), "in the way")
    loopfm.workdir = loopfm.workdir / "below"
    has(loopfm.fail(loopfm.argv("prepare")), str(loopfm.workdir), "in the way")


def test_a_workdir_that_cannot_be_made(loopfm, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/loopfm")

    monkeypatch.setattr(Path, "mkdir", refuse)
    for workdir in ("/proc/loopfm", "/proc/loopfm/below"):
        loopfm.workdir = Path(workdir)
        has(loopfm.fail(loopfm.argv("prepare")), ": /proc/loopfm: ", "Or choose another --workdir")


def test_a_workdir_with_somebody_elses_data(loopfm):
    (loopfm.workdir / "data").mkdir(parents=True)
    (loopfm.workdir / "data" / "log.csv").write_text("mine")
    leaves = ("data/log.csv",)
    has(loopfm.refuse("run", "--force", leaves=leaves), "data is in the way", "--workdir")
    assert (loopfm.workdir / "data" / "log.csv").read_text() == "mine"


def test_a_mesh_larger_than_the_devices(loopfm):
    message = loopfm.refuse("run", "--mesh.data", "4", "--mesh.model", "4")
    has(message, "data=4 x model=4 needs 16 devices", "8 (cpu)", "--mesh.data")


def prepared_files(loopfm: CommandLine) -> list[str]:
    loopfm.succeed("prepare")
    return loopfm.files()


def test_a_batch_that_the_mesh_does_not_divide(loopfm):
    message = loopfm.refuse("run", "--mesh.data", "3", leaves=prepared_files(loopfm))
    has(message, "batch of 64", "mesh.data = 3", "order.batch")


def test_an_unknown_tap(loopfm):
    message = loopfm.refuse("run", "--fm.taps", "hidden_7", leaves=prepared_files(loopfm))
    has(message, "'hidden_7'", "embedding, hidden_0, all, item")


LATER = {
    "tap of a feature": (["--methods", "entity"], ["reads the tap 'entity'", "--fm.taps"]),
    "tap of a history": (["--methods", "item-only"], ["reads the tap 'item'", "--fm.taps"]),
    "tap of loopfm": (
        ["--methods", "loopfm", "--history.tap", "hidden_1"],
        ["reads the tap 'hidden_1'", "the export holds hidden_0"],
    ),
    "tap of a control": (["--control", "--history.tap", "all"], ["reads the tap 'all'"]),
    "tap of auto": (["--transfer", "auto", "--history.tap", "all"], ["reads the tap 'all'"]),
    "prefix": (["--export.prefix", "9"], ["export.prefix is 9", "fm.compressor.width = 4"]),
    "order of a VM": (
        ["--vm.train.order.order", "shuffled", "--log-residency", "blocks"],
        ["--vm.train.order.order mixed", "--log-residency memory"],
    ),
}


@pytest.mark.parametrize("case", LATER)
def test_what_a_later_stage_lacks_is_found_before_the_first(loopfm, case):
    options, words = LATER[case]
    has(loopfm.refuse("run", *options), *words)


LATER_COLUMNS = {
    "key": (["--history.keys", "usr"], ["history.keys names 'usr'", "item_id"]),
    "raw field": (["--methods", "raw", "--history.raw", "itm"], ["history.raw names 'itm'"]),
}


@pytest.mark.parametrize("case", LATER_COLUMNS)
def test_columns_that_a_later_stage_lacks_are_found_before_training(loopfm, case):
    options, words = LATER_COLUMNS[case]
    prepared = prepared_files(loopfm)
    for command in ("run", "train-fm", "export"):
        has(loopfm.refuse(command, *options, leaves=prepared), *words)


def test_a_key_without_columns_is_found_before_training(loopfm, monkeypatch):
    read = Synthetic.read
    monkeypatch.setattr(Synthetic, "read", lambda self: replace(read(self), entity=()))
    options = ["--methods", "entity", "--fm.taps", "hidden_0", "entity"]
    has(loopfm.refuse("run", *options, leaves=prepared_files(loopfm)), "data.entity")


WRITES = {
    "system": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some.array_record"),
    "no name": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "wrapped": RuntimeError("write() failed: No space left on device; at byte 24576"),
    "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "read-only": OSError(errno.EROFS, os.strerror(errno.EROFS)),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_full_disk(loopfm, monkeypatch, case):
    def full(*args, **kwargs):
        raise WRITES[case]

    monkeypatch.setattr(builder, "write", full)
    has(loopfm.refuse("prepare"), str(loopfm.workdir), "bytes free", "--workdir")
    monkeypatch.undo()
    loopfm.succeed("prepare")


def test_a_file_that_may_not_be_read(loopfm, monkeypatch):
    def locked(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/locked/log.csv")

    monkeypatch.setattr(builder, "write", locked)
    told = loopfm.refuse("prepare")
    has(told, "Permission denied: /locked/log.csv", "permissions")
    assert "--workdir" not in told


def test_a_bug_keeps_its_traceback(loopfm, monkeypatch):
    def wrong(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(builder, "write", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(loopfm.argv("prepare"))
    assert loopfm.files() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(loopfm, small_disk):
    loopfm.workdir = small_disk / "run"
    has(loopfm.refuse("prepare"), "No space left on device", str(loopfm.workdir))


def test_interrupted(loopfm, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "write", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(loopfm.argv("prepare"))
    assert stopped.value.code == 130 and "same command again" in capsys.readouterr().err
    assert loopfm.files() == []


def test_the_result_is_json_without_nan(loopfm):
    assert report.finite({"a": [1.0, float("nan")], "b": (float("inf"),)}) == {
        "a": [1.0, None],
        "b": [None],
    }
    facts = loopfm.succeed("prepare")
    assert sum(facts["rows"].values()) == 2000
    assert loopfm.succeed("prepare") == facts


def test_a_real_process(loopfm):
    loopfm.configure(SYNTHETIC.replace("rows=2000", "rows=7"))
    command = [sys.executable, "-m", "loopfm_jax", *loopfm.argv("prepare")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("loopfm: synthetic data: rows is 7")
    assert done.stderr.count("\n") == 1 and not loopfm.workdir.exists()
