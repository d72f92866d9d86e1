"""`loopfm <command> <configuration.py> [options]`: one table of commands that reads as the flow."""

import difflib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loopfm_jax import __version__, ahead, processes, report, results, stages
from loopfm_jax.aot import make as compiling
from loopfm_jax.auto import resolve
from loopfm_jax.bench.make import bench
from loopfm_jax.compiler import keep_programs
from loopfm_jax.config import as_json
from loopfm_jax.errors import UserError, writing
from loopfm_jax.flow import Flow
from loopfm_jax.inputs import assembly_rate
from loopfm_jax.options import parse
from loopfm_jax.progress import say
from loopfm_jax.scale import make as scaling
from loopfm_jax.sharding import make_mesh
from loopfm_jax.study import make as studies
from loopfm_jax.study.analyse import analyse as analyse_codes


def prepare(flow: Flow) -> dict[str, Any]:
    """raw log -> prepared log"""
    facts = flow.prepare()["facts"]
    dropped = facts["rows"]["duplicates_dropped"]
    if dropped:
        say(f"prepare: dropped {dropped:,} exact duplicate rows")
    rate = processes.first(lambda: assembly_rate(flow.data))
    say(f"input: {rate / 1e6:.1f} M rows/s into host batches")
    return facts


def train_fm(flow: Flow) -> dict[str, Any]:
    """the teacher and its compressor, on the FM window"""
    ahead.check_log(flow.config, flow.data)
    return _without_curve(flow.train_fm())


def export(flow: Flow) -> dict[str, Any]:
    """codes and soft labels of everything after the FM window"""
    ahead.check_log(flow.config, flow.data)
    return flow.export()["facts"]


def structure(flow: Flow) -> dict[str, Any]:
    """exported rows -> time-ordered histories per key"""
    return flow.structure()["facts"]


def train_vm(flow: Flow) -> dict[str, Any]:
    """every requested method and seed, and the controls"""
    config, trained = flow.config, {}
    seeds = range(config.seed, config.seed + config.seeds)
    for method in results.rows(config):
        own, found = resolve(flow, method)
        if own.taught_by != flow.taught_by:
            say(f"{method}: another FM")
            own.teach()
        if found != method:
            say(f"{method}: {found}, distilled {own.config.vm.distil.gamma:g}")
        trained[method] = [_without_curve(own.train_vm(found, seed)) for seed in seeds]
    for control in config.control:
        other, histories = results.controlled(flow, control)
        if other is not flow:
            say(f"control {control}: another FM")
            other.teach()
        for seed in seeds:
            other.train_vm(results.CONTROL_METHOD, seed, histories)
    return trained


def evaluate(flow: Flow) -> dict[str, Any]:
    """metrics of the trained methods on the test window, and the report"""

    def judge() -> dict[str, Any]:
        for folder in (flow.data, flow.teacher, flow.exported, flow.history):
            stages.verify(folder)
        found = results.collect(flow, command=_command())
        folder = flow.judged(flow.root)
        report.write(found, folder)
        print(report.table(found), file=sys.stderr)
        say(f"report: {(folder / 'report.html').resolve()}")
        return results.headline(found)

    return processes.first(judge)


def render(flow: Flow) -> dict[str, Any]:
    """report.md and report.html again, from report.json"""
    return processes.first(lambda: _render(flow))


def _render(flow: Flow) -> dict[str, Any]:
    path = flow.judged(flow.root) / "report.json"
    if not path.exists():
        raise UserError(f"{path} is missing: run `loopfm evaluate` first")
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: run `loopfm evaluate` again") from None
    report.write(found, path.parent)
    return {"report": str(path.with_suffix(".html"))}


def run(flow: Flow) -> dict[str, Any]:
    """all of them"""
    make_mesh(flow.config.mesh)  # fails before the first stage rather than after it
    ahead.check(flow.config)
    for stage in (prepare, train_fm, export, structure, train_vm):
        stage(flow)
    return evaluate(flow)


def study(flow: Flow) -> dict[str, Any]:
    """the paper's tables: --tables transfers,pooling,.. --seeds 5"""
    found = studies.make(flow.config, command=_command())
    say(f"study: {(flow.root / 'study.html').resolve()}")
    return studies.headline(found)


def analyse(flow: Flow) -> dict[str, Any]:
    """what is in the exported codes: spectrum, profiles, pictures"""
    found = analyse_codes(flow, command=_command())
    say(f"analysis: {(flow.root / 'analysis.html').resolve()}")
    return found


def scale(flow: Flow) -> dict[str, Any]:
    """throughput against model size: power law, MFU, memory, picture"""
    found = scaling.make(flow.config, command=_command())
    say(f"scale: {(flow.root / 'scale' / 'scale.svg').resolve()}")
    return scaling.headline(found)


def compile(flow: Flow) -> dict[str, Any]:
    """programs for devices that are not there: --topology v5e:16x16; fits or not, what is sent"""
    found = compiling.make(flow.config, command=_command())
    say(f"compile: {(flow.root / 'compile' / 'compile.md').resolve()}")
    return compiling.headline(found)


COMMANDS: dict[str, Callable[[Flow], dict[str, Any]]] = {
    "prepare": prepare,
    "train-fm": train_fm,
    "export": export,
    "structure": structure,
    "train-vm": train_vm,
    "evaluate": evaluate,
    "report": render,
    "run": run,
    "study": study,
    "analyse": analyse,
    "scale": scale,
    "compile": compile,
}
SINGLE = ("study", "analyse", "scale", "compile")
"""Commands of one process."""
ALONE: dict[str, Callable[[Sequence[str]], dict[str, Any]]] = {"bench": bench}
"""Commands without a configuration: options -> result."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 2 on a user's mistake, with one message and no traceback."""
    try:
        found = _dispatch(list(sys.argv[1:] if argv is None else argv))
        processes.end()
        if processes.leads():
            print(json.dumps(report.finite(found), allow_nan=False))
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", status=130)
    except Exception as error:
        if processes.many():
            traceback.print_exc()
            _fail(f"{type(error).__name__}: {error}", status=1)
        raise


def _dispatch(argv: list[str]) -> dict[str, Any]:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"loopfm {__version__}")
        sys.exit(0)
    command, *rest = argv
    known = [*COMMANDS, *ALONE]
    if command not in known:
        close = difflib.get_close_matches(command, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"no command {command!r}: commands are {', '.join(known)}{hint}")
    if command in ALONE:
        return ALONE[command](rest)
    if not rest or rest[0].startswith("-"):
        example = "scale" if command in ("scale", "compile") else "synthetic"
        raise UserError(f"which configuration? loopfm {command} configs/{example}.py [options]")
    config = parse(Path(rest[0]), rest[1:], command=command)
    _quiet()
    processes.start(config.processes)
    if processes.many() and command in SINGLE:
        raise UserError(f"{command} runs in one process: leave --processes out")
    with writing(config.workdir):
        config.workdir.mkdir(parents=True, exist_ok=True)
        result = COMMANDS[command](Flow(config))
        if processes.leads():
            text = json.dumps(as_json(config), indent=1)
            report.replace_file(config.workdir / "config.json", text)
        return result


def _command() -> str:
    return "loopfm " + " ".join(sys.argv[1:])


def _usage() -> str:
    lines = [f"  {name:10} {function.__doc__}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "loopfm <command> <configuration.py> [options]",
            "",
            *lines,
            "",
            *(f"loopfm {name} [options]: {function.__doc__}" for name, function in ALONE.items()),
            "",
            "options of a configuration: loopfm <command> <configuration.py> --help",
        ]
    )


def _fail(message: str, *, status: int = 2) -> None:
    print(f"loopfm: {message}", file=sys.stderr)
    processes.fail(message, status=status)
    sys.exit(status)


def _quiet() -> None:
    """Libraries keep to warnings; compiled programs are kept between runs."""
    absl = logging.getLogger("absl")
    absl.setLevel(logging.ERROR)
    absl.addFilter(_no_traceback)
    keep_programs(from_s=0.5)


def _no_traceback(record: logging.LogRecord) -> bool:
    """Orbax logs with a traceback what it then raises in the thread that waits for it."""
    return not record.exc_info


def _without_curve(manifest: stages.Report) -> dict[str, Any]:
    return {k: v for k, v in manifest["facts"].items() if k != "curve"} | manifest["measured"]
