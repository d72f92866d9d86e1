"""Raw logs that a model would silently choke on are refused by `loopfm prepare`."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import CommandLine
from kuairand_files import LATE_LOG, Row, log_rows, user_rows, write_release

ROWS = 120


@pytest.fixture
def loopfm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    line = CommandLine(tmp_path, capsys)
    line.configure("KuaiRandPure(min_count=1)")
    return line


def has(message: str, *words: str) -> None:
    assert all(word in message for word in words), message


def every(name: str, value: object) -> Callable[[], list[Row]]:
    return lambda: [row | {name: value} for row in log_rows(ROWS)]


def one(name: str, value: object, at: int = 60) -> Callable[[], list[Row]]:
    return lambda: [row | {name: value} if i == at else row for i, row in enumerate(log_rows(ROWS))]


def one_class_at_the_end() -> list[Row]:
    return [row | {"is_click": 0} if i >= 100 else row for i, row in enumerate(log_rows(ROWS))]


LOGS = {
    "wrong type": (one("user_id", "anna"), ["anna", "user_id", LATE_LOG]),
    "wrong time": (one("time_ms", "noon"), ["noon", "time_ms"]),
    "empty key": (one("user_id", ""), ["user_id is empty in 1 rows"]),
    "key out of range": (one("user_id", 99_999), ["99999", "0..27284"]),
    "negative id": (one("video_id", -3), ["-3", "0..7582"]),
    "empty label": (one("is_click", ""), ["label column is empty in 1 rows", "row 61 of"]),
    "label of 2": (one("is_click", 2), ["the label holds 2", "not 0 or 1"]),
    "one class": (every("is_click", 1), ["all", "labels of the fm window are 1", "both classes"]),
    "one-class test": (one_class_at_the_end, ["labels of the test window are 0", "data.windows"]),
    "empty time": (one("time_ms", ""), ["time column is empty in 1 rows"]),
    "negative time": (one("time_ms", -5), ["-5", "between 1990 and 2100"]),
    "seconds": (one("time_ms", 1_650_880_000), ["1,650,880,000", "between 1990 and 2100", "unit"]),
    "absurd time": (one("time_ms", 10**17), ["100,000,000,000,000,000", "2100"]),
    "no moment at all": (
        every("time_ms", 1_650_880_000_000),
        ["must rise", "the log runs from 2022-04-25T"],
    ),
    "NaN": (one("duration_ms", "NaN"), ["'duration'", "1 values", "row 61 of"]),
    "infinite": (one("duration_ms", "inf"), ["'duration'", "infinite"]),
    "no rows": (list, ["the log has 0 rows"]),
}


@pytest.mark.parametrize("case", LOGS)
def test_rows(loopfm, tmp_path, case):
    make, words = LOGS[case]
    folder = write_release(tmp_path / "raw", log=make())
    has(loopfm.refuse("prepare", "--data.raw-dir", str(folder)), *words)


def edit(folder: Path, change: Callable[[str], str], name: str = LATE_LOG) -> None:
    (folder / name).write_text(change((folder / name).read_text()))


FILES = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), ["is not a folder", "--data.raw-dir"]),
    "no log": (lambda f: (f / LATE_LOG).unlink(), [LATE_LOG, "--data.raw-dir"]),
    "no side table": (
        lambda f: (f / "user_features_pure.csv").unlink(),
        ["neither user_features_pure.csv nor user_features_pure.csv.gz"],
    ),
    "renamed column": (
        lambda f: edit(f, lambda text: text.replace("time_ms", "time_msec", 1)),
        [LATE_LOG, "no column 'time_ms'", "did you mean 'time_msec'?"],
    ),
    "lost column": (
        lambda f: edit(f, lambda text: text.replace("tab\n", "x\n", 1)),
        ["no column 'tab'", "it has user_id"],
    ),
    "no header": (
        lambda f: edit(f, lambda text: text.split("\n", 1)[1]),
        ["no column 'user_id'"],
    ),
    "empty file": (lambda f: edit(f, lambda text: ""), [LATE_LOG, "cannot be read"]),
    "too many values": (
        lambda f: edit(f, lambda text: text + ",".join("1" * 30) + "\n"),
        [LATE_LOG, "cannot be read"],
    ),
    "binary": (lambda f: (f / LATE_LOG).write_bytes(bytes(range(256))), [LATE_LOG]),
}


@pytest.mark.parametrize("case", FILES)
def test_files(loopfm, tmp_path, case):
    harm, words = FILES[case]
    folder = write_release(tmp_path / "raw")
    harm(folder)
    has(loopfm.refuse("prepare", "--data.raw-dir", str(folder)), *words)


@pytest.mark.parametrize("part", [0.5, 0.95, 1.0])
def test_a_truncated_gzip_file(loopfm, tmp_path, part):
    folder = write_release(tmp_path / "raw", log=log_rows(2000), suffix=".gz")
    path = folder / f"{LATE_LOG}.gz"
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * part), len(data) - 4)])
    message = loopfm.refuse("prepare", "--data.raw-dir", str(folder))
    has(message, str(path), "cannot be read", "end of file")
    path.write_bytes(gzip.compress(gzip.decompress(data)))
    loopfm.succeed("prepare", "--data.raw-dir", str(folder))


def test_a_flipped_bit_in_a_gzip_file(loopfm, tmp_path):
    folder = write_release(tmp_path / "raw", log=log_rows(2000), suffix=".gz")
    path = folder / f"{LATE_LOG}.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    has(loopfm.refuse("prepare", "--data.raw-dir", str(folder)), str(path))


def test_side_tables_of_another_release(loopfm, tmp_path):
    folder = write_release(tmp_path / "raw", users=user_rows()[:-1])
    message = loopfm.refuse("prepare", "--data.raw-dir", str(folder))
    has(message, "user_id 5", "not in the side table", "20 rows")


def test_no_network(loopfm, tmp_path):
    options = ("--data.url", "http://127.0.0.1:9/x.tar.gz", "--data.cache-dir", str(tmp_path / "c"))
    has(loopfm.refuse("prepare", *options), "http://127.0.0.1:9/x.tar.gz", "--data.raw-dir")
    assert not list((tmp_path / "c").glob("*"))


def test_a_changed_file_is_prepared_again(loopfm, tmp_path):
    folder = write_release(tmp_path / "raw", log=log_rows(ROWS))
    options = ("--data.raw-dir", str(folder))
    first = loopfm.succeed("prepare", *options)
    write_release(folder, log=log_rows(ROWS + 20))
    second = loopfm.succeed("prepare", *options)
    assert sum(second["rows"].values()) == sum(first["rows"].values()) + 20


def test_a_log_of_ones_own(loopfm, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,time,label,item\n" + "".join(f"u,{i},1,a\n" for i in range(9)))
    loopfm.configure("TabularLog()")
    has(loopfm.refuse("prepare"), "data.files is empty")
    has(loopfm.refuse("prepare", "--data.files", "none.csv"), "'none.csv'", "data.files")
    options = ["--data.files", str(path), "--data.categorical"]
    has(loopfm.refuse("prepare", *options, "itemm"), "'itemm'", "did you mean 'item'?", "log.csv")
    has(loopfm.refuse("prepare", *options, "label"), "leak")
    has(loopfm.refuse("prepare", *options, "item"), "from 0 to 8,000 ms", "unit")
    has(loopfm.refuse("prepare", *options, "item", "--data.time-unit", "iso"), "'0'", "iso")
