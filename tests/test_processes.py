"""Two real processes over gloo: the whole loop as one process runs it, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CommandLine

from loopfm_jax import processes
from loopfm_jax.errors import UserError
from loopfm_jax.processes import ProcessesConfig

OPTIONS = (
    "--mesh.data 2 --methods loopfm --export.code int8 --log-residency blocks "
    "--history.residency host --fm.train.order.order mixed "
    "--fm.train.order.batch 512 --vm.train.order.batch 512"
).split()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


class Pair:
    """Two processes of one run, with a device each."""

    def __init__(self, command: str, config: Path, *options: str):
        meet = ["--processes.coordinator", f"localhost:{free_port()}", "--processes.count", "2"]
        run = [sys.executable, "-m", "loopfm_jax", command, str(config), *options, *meet]
        flags = " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f)
        self._both = [
            subprocess.Popen(
                [*run, "--processes.index", str(index)],
                env=os.environ | {"XLA_FLAGS": flags},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in (0, 1)
        ]

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._both:
            process.kill()

    def ended(self, *, within_s: float) -> list[tuple[int, str, str]]:
        """(exit status, stdout, stderr) of each."""
        said = [process.communicate(timeout=within_s) for process in self._both]
        return [(p.returncode, *texts) for p, texts in zip(self._both, said, strict=True)]


def files(folder: Path) -> dict[str, str]:
    said = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: one["sha256"] for name, one in said.items() if name.endswith(".npy")}


def test_two_processes_run_the_loop_as_one_does(loopfm: CommandLine, tmp_path: Path) -> None:
    two, one = tmp_path / "two", loopfm.workdir
    with Pair("run", loopfm.config, *OPTIONS, "--workdir", str(two)) as pair:
        alone = loopfm.succeed("run", *OPTIONS)
        (status, out, err), (status_too, out_too, err_too) = pair.ended(within_s=300)
    assert status == status_too == 0, (err, err_too)
    found = json.loads(out.splitlines()[-1])
    assert "{" not in out_too and "done in" in err and "done in" not in err_too
    for row in ("base", "loopfm"):
        assert found["methods"][row]["auc"] == pytest.approx(alone["methods"][row]["auc"], abs=1e-4)
    for stage in ("data", "fm/export", "history"):
        assert files(two / stage) == files(one / stage), stage
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
WRONG = "exec('raise UserError(\"no such log\")')"


@pytest.mark.parametrize(
    ("happens", "statuses", "told"),
    [
        (KILLED, (-signal.SIGKILL, -signal.SIGABRT), "another task died"),
        (WRONG, (2, 2), "another process failed: process 0: no such log"),
    ],
    ids=["killed", "mistaken"],
)
def test_when_one_process_ends_the_others_do(
    loopfm: CommandLine, happens: str, statuses: tuple[int, int], told: str
) -> None:
    """While the other waits for it to prepare the log."""
    with loopfm.config.open("a") as config:
        config.write("\nimport os, signal\nfrom loopfm_jax.errors import UserError\n")
        config.write(f"Synthetic.read = lambda self: {happens}\n")
    options = ["--workdir", str(loopfm.workdir), "--processes.deadline-s", "5"]
    with Pair("prepare", loopfm.config, *options) as pair:
        (status, _, _), (status_too, _, err) = pair.ended(within_s=100)
    assert (status, status_too) == statuses
    assert told in err
    assert not (loopfm.workdir / "data").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"count": 2}, "nobody knows where they meet"),
        ({"coordinator": "here:1", "count": 2, "index": 2}, "index is 2; it must be between 0"),
        ({"coordinator": "here:1", "index": 1}, "here:1.*give --processes.count, and"),
        ({"count": 0}, "count is 0"),
        ({"deadline_s": 0}, "deadline_s is 0"),
    ],
)
def test_settings_that_make_no_sense(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProcessesConfig(**config)


def test_one_process_waits_for_nobody() -> None:
    ProcessesConfig(coordinator="auto")  # the cluster knows how many there are
    ProcessesConfig(coordinator="job-0.service:1234", count=1)
    processes.start(ProcessesConfig())
    processes.wait()
    assert processes.first(lambda: (1, processes.many(), processes.alone())) == (1, False, False)
    assert processes.leads()
