"""Studies: tables of cells, shared stages, statistics, decomposition, pages."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import ttest_rel

from loopfm_jax import stages
from loopfm_jax.backbones import BackboneConfig
from loopfm_jax.config import Config, load
from loopfm_jax.data.schema import Behaviour, Field, Schema
from loopfm_jax.errors import UserError
from loopfm_jax.fm.teacher import FMConfig
from loopfm_jax.metrics import Metrics
from loopfm_jax.study.cells import Cell, Table, changed
from loopfm_jax.study.config import StudyConfig
from loopfm_jax.study.decomposition import TERMS, decompose
from loopfm_jax.study.paper import PAPER, published
from loopfm_jax.study.plan import possible, with_taps
from loopfm_jax.study.run import Result
from loopfm_jax.study.summary import summarise
from loopfm_jax.study.tables import TABLES, find_tables
from loopfm_jax.vm.methods import find_method

TAPS = ("hidden_0", "hidden_1", "embedding", "all", "item", "entity")
WHOLE = Config(
    fm=FMConfig(backbone=BackboneConfig(hidden=(8, 6)), taps=TAPS),
    study=StudyConfig(keys=("key", "item_id", "key,item_id", "key+topic"), vms=("deepfm", "dmin")),
)


# --------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_made_of_experiments_that_exist(name):
    table = TABLES[name](WHOLE)
    assert table.name == name and table.cells
    places = [cell.place for cell in table.cells]
    assert len(set(places)) == len(places)
    for cell in table.cells:
        if cell.method != "auto":
            find_method(cell.method)
        changed(WHOLE, cell.changes)  # every option exists and takes the value
    reference = table.reference or "base"
    known = {(row, reference) for row in table.rows} if table.curve else {
        (reference, column) for column in table.columns
    }  # fmt: skip
    assert known <= set(places)


@pytest.mark.parametrize(("dataset", "name"), [(d, t) for d in PAPER for t in PAPER[d]])
def test_the_papers_numbers_belong_to_cells_of_its_tables(dataset, name):
    wide = replace(
        WHOLE.study,
        vms=("fm2", "fmfm", "deepfm", "dien", "dmr", "dmin"),
        lengths=(10, 25, 50, 75, 100),
    )
    dmin = {"vm.backbone.tables.width": 32, "vm.backbone.name": "dmin"}
    table = TABLES[name](changed(WHOLE, {"study": wide, **dmin}))
    places = {cell.place for cell in table.cells}
    unknown = set(published(dataset, name)) - places
    assert unknown <= {("128", "kd+loopfm")}, unknown  # no code of 128 numbers here


def test_tables_by_name():
    names = ["seeds,length", "code", "seeds"]
    assert [t.name for t in find_tables(names, WHOLE)] == ["seeds", "length", "code"]
    with pytest.raises(UserError, match="no table 'lenth': tables are transfers"):
        find_tables(["lenth"], WHOLE)
    for nothing in ((), ("",), (",",)):
        with pytest.raises(UserError, match="--tables names none: give some of transfers"):
            find_tables(nothing, WHOLE)


def test_changed_sets_dotted_options_and_knows_no_others():
    found = changed(WHOLE, {"history.length": 7, "vm.backbone.tables.width": 2})
    assert (found.history.length, found.vm.backbone.tables.width) == (7, 2)
    assert found.fm == WHOLE.fm and WHOLE.history.length != 7
    with pytest.raises(ValueError, match="no option 'lenth'"):
        changed(WHOLE, {"history.lenth": 7})


# ---------------------------------------------------------------------------------- numbers


def result(*aucs: float, fm_loss: float = 1.0) -> Result:
    seeds = [Metrics(auc, 0.6, 0.5, 0.9, 1.0) for auc in aucs]
    loss = np.array([0.5, 0.6, 0.7]) - np.mean(aucs) / 10
    facts = {"bytes_per_row": 16, "losses": {}, "drift": [], "needs_fm": False}
    return Result(seeds, loss, Metrics(0.7, 0.6, 0.5, 0.9, 1.0), np.full(3, fm_loss), facts)


def test_differences_are_paired_by_seed_and_tested():
    cells = (Cell("base", "", "base", {}), Cell("kd", "", "kd", {}), Cell("loopfm", "", "x", {}))
    table = Table("seeds", "title", cells)
    base, kd = (0.70, 0.72, 0.71), (0.705, 0.724, 0.716)
    found = summarise(
        table,
        {
            ("seeds", ("base", "")): result(*base),
            ("seeds", ("kd", "")): result(*kd),
            ("seeds", ("loopfm", "")): result(*base),
        },
    )
    by_row = {cell["row"]: cell for cell in found["cells"]}
    apart = np.subtract(kd, base)
    assert "delta_auc" not in by_row["base"]
    assert by_row["kd"]["delta_auc"] == pytest.approx(apart.mean())
    assert by_row["kd"]["delta_auc_se"] == pytest.approx(apart.std(ddof=1) / np.sqrt(3))
    assert by_row["kd"]["p"] == pytest.approx(ttest_rel(kd, base).pvalue)
    assert by_row["kd"]["seeds_won"] == 3 and by_row["loopfm"]["seeds_won"] == 0
    assert by_row["kd"]["paper_auc"] == 0.5978
    assert found["order"][""] == {
        "as_published": [["base", "kd"]],
        "other_way": [["kd", "loopfm"]],
        "within_error": [["base", "loopfm"]],
    }


def test_a_curve_is_tested_against_base_of_its_own_row():
    cells = tuple(Cell(x, m, m, {}) for x in ("5", "10") for m in ("base", "loopfm"))
    aucs = {("5", "base"): 0.7, ("5", "loopfm"): 0.71, ("10", "base"): 0.8, ("10", "loopfm"): 0.83}
    results = {("length", place): result(auc) for place, auc in aucs.items()}
    found = summarise(Table("length", "title", cells, curve=True), results)
    deltas = [cell.get("delta_auc") for cell in found["cells"]]
    assert deltas == [None, pytest.approx(0.01), None, pytest.approx(0.03)]


def test_transfer_ratio_is_the_share_that_arrived_of_a_gain_that_is_there():
    cells = (Cell("base", "", "base", {}), Cell("kd", "", "kd", {}))
    table = Table("seeds", "title", cells)
    for fm_loss, expected in ((0.0, 0.01 / (0.6 - 0.07)), (0.55, None), (2.0, None)):
        base, kd = result(0.7, fm_loss=fm_loss), result(0.8, fm_loss=fm_loss)
        found = summarise(table, {("seeds", ("base", "")): base, ("seeds", ("kd", "")): kd})
        ratios = [cell["transfer_ratio"] for cell in found["cells"]]
        assert ratios == [None, expected if expected is None else pytest.approx(expected)]


def test_decomposition_is_exact_and_has_the_errors_of_its_rows():
    rng = np.random.default_rng(0)
    losses = {name: rng.normal(1, 0.1, 500) for name in ("x", "raw", "loopfm", "both", "fp32")}
    known = zip(losses, (4, 3, 2, 1, 1.5), strict=True)
    limits = {name: np.full(500, value) for name, value in known}
    found = decompose(losses, limits)
    estimate = {name: term["estimate"] for name, term in found.items()}
    together = estimate["I_temporal"] + estimate["I_cross"] - estimate["I_residual"]
    assert estimate["I_loopfm"] == pytest.approx(together, abs=1e-12)
    assert {name: term["truth"] for name, term in found.items()} == {
        "I_loopfm": 2, "I_temporal": 1, "I_cross": 2, "I_residual": 1, "L_quantised": 0.5,
    }  # fmt: skip
    apart = losses["raw"] - losses["both"]
    assert found["I_cross"]["se"] == pytest.approx(apart.std(ddof=1) / np.sqrt(500))
    assert all("truth" not in term for term in decompose(losses).values()) and set(found) == {
        *TERMS
    }


# ----------------------------------------------------------------------------------- whole


def test_a_study_runs_every_experiment_once_and_goes_on(loopfm):
    small = ["--study.lengths", "2", "5"]
    line = loopfm.succeed("study", *small, "--tables", "seeds,length")
    made = sorted(loopfm.workdir.glob("*/*/manifest.json"))
    stages = [path.parent.parent.name for path in made]
    # base and kd know no histories; loopfm and kd+loopfm are there for two lengths
    assert {s: stages.count(s) for s in set(stages)} == {
        "prepare": 1, "train-fm": 1, "export": 1, "structure": 2, "train-vm": 2 + 4,
    }  # fmt: skip
    seeds = {cell["row"]: cell for cell in line["tables"]["seeds"]}
    longest = [c for c in line["tables"]["length"] if (c["row"], c["column"]) == ("5", "loopfm")]
    assert longest[0]["auc"] == seeds["loopfm"]["auc"]  # the same run in two tables

    before = {path: path.stat().st_mtime_ns for path in made}
    again = loopfm.succeed("study", *small, "--tables", "seeds,length,decomposition")
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert again["tables"]["seeds"] == line["tables"]["seeds"]
    terms = again["decomposition"]["with outcomes"]
    assert set(terms) == {*TERMS} and terms["I_loopfm"]["truth"] > 0

    study = json.loads((loopfm.workdir / "study.json").read_text())
    assert [table["name"] for table in study["tables"]] == ["seeds", "length", "decomposition"]
    text = (loopfm.workdir / "study.md").read_text()
    assert "| kd+loopfm |" in text and "0.6342" in text and "SEs apart" in text
    for name in ("seeds", "length"):
        ElementTree.parse(loopfm.workdir / f"{name}.svg")
    page = (loopfm.workdir / "study.html").read_text()
    assert page.count("<svg") == 3 and "Gain decomposition" in page


def test_choices_of_the_vm_alone_are_experiments_of_their_own(loopfm):
    """Taps share every stage but the VM's."""
    taps = ["--fm.taps", "hidden_0", "embedding", "item"]
    line = loopfm.succeed("study", *taps, "--tables", "tap")
    aucs = [cell["auc"] for cell in line["tables"]["tap"]]
    assert len(aucs) == 5 and len(set(aucs)) == 5
    assert len(list(loopfm.workdir.glob("structure/*"))) == 1


def test_force_redoes_every_stage_once(loopfm, monkeypatch):
    made = []

    def count(stage, work, *, force=False, together=False):
        made.extend([stage.directory] if force else [])
        return run(stage, work, force=force, together=together)

    run = stages.run
    monkeypatch.setattr(stages, "run", count)
    loopfm.succeed("study", "--tables=length", "--study.lengths=5", "--force")
    assert len(made) == len(set(made)) == 4 + 3  # prepare to structure, and three VMs


def test_an_unknown_table_is_refused(loopfm):
    message = loopfm.refuse("study", "--tables", "transfer")
    assert "no table 'transfer'" in message and "transfers" in message


# ----------------------------------------------------------------------------------- plans

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
LOG = Schema(
    (Field("user", 9), Field("item", 9), Field("cate", 9))
    + tuple(Field(f"{n}_his", 9, "sequence", 4, shares=n) for n in ("item", "cate")),
    behaviours=(Behaviour(("item", "cate"), ("item_his", "cate_his")),),
    item=("item", "cate"),
    entity=("user",),
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_table_of_every_configuration_is_possible(path):
    """Taps are exported, options go together, backbones fit; `gap` needs a simulated log."""
    config = with_taps(load(path), LOG)
    names = [name for name in TABLES if name != "gap" or hasattr(config.data, "gap")]
    tables = find_tables(names, config)
    left = possible(tables, config, LOG)
    dropped = [set(t.rows) - set(p.rows) for t, p in zip(tables, left, strict=True)]
    assert not any(dropped) or config.study.taps == ()


def test_rows_that_a_log_does_not_allow_are_left_out_by_name(capsys):
    no_entity = replace(LOG, entity=())
    config = with_taps(Config(), no_entity)
    assert config.fm.taps == ("hidden_0", "item")
    [table] = possible(find_tables(["transfers"], config), config, no_entity)
    assert "kd+entity" not in table.rows and "item-only" in table.rows
    assert "transfers without kd+entity: no tap 'entity'" in capsys.readouterr().err


def test_what_cannot_be_built_is_refused_before_anything_trains():
    config = changed(Config(), {"study.vms": ("dmin",), "vm.backbone.heads": 5})
    with pytest.raises(UserError, match="table transfers, base dmin: .*5"):
        possible(find_tables(["transfers"], config), config, LOG)


def test_options_that_go_together_are_set_together():
    wide = changed(Config(), {"fm.compressor.width": 128, "fm.compressor.prefixes": (32, 128)})
    assert changed(wide, TABLES["dim"](wide).cells[0].changes).fm.compressor.width == 64
