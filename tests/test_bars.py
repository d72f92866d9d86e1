"""BARS data sets: lists decode to what the files say, in the given order, only published files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import polars as pl
import pytest
from bars_files import (
    SHOWN,
    amazon_rows,
    kuai_rows,
    md5,
    taobao_rows,
    write_bars,
    write_embeddings,
)
from command_line import CommandLine
from flax import nnx
from raw_logs import files_of, vocabulary

from loopfm_jax.data import bars
from loopfm_jax.data.bars_sets import VISUAL, AmazonElectronicsX1, Bars, KuaiVideoX1, TaobaoAdX1
from loopfm_jax.data.log import load
from loopfm_jax.data.prepare import prepare
from loopfm_jax.errors import UserError
from loopfm_jax.flow import Flow
from loopfm_jax.inputs import open_inputs
from loopfm_jax.options import parse
from loopfm_jax.sharding import make_mesh
from loopfm_jax.vm.train import load_vm

SETS = {
    "taobao": (TaobaoAdX1(check=False, min_count=2), taobao_rows),
    "kuai": (KuaiVideoX1(check=False, min_count=2, length=20), kuai_rows),
    "amazon": (AmazonElectronicsX1(check=False, length=4), amazon_rows),
}
HISTORIES = {
    "taobao": {"cate_his": "cate_id", "brand_his": "brand", "btag_his": "btag"},
    "kuai": {"pos_items": "item_id", "neg_items": "item_id",
             "pos_items_emb": "item_emb", "neg_items_emb": "item_emb"},
    "amazon": {"item_history": "item_id", "cate_history": "cate_id"},
}  # fmt: skip
PREPARED: dict[str, tuple[Path, Path]] = {}


def prepared_from(source: Bars, folder: Path) -> Path:
    folder.mkdir(parents=True)
    prepare(source.read(), source.windows, name=source.name, card=source.card, directory=folder)
    return folder


def rewrite(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], **kwargs) -> None:
    change(pl.read_csv(path, infer_schema=False)).write_csv(path, **kwargs)


@pytest.fixture(params=SETS)
def made(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """(name, raw folder, prepared folder); nobody writes to them."""
    name = request.param
    if name not in PREPARED:
        source, rows = SETS[name]
        raw = write_bars(tmp_path_factory.mktemp(name) / "raw", rows)
        PREPARED[name] = raw, prepared_from(replace(source, raw_dir=raw), raw.parent / "log")
    return name, *PREPARED[name]


def file_rows(raw: Path) -> pl.DataFrame:
    return pl.concat([pl.read_csv(raw / f"{p}.csv", infer_schema=False) for p in bars.PARTS])


def test_histories_are_those_of_the_files(made):
    name, raw, folder = made
    source, _ = SETS[name]
    log, splits = load(folder)
    rows = file_rows(raw)
    order = log["example_id"]
    if name == "kuai":  # rows of one moment may stand in another order
        order = np.lexsort((log["key"], log["time"]))
    assert len(log) == len(rows) and splits["test"].stop - splits["test"].start == 50
    for history, target in HISTORIES[name].items():
        known = vocabulary(folder, target)
        unknown = log.schema[target].rows - 1
        ids = log.padded(history, order) - log.schema.offsets[history]
        column = history.removesuffix("_emb")
        texts = rows[column].fill_null("").to_list()
        want = sorted(
            [known.get(v, unknown) for v in text.split("^") if v][-source.length :]
            for text in texts
        )
        found = sorted(row[row > 0].tolist() for row in ids)
        assert found == want
        assert (np.diff((ids > 0).astype(int), axis=1) >= 0).all()


def test_rows_share_the_storage_of_their_histories(made):
    name, raw, folder = made
    log, _ = load(folder)
    rows = file_rows(raw)
    for history in HISTORIES[name]:
        texts = set(rows[history.removesuffix("_emb")].fill_null("").to_list())
        kept = [text.split("^")[-SETS[name][0].length :] for text in texts if text]
        assert len(log.sequences[history]) == sum(map(len, kept))


def test_given_order_is_time_in_eight_chunks(made):
    name, _, folder = made
    log, splits = load(folder)
    starts = {"fm": 0, "vm": 200, "validation": 300, "test": 350}
    tolerance = SHOWN if name == "kuai" else 0  # a moment is not cut
    for split, first in starts.items():
        assert abs(splits[split].start - first) <= tolerance
    assert (np.diff(log["time"]) >= 0).all()


def test_one_moment_is_one_moment(tmp_path):
    """KuaiVideo: one timestamp; Amazon: the reviewed good and the drawn one of a test user."""
    for name in ("kuai", "amazon"):
        source, rows = SETS[name]
        raw = write_bars(tmp_path / name, rows)
        log, splits = load(prepared_from(replace(source, raw_dir=raw), tmp_path / f"{name}_log"))
        test = log["time"][splits["test"]]
        assert len(np.unique(test)) < len(test)
        if name == "amazon":
            assert len(np.unique(test)) == len(test) / 2
            assert len(np.unique(log["time"][splits["fm"]])) == 200
            assert (log["logged_time"][splits["test"]] > test).sum() == len(test)


def test_amazon_users_are_no_feature(tmp_path):
    raw = write_bars(tmp_path / "raw", amazon_rows)
    source = replace(SETS["amazon"][0], raw_dir=raw)
    assert {c.name for c in source.read().columns} == {"item_id", "cate_id"}


def test_embeddings_stand_behind_their_ids(tmp_path):
    raw = write_bars(tmp_path / "raw", kuai_rows)
    folder = prepared_from(replace(SETS["kuai"][0], raw_dir=raw), tmp_path / "log")
    log, _ = load(folder)
    table = log.pretrained["item_emb"]
    assert table.shape == (32, 4) and table.dtype == np.float32
    assert log.schema["item_emb"].frozen_width == log.schema["pos_items_emb"].frozen_width == 4
    assert not table[[0, -1]].any()
    with h5py.File(raw / VISUAL) as file:
        np.testing.assert_array_equal(table[1:-1], np.float32(file["value"][:]))
    at = [f.name for f in log.schema.categorical]
    visual, item = (log["ids"][:, at.index(n)] for n in ("item_emb", "item_id"))
    items = {i: int(v) for v, i in vocabulary(folder, "item_id").items()}
    offset = log.schema.offsets["item_id"]
    for a, b in zip(visual.tolist(), (item - offset).tolist(), strict=True):
        assert b not in items or items[b] == a - 1  # keys of the file are 0, 1, ..
    inputs = open_inputs(folder, reader="vm", behaviours=True)
    batch = inputs.batch(np.arange(5))
    assert batch["ids_BF"].shape == (5, 3)
    assert sum(e["ids_PSG"].shape[2] for e in batch["events"].values()) == 4


@pytest.mark.parametrize("spelling", ["quoted", "floats", "trailing blanks", "gzip", "batches"])
def test_how_a_file_is_spelt_does_not_matter(tmp_path, spelling, monkeypatch):
    source, rows = SETS["amazon"]
    one, two = (write_bars(tmp_path / n, rows) for n in ("one", "two"))
    for path in [two / f"{part}.csv" for part in bars.PARTS]:
        if spelling == "quoted":
            rewrite(path, lambda f: f, quote_style="always")
        elif spelling == "floats":
            text = pl.col("item_history").str.replace_all(r"(\d+)", "$1.0")
            rewrite(path, lambda f, t=text: f.with_columns(pl.col("item_id") + ".0", t))
        elif spelling == "trailing blanks":
            rewrite(path, lambda f: f.rename({"cate_history": "cate_history "}))
        elif spelling == "gzip":
            pl.read_csv(path, infer_schema=False).write_csv(f"{path}.gz", compression="gzip")
            path.unlink()
    if spelling == "batches":
        monkeypatch.setattr(bars, "BATCH", 30)
    folders = [
        prepared_from(replace(source, raw_dir=r), tmp_path / f"{r.name}_log") for r in (one, two)
    ]
    assert files_of(folders[0]) == files_of(folders[1])


def test_only_the_published_files_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    source, rows = SETS["amazon"]
    raw = write_bars(tmp_path / "raw", rows)
    strict = replace(source, raw_dir=raw, check=True)
    with pytest.raises(UserError) as error:
        strict.read()
    words = ["train.csv", md5(raw / "train.csv"), "e9bf80b92985e463db18fdc753d347b5", "no-check"]
    assert all(word in str(error.value) for word in words)
    replace(source, raw_dir=raw).read()
    assert "not compared" in capsys.readouterr().err
    published = iter(["e9bf80b92985e463db18fdc753d347b5", "57a20e82fe736dd495f2eaf0669bf6d0"])
    monkeypatch.setattr(bars, "_md5", lambda path: next(published))
    assert strict.read().notes["md5_test"] == "57a20e82fe736dd495f2eaf0669bf6d0"


def _remove(raw: Path) -> None:
    (raw / "test.csv").unlink()


WRONG = {
    "no test file": ("amazon", _remove, ["test.csv"]),
    "no label": (
        "amazon",
        lambda raw: rewrite(raw / "train.csv", lambda f: f.rename({"label": "lable"})),
        ["train.csv", "'label'", "did you mean 'lable'"],
    ),
    "text as id": (
        "amazon",
        lambda raw: rewrite(
            raw / "train.csv", lambda f: f.with_columns(pl.lit("b7").alias("item_id"))
        ),
        ["train.csv", "b7"],
    ),
    "another separator": (
        "amazon",
        lambda raw: rewrite(
            raw / "train.csv",
            lambda f: f.with_columns(pl.col("item_history").str.replace_all("^", "|",
                                                                            literal=True)),
        ),
        ["'item_history'", "'^'"],
    ),
    "no embeddings": ("kuai", lambda raw: (raw / VISUAL).unlink(), [VISUAL, "is missing"]),
    "an item without embedding": (
        "kuai",
        lambda raw: write_embeddings(raw / VISUAL, items=29),
        ["'item_emb'", "'29'", "table of 29"],
    ),
    "no HDF5": ("kuai", lambda raw: (raw / VISUAL).write_text("x"), [VISUAL, "HDF5"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_refuses_files_that_do_not_fit(tmp_path, case):
    name, spoil, words = WRONG[case]
    source, rows = SETS[name]
    raw = write_bars(tmp_path / "raw", rows)
    spoil(raw)
    with pytest.raises(UserError) as error:
        prepared_from(replace(source, raw_dir=raw), tmp_path / "log")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("keys", ["short", "twice", "unnamed"])
def test_refuses_tables_that_are_none(tmp_path, keys):
    raw = write_bars(tmp_path / "raw", kuai_rows)
    with h5py.File(raw / VISUAL, "w") as file:
        file.create_dataset("id" if keys == "unnamed" else "key",
                            data=[0, 0, 1] if keys == "twice" else list(range(3)))  # fmt: skip
        file.create_dataset("value", data=np.ones((2 if keys == "short" else 3, 4)))
    with pytest.raises(UserError, match=VISUAL):
        replace(SETS["kuai"][0], raw_dir=raw).read()


@pytest.mark.parametrize("kept", ["together", "apart"])
def test_files_may_lie_in_the_data_folder(tmp_path, kept):
    """All of them, or what was unpacked beside what was downloaded apart."""
    raw, log = write_bars(tmp_path / "raw", kuai_rows), tmp_path / "log"
    source = replace(SETS["kuai"][0], raw_dir=raw)
    prints = source.fingerprint()
    expected = files_of(prepared_from(source, log))
    (raw / "data").mkdir()
    for name in prints if kept == "together" else (VISUAL,):
        (raw / name).rename(raw / "data" / name)
    assert source.fingerprint() == prints
    assert files_of(prepared_from(source, tmp_path / "other")) == expected


def test_the_fingerprint_names_every_file(tmp_path):
    raw = write_bars(tmp_path / "raw", kuai_rows)
    source = replace(SETS["kuai"][0], raw_dir=raw)
    assert set(source.fingerprint()) == {"train.csv", "test.csv", VISUAL}
    with pytest.raises(UserError, match="--data.raw-dir"):
        SETS["kuai"][0].fingerprint()


CLASSES = {"taobao": "TaobaoAdX1", "kuai": "KuaiVideoX1", "amazon": "AmazonElectronicsX1"}


OPTIONS = ("--methods", "loopfm", "--vm.backbone.behaviours")


@pytest.mark.parametrize("name", CLASSES)
def test_the_whole_loop(tmp_path, capsys, name):
    raw = write_bars(tmp_path / "raw", SETS[name][1])
    line = CommandLine(tmp_path, capsys)
    line.configure(f"{CLASSES[name]}(raw_dir=Path({str(raw)!r}), check=False, length=5)")
    found = line.succeed("run", *OPTIONS)
    assert found["rows"]["test"] == 50
    assert set(found["methods"]) == {"base", "loopfm"}
    if name == "kuai":
        check_pictures(Flow(parse(line.config, line.argv("", *OPTIONS)[2:])))


def check_pictures(flow: Flow) -> None:
    """A model is saved without the pictures of the videos, and predicts with them."""
    examples, mesh = flow.examples("base", 0), make_mesh(flow.config.mesh)
    folder, vm = flow.vm("base", 0), flow.config.vm
    with ocp.StandardCheckpointer() as reader:
        saved = reader.restore((folder / "model").resolve())
    sizes = {np.shape(leaf) for leaf in jax.tree.leaves(saved)}
    pictures = examples.inputs.log.pretrained["item_emb"]
    assert pictures.shape not in sizes and pictures.any()

    batch, past = examples.batch(examples.inputs.rows("test")), examples.past(mesh)
    model = load_vm(examples, vm, folder, mesh)
    predicted = nnx.sigmoid(model(jax.tree.map(np.asarray, batch), past).logits_B)
    expected = np.load(folder / "prediction.npy", allow_pickle=False)
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)
    blind = model.backbone.embedder.frozen["item_emb"]
    blind[...] = jnp.zeros_like(blind[...])
    assert np.abs(nnx.sigmoid(model(batch, past).logits_B) - expected).max() > 1e-6
