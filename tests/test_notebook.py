"""The Colab notebook runs from top to end without a network: device, table, picture."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PATH = ROOT / "scripts" / "loopfm_colab.ipynb"
SETTINGS = {
    "SOURCE": str(ROOT),
    "INSTALL": "0",
    "LOG": "synthetic",
    "SEEDS": "1",
    "SIZES": "3e4",
    "RUN_OPTIONS": "--data.rows 2000 --methods base loopfm --fm.train.order.epochs 1"
    " --vm.encoder.name mean",
    "SCALE_OPTIONS": "--scale.sweeps fm --scale.table-rows 1000 --scale.examples 64"
    " --scale.seconds 0 --fm.train.order.batch 64",
}


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def test_it_is_stored_clean_and_tells_every_setting(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for name in SETTINGS:
        assert f"`{name}`" in text and f"`LOOPFM_{name}`" in text


def test_it_runs_from_top_to_end(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(f"LOOPFM_{name}", value)
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))  # no kernel and no profile of the user
    place = {"metadata": {"path": str(tmp_path)}}
    done = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    cells = {cell.id: cell.get("outputs") for cell in done.cells}

    assert not cells["install"], "nothing was fetched"
    assert "GiB for JAX" in printed(cells["device"]) and "float32" in printed(cells["device"])
    assert "vm/loopfm/seed_0: done" in printed(cells["run"])
    [report] = cells["report"]
    assert "| loopfm | 0." in report.data["text/markdown"]
    picture, table = cells["plot"]
    assert picture.data["image/svg+xml"].startswith("<svg")
    assert "FM by dense parameters" in table.data["text/markdown"]


def printed(outputs: list[nbformat.NotebookNode]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")
