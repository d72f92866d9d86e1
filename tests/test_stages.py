"""Stage folders: complete or absent, skipped when up to date, and damage never goes unnoticed."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from loopfm_jax import attempt, processes, stages
from loopfm_jax.errors import UserError
from loopfm_jax.identity import differences
from loopfm_jax.stages import Report, Stage, run, verify

ALL = ["data/b.txt", "data/deep/a.bin", "data/manifest.json"]


def first(root: Path, **changes) -> Stage:
    stage = Stage("prepare", root / "data", {"rows": 10, "deep": {"name": "a"}})
    return replace(stage, **changes)


def second(root: Path, **changes) -> Stage:
    inputs = {"data": root / "data"}
    return replace(Stage("export", root / "fm" / "export", {"code": "int4"}, inputs), **changes)


def third(root: Path) -> Stage:
    inputs = {"export": root / "fm" / "export"}
    return Stage("structure", root / "history", {"length": 5}, inputs)


class Work:
    """Writes two files and counts how often it had to."""

    def __init__(self, text: str = "hello", error: BaseException | None = None):
        self.text, self.error, self.calls = text, error, 0

    def __call__(self, folder: Path) -> Report:
        self.calls += 1
        if self.error and not isinstance(self.error, UserError):
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "7").write_text(self.text)
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / "a.bin").write_text(self.text * 100)
        (folder / "b.txt").write_text("b")
        if self.error:
            raise self.error
        return {"rows": 10, 3: (1, 2), "nothing": float("nan"), "measured": {"rate": 5.0}}


@pytest.fixture
def forget():
    """Stands for a new process: files are hashed again."""
    stages._checked.cache_clear()
    return stages._checked.cache_clear


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_makes_a_complete_folder(tmp_path):
    made, done = run(first(tmp_path), Work())
    assert done and files_in(tmp_path) == ALL
    assert made["files"]["deep/a.bin"]["bytes"] == 500
    assert made["measured"]["rate"] == 5.0 and "measured" not in made["facts"]
    assert set(made["versions"]) >= {"jax", "loopfm-jax"}
    assert json.dumps(verify(tmp_path / "data")) == json.dumps(made)


def test_what_is_up_to_date_is_skipped(tmp_path, forget):
    work = Work()
    made, _ = run(first(tmp_path), work)
    forget()
    again, done = run(first(tmp_path), work)
    assert not done and work.calls == 1 and json.dumps(again) == json.dumps(made)
    assert run(first(tmp_path), work, force=True)[1] and work.calls == 2


def test_the_same_work_is_the_same_content(tmp_path):
    one, two, other = (run(first(tmp_path / t), Work(t[0]))[0] for t in ("a1", "a2", "b1"))
    assert one["content"] == two["content"] != other["content"]


def test_another_configuration_is_refused_and_named(tmp_path):
    run(first(tmp_path), Work())
    changed = first(tmp_path, config={"rows": 11, "deep": {"name": "b"}})
    with pytest.raises(UserError) as error:
        run(changed, Work())
    for word in ("rows was 10, now 11", "deep.name was 'a', now 'b'", "--force", "--workdir"):
        assert word in str(error.value)
    assert verify(tmp_path / "data")["config"]["rows"] == 10
    made, done = run(changed, Work(), force=True)
    assert done and made["config"]["rows"] == 11


def test_differences_go_down_to_the_leaves():
    old, new = {"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 1, "c": [2]}, "d": 0, "e": 0}
    assert differences(old, new) == ["a.c was [1], now [2]", "e was None, now 0"]


def test_a_changed_raw_file_makes_it_again(tmp_path):
    work = Work()
    for digest, expected in (("1", 1), ("1", 1), ("2", 2)):
        run(first(tmp_path, sources={"log.csv": digest}), work)
        assert work.calls == expected


def test_a_changed_input_is_made_again_in_order_and_refused_out_of_order(tmp_path):
    run(first(tmp_path), Work()), run(second(tmp_path), Work()), run(third(tmp_path), Work())
    verify(tmp_path / "history")
    run(first(tmp_path), Work("new data"), force=True)
    with pytest.raises(
        UserError, match="fm/export was made from an earlier data .*`loopfm export`"
    ):
        verify(tmp_path / "fm" / "export")
    with pytest.raises(UserError, match="fm/export was made from an earlier data"):
        verify(tmp_path / "history")  # whose own input has not changed yet
    with pytest.raises(UserError, match="`loopfm export` again"):
        run(third(tmp_path), Work())
    work = Work("new export")
    assert run(second(tmp_path), work)[1] and run(third(tmp_path), work)[1]
    verify(tmp_path / "history")


def test_made_again_with_the_same_result_nothing_else_is(tmp_path):
    work = Work()
    run(first(tmp_path), work), run(second(tmp_path), work)
    run(first(tmp_path), work, force=True)
    assert not run(second(tmp_path), work)[1]


def test_a_missing_input_names_its_command(tmp_path):
    with pytest.raises(UserError, match="data is missing or incomplete: run `loopfm prepare`"):
        run(second(tmp_path), Work())
    with pytest.raises(UserError, match="`loopfm train-vm`"):
        verify(tmp_path / "vm" / "base" / "seed_0")
    assert files_in(tmp_path) == []


def test_a_folder_may_move_with_its_neighbours(tmp_path, forget):
    run(first(tmp_path / "old"), Work()), run(second(tmp_path / "old"), Work())
    (tmp_path / "old").rename(tmp_path / "new")
    forget()
    verify(tmp_path / "new" / "fm" / "export")
    assert not run(second(tmp_path / "new"), Work())[1]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


def edit(path: Path, change: Callable[[Report], object]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DAMAGE = {
    "bit flip": ("deep/a.bin", lambda p: flip(p, 77)),
    "truncated": ("deep/a.bin", lambda p: os.truncate(p, 499)),
    "missing": ("b.txt", lambda p: p.unlink()),
    "a folder": ("b.txt", lambda p: (p.unlink(), p.mkdir())),
    "manifest rows": ("manifest.json", lambda p: edit(p, lambda m: m["facts"].update(rows=11))),
    "manifest rate": ("manifest.json", lambda p: edit(p, lambda m: m["measured"].clear())),
    "manifest origin": ("manifest.json", lambda p: edit(p, lambda m: m.pop("input_paths"))),
    "manifest sha": ("manifest.json", lambda p: edit(p, lambda m: m["files"].pop("b.txt"))),
    "manifest cut": ("manifest.json", lambda p: os.truncate(p, 100)),
    "manifest binary": ("manifest.json", lambda p: p.write_bytes(b"\xff\xfe\x00")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_named(tmp_path, forget, case):
    run(first(tmp_path), Work()), run(second(tmp_path), Work())
    name, harm = DAMAGE[case]
    harm(tmp_path / "data" / name)
    forget()
    again, after = (partial(run, stage(tmp_path), Work()) for stage in (first, second))
    for use in (partial(verify, tmp_path / "data"), again, after):
        with pytest.raises(
            UserError, match=f"data/{name} .*damaged.*`loopfm prepare` with --force"
        ):
            use()
    run(first(tmp_path), Work(), force=True)
    forget()
    assert not run(second(tmp_path), Work())[1]  # as before the damage


def test_random_bit_flips_are_never_silent(tmp_path, forget):
    made, _ = run(first(tmp_path), Work())
    rng = random.Random(0)
    for _ in range(60):
        path = tmp_path / "data" / rng.choice([*made["files"], "manifest.json"])
        whole = path.read_bytes()
        flip(path, rng.randrange(len(whole)))
        forget()
        try:
            assert json.dumps(verify(tmp_path / "data")) == json.dumps(made)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert path.name == "manifest.json"
        path.write_bytes(whole)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "log.csv").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="data is in the way.*--workdir"):
            run(first(tmp_path), Work(), force=force)
    assert files_in(tmp_path) == ["data/log.csv"]
    (tmp_path / "data" / "log.csv").unlink()
    assert run(first(tmp_path), Work())[1]  # an empty folder is no loss


ERRORS = [UserError("no"), OSError(28, "No space left"), KeyboardInterrupt(), ValueError("bug")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_failed_stage_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        run(first(tmp_path), Work(error=error))
    assert files_in(tmp_path) == []
    run(first(tmp_path), Work("good"))
    with pytest.raises(type(error)):
        run(first(tmp_path), Work(error=error), force=True)
    assert (tmp_path / "data" / "deep" / "a.bin").read_text() == "good" * 100
    verify(tmp_path / "data")


def test_no_space_for_the_manifest(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages, "_sealed", full)
    for resumable in (False, True):
        with pytest.raises(OSError):
            run(first(tmp_path, resumable=resumable), Work())
        assert files_in(tmp_path) == []


def test_a_resumable_attempt_is_kept_for_the_same_work(tmp_path):
    stage = first(tmp_path, resumable=True)
    with pytest.raises(KeyboardInterrupt):
        run(stage, Work("half", error=KeyboardInterrupt()))
    assert not stage.directory.exists()
    (stage.partial / "half-written.tmp").write_text("by a process that was killed")

    def go_on(folder: Path) -> Report:
        assert files_in(folder) == [attempt.MARK, "checkpoints/7"]
        assert (folder / "checkpoints" / "7").read_text() == "half"
        (folder / "checkpoints" / "7").unlink()
        return {}

    made, _ = run(stage, go_on)
    assert made["files"] == {}
    assert not stage.partial.exists() and not (stage.directory / attempt.MARK).exists()


def test_a_resumable_attempt_at_something_else_is_not_gone_on_with(tmp_path):
    stage = first(tmp_path, resumable=True)
    with pytest.raises(KeyboardInterrupt):
        run(stage, Work(error=KeyboardInterrupt()))

    def fresh(folder: Path) -> Report:
        assert files_in(folder) == [attempt.MARK]
        return {}

    run(replace(stage, config={"rows": 12}), fresh)


def test_a_resumable_attempt_that_did_not_begin_leaves_nothing(tmp_path):
    def refuse(folder: Path) -> Report:
        raise UserError("no such tap")

    with pytest.raises(UserError):
        run(first(tmp_path, resumable=True), refuse)
    assert files_in(tmp_path) == []


def test_a_process_killed_between_the_renames(tmp_path, forget):
    stage = first(tmp_path)
    run(stage, Work("old"))
    stage.directory.rename(stage.old)
    stage.partial.mkdir()
    (stage.partial / "left.bin").write_text("over")
    forget()
    with pytest.raises(UserError, match="missing or incomplete"):
        verify(stage.directory)
    assert run(stage, Work("new"))[1]
    assert files_in(tmp_path) == ALL


def test_what_another_revision_made_is_made_again(tmp_path, monkeypatch, forget):
    work = Work()
    run(first(tmp_path), work)
    monkeypatch.setitem(stages.REVISION, "prepare", 999)
    assert run(first(tmp_path), work)[1] and work.calls == 2
    assert not run(first(tmp_path), work)[1]


def test_what_another_process_made_meanwhile_is_not_made_again(tmp_path, monkeypatch):
    """Between the look and the lock."""
    hold, work = attempt.hold, Work()

    def late(stage, held):
        monkeypatch.setattr(attempt, "hold", hold)
        run(first(tmp_path), Work())
        hold(stage, held)

    monkeypatch.setattr(attempt, "hold", late)
    assert not run(first(tmp_path), work)[1] and work.calls == 0


def test_two_processes_do_not_make_the_same(tmp_path):
    """Nor does the second clear what the first has written; a process that died holds nothing."""
    stage, inside = first(tmp_path), Work("mine")
    code = (
        "import sys; from pathlib import Path; from loopfm_jax.stages import Stage, run\n"
        "def work(folder):\n"
        "    print('begun', flush=True); sys.stdin.read(1); return {}\n"
        "run(Stage('prepare', Path(sys.argv[1]), {}), work)"
    )
    argv = [sys.executable, "-c", code, str(stage.directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, **pipes) as other:
        assert other.stdout.readline() == "begun\n"
        before = files_in(tmp_path)
        with pytest.raises(UserError, match="another process is making"):
            run(stage, inside)
        assert inside.calls == 0 and files_in(tmp_path) == before
        other.kill()
    run(stage, inside)
    assert inside.calls == 1 and files_in(tmp_path) == ALL


def test_a_process_that_does_not_see_what_another_has_made(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "leads", lambda: False)
    monkeypatch.setattr(stages, "SHARED_S", 0)
    with pytest.raises(UserError, match="file system that all processes share"):
        stages._see(tmp_path / "data", {"seal": "of another place"})
