"""The report: three renderings of one dict, safe to open, and honest about what is missing."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from loopfm_jax import plots, report, svg
from loopfm_jax.report_parts import verdict

HOSTILE = "<script>alert('$x$ | `y`')</script>"
METRICS = {"auc": 0.5, "gauc": 0.5, "logloss": 0.25, "ne": 0.75, "calibration": 1.0}
RATES = {"params": 1234, "train_examples_per_s": 10.0}


def row(delta: float | None = None, error: float | None = 0.0625, won: int = 2) -> dict[str, Any]:
    found = METRICS | RATES
    if delta is not None:
        found |= {"auc": 0.5 + delta, "delta_auc": delta}
        if error is not None:
            found |= {"delta_auc_se": error, "seeds_won": won, "auc_std": 0.125}
    return found


def full() -> dict[str, Any]:
    methods = {"base": row(), "kd": row(0.125), "loopfm": row(0.25, error=0.015625)}
    curve = [{"step": 1, "logloss": 0.5, "compressor": 0.25}, {"step": 2, "logloss": 0.25}]
    return {
        "workdir": "/w",
        "dataset": "tiny",
        "date": "2026-01-01",
        "command": "loopfm run tiny.py",
        "rows": {"fm": 3, "vm": 2, "test": 4, "duplicates_dropped": 1},
        "windows": "fm until a, vm until b, test until c",
        "holdout": "test",
        "seeds": 3,
        "fm": METRICS | RATES,
        "methods": methods,
        "transfer_ratio": {
            "kd": {"value": 0.5},
            "loopfm": {"value": None, "reason": "too noisy"},
        },
        "controls": {"swapped-histories": {"loopfm": row(-0.0625)}},
        "history": {"mean_length": 1.5, "empty_share": 0.25, "store_bytes": 8},
        "bayes": {"bayes_vm": 0.75},
        "seconds": {"prepare": 1.0, "train-fm": 2.0},
        "learning_curves": {"fm": curve, "base": curve[1:], "kd": curve[1:]},
        "by_history_length": {
            "bins": ["0", "1-2"],
            "rows": [1, 3],
            "auc": {"base": [0.5, None], "loopfm": [0.5, 0.75]},
        },
        "calibration_curve": {"base": {"predicted": [0.25, 0.5], "observed": [0.0, 0.5]}},
        "history_lengths": {"length": [0, 1], "rows": [1, 3]},
        "versions": {"jax": "0"},
        "mesh": {"data": 1, "model": 1},
        "device": "cpu",
    }


def one_seed() -> dict[str, Any]:
    methods = {"base": row(), "loopfm": row(0.25, error=None)}
    return {"dataset": "tiny", "seeds": 1, "methods": methods}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report") / "new"
    report.write(full(), directory)
    return directory


@pytest.fixture(scope="module")
def drawn() -> list[plots.Plot]:
    return plots.figures(full())


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]


def test_three_files_and_nothing_else(written: Path):
    names = sorted(path.name for path in written.iterdir())
    assert names == ["report.html", "report.json", "report.md"]
    assert json.loads((written / "report.json").read_text()) == full()


def test_not_finite_is_null(tmp_path: Path):
    numbers = one_seed()
    numbers["fm"] = {"auc": math.nan, "ne": np.float32(0.5), "params": np.int64(3)}
    numbers["history"] = {"mean_length": math.inf}
    report.write(numbers, tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["fm"] == {"auc": None, "ne": 0.5, "params": 3}
    assert read["history"] == {"mean_length": None}
    text = (tmp_path / "report.md").read_text() + report.table(numbers)
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_a_failure_leaves_the_old_report(written: Path):
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    with pytest.raises(TypeError):
        report.write(full() | {"dataset": object()}, written)
    assert before == {path.name: path.read_bytes() for path in written.iterdir()}


def test_same_numbers_same_bytes(written: Path, tmp_path: Path):
    settings = dict(matplotlib.rcParams)
    report.write(full(), tmp_path)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    assert settings == dict(matplotlib.rcParams)


def test_page_needs_no_network_and_no_script(written: Path, drawn: list[plots.Plot]):
    page = (written / "report.html").read_text()
    tags = Tags(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.names)
    assert all(link.startswith("#") for link in tags.links)
    assert not re.search(r"@import|url\((?!#)", page)
    assert tags.names.count("svg") == len(drawn) == 7
    assert page.index("<table") < page.index("<figure")


def test_hostile_names_are_text(tmp_path: Path):
    numbers = full()
    numbers |= dict.fromkeys(("dataset", "workdir", "command", "date", "device"), HOSTILE)
    numbers["methods"] |= {HOSTILE: row(0.5)}
    numbers["controls"] = {HOSTILE: {HOSTILE: row(0.0)}}
    numbers["versions"] = {HOSTILE: HOSTILE}
    numbers["learning_curves"] |= {HOSTILE: [{"step": 1, HOSTILE: 0.5}]}
    numbers["by_history_length"] = {"bins": [HOSTILE], "rows": [1], "auc": {HOSTILE: [0.5]}}
    report.write(numbers, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "script" not in Tags(page).names
    assert "&lt;script&gt;" in page
    text = (tmp_path / "report.md").read_text()
    shown = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not any(re.search(r"(?<!\\)<", line) for line in shown)
    widths = {
        line.replace("\\|", "").count("|") for line in shown if line.startswith(f"| {'method'}")
    }
    assert len(widths) == 1


def test_figures_follow_the_page_and_share_no_ids(drawn: list[plots.Plot]):
    ids: set[str] = set()
    for plot in drawn:
        tree = ElementTree.fromstring(plot.svg)
        own = [e.attrib["id"] for e in tree.iter() if "id" in e.attrib]
        assert len(own) == len(set(own)) and not ids & set(own), plot.title
        assert {e for e in re.findall(r'#([\w-]+)[")]', plot.svg)} <= set(own)
        assert "var(--ink)" in plot.svg
        assert not set(re.findall(r"#[0-9a-f]{6}\b", plot.svg)) - {"#ffffff"}, plot.title
        ids |= set(own)


def test_a_method_has_one_colour(drawn: list[plots.Plot]):
    indices = [svg.style(name) for name in svg.NAMED]
    assert len(set(indices)) == len(svg.NAMED) == len(svg.SERIES)
    assert svg.style("FM") == svg.style("fm")
    by_title = {plot.title: plot.svg for plot in drawn}
    own = f"var(--s{svg.style('loopfm')})"
    assert own in by_title["AUC against base"] and own in by_title["AUC by history length"]


def test_cold_start_and_rows_are_shown(drawn: list[plots.Plot]):
    plot = next(p for p in drawn if p.title == "AUC by history length")
    texts = ["".join(e.itertext()) for e in ElementTree.fromstring(plot.svg).iter()]
    assert any("cold start" in t for t in texts)
    assert any(re.search(r"0\s*1\b", t) for t in texts)


def test_one_seed_draws_no_bars_and_says_so(tmp_path: Path):
    report.write(one_seed(), tmp_path)
    (plot,) = plots.figures(one_seed())
    assert "no bars" in plot.caption
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "One seed" in text and "±" not in text
    assert "SE" not in report.table(one_seed()).splitlines()[0]


def test_table():
    lines = report.table(full()).splitlines()
    assert lines[0].split()[:5] == ["method", "AUC", "delta", "AUC", "+-"]
    assert [line.split()[0] for line in lines[2:6]] == ["FM", "base", "kd", "loopfm"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert "+0.2500 +- 0.0156" in lines[5]
    text = "\n".join(lines[6:])
    assert "TR undefined for loopfm: too noisy." in text
    assert "swapped-histories" in text and "bayes_vm" in text
    assert text.isascii()


def test_only_what_is_there(tmp_path: Path):
    for numbers in ({}, {"methods": {"base": {"auc": 0.5}}}, {"by_history_length": None}):
        report.write(numbers, tmp_path)
        page = (tmp_path / "report.html").read_text()
        assert "No method was compared with base." in page
        assert "<svg" not in page and "Controls" not in page
        assert report.table(numbers).startswith("method")


@pytest.mark.parametrize(
    ("delta", "error", "seeds", "said"),
    [
        (0.25, 0.0156, 3, "loopfm beats base by +0.2500 AUC ± 0.0156 (2 of 3 seeds)."),
        (0.25, 0.0156, 2, "loopfm beats base by +0.2500 AUC ± 0.0156 (2 of 2 seeds)."),
        (0.25, 0.0625, 2, "No method is clearly above base"),  # t is 12.7 with two seeds
        (0.25, 0.25, 3, "No method is clearly above base"),
        (-0.25, 0.25, 3, "No method is clearly above base"),
        (-0.25, 0.0156, 3, "Every method is below base"),
        (0.25, None, 1, "loopfm is above base: +0.2500 AUC (one seed, so no standard error)."),
        (-0.25, None, 1, "loopfm is not above base"),
    ],
)
def test_verdict(delta: float, error: float | None, seeds: int, said: str):
    numbers = {"seeds": seeds, "methods": {"base": row(), "loopfm": row(delta, error)}}
    assert verdict(numbers).startswith(said)


def test_validation_is_named():
    numbers = full() | {"holdout": "validation"}
    assert "test window was not looked at" in report.table(numbers)


def test_the_numbers_are_not_changed():
    numbers = full()
    kept = copy.deepcopy(numbers)
    for render in (report.table, report.markdown, report.html):
        render(numbers)
    assert numbers == kept
