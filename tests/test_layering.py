"""The layering that DESIGN fixes: who may import whom, from the sources themselves."""

import ast
from pathlib import Path

import loopfm_jax

ROOT = Path(loopfm_jax.__file__).parent
STAGES = {"data", "backbones", "fm", "history", "vm"}
MAY_IMPORT = {
    "data": set(),
    "backbones": {"data"},  # the schema
    "history": {"data", "backbones"},  # the attention of candidates over events
    "fm": {"data", "backbones", "history"},
    "vm": {"data", "backbones", "history"},
}
TOGETHER = {"config", "flow", "results", "ahead", "cli"}  # where FM and VM are in one room


def imports(path: Path) -> set[str]:
    """Names below loopfm_jax that a file imports, as dotted paths."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            base = node.module
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {name.removeprefix("loopfm_jax.") for name in found if name.startswith("loopfm_jax.")}
    return inside


def package(name: str) -> str:
    return name.split(".")[0]


def test_stages_import_only_what_they_may() -> None:
    for stage, allowed in MAY_IMPORT.items():
        for path in (ROOT / stage).rglob("*.py"):
            used = {package(n) for n in imports(path)} & STAGES - {stage}
            assert used <= allowed, f"{path} imports {used - allowed}"


def test_backbones_take_only_the_schema_from_data() -> None:
    for path in (ROOT / "backbones").rglob("*.py"):
        used = {n for n in imports(path) if package(n) == "data"}
        assert all(n.startswith("data.schema") for n in used), path


def test_only_the_flow_brings_fm_and_vm_together() -> None:
    for path in ROOT.glob("*.py"):
        used = {package(n) for n in imports(path)}
        if {"fm", "vm"} <= used:
            assert path.stem in TOGETHER, path


def test_there_is_no_circle() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    edges = {m: {n for n in imports(p) if n in modules and n != m} for m, p in modules.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in edges[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def test_no_drawers_and_no_forbidden_calls() -> None:
    for path in ROOT.rglob("*.py"):
        assert path.stem not in ("utils", "common", "helpers", "misc"), path
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert not names & {"pickle", "eval", "exec"}, path
