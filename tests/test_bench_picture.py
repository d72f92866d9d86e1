"""Card and picture of a run, from results alone."""

from io import StringIO

from rich.console import Console

from loopfm_jax.bench import picture, report

PLAIN = {
    "mode": "exact", "unit": "examples/s", "value": 3000.0, "peer": "fuxictr", "peer_value": 1000.0,
    "ratio": 3.0, "ratio_quartiles": [2.8, 3.1], "roofline_share": 0.4, "valid": True,
    "peak_rss_bytes": 2**30, "peer_peak_rss_bytes": 4 * 2**30, "disturbed": 0.0,
    "loss_difference": 1e-6,
}  # fmt: skip
RESULTS = [
    {**PLAIN, "name": "fm-train/a"},
    {**PLAIN, "name": "fm-train/a", "peer": "other", "ratio": 1.5},
    {**PLAIN, "name": "fm-train/a", "mode": "fast", "ratio": 4.0},
    {**PLAIN, "name": "fm-train/b", "valid": False, "loss_difference": 0.2, "disturbed": 0.3},
    {**PLAIN, "name": "input/c", "peer": None, "peer_value": None, "ratio": None,
     "ratio_quartiles": None, "roofline_share": None, "peer_peak_rss_bytes": None},
    {"name": "fm-train/d", "mode": "exact", "error": "no memory", "valid": False},
]  # fmt: skip


def test_card_says_ratios_peers_and_what_is_invalid():
    console = Console(width=160, record=True, file=StringIO())
    console.print(report.card(RESULTS))
    text = console.export_text()
    assert "3.00x" in text and "2.80-3.10" in text and "40%" in text and "1.0 / 4.0" in text
    assert "3.00x INVALID" in text and "failed" in text
    notes = "\n".join(report.notes(RESULTS))
    assert "differ by 2.0e-01" in notes and "no memory" in notes
    assert "more than a tenth of the cores during fm-train/b" in notes


def test_bf16_stands_apart_beside_the_peer_in_bf16():
    ours = {**PLAIN, "name": "fm-train/a", "dtype": "bfloat16"}
    narrow = {**ours, "peer": "other", "peer_dtype": "bfloat16", "ratio": 2.5}
    svg = picture.draw([*RESULTS, {**ours, "peer_dtype": "float32", "ratio": 9.0}, narrow])
    assert svg is not None and "(bf16)" in svg and "2.50" in svg and "9.00" not in svg
    assert report.how({**narrow, "mode": "fast"}) == "fast bf16"


def test_picture_shows_each_valid_row_once_beside_its_first_peer():
    svg = picture.draw(RESULTS)
    assert svg is not None and svg.startswith("<svg") and svg == picture.draw(RESULTS)
    assert svg.count("fm-train/a") == 2 and "(fast)" in svg and "4.00" in svg
    assert "1.50" not in svg and "fm-train/b" not in svg and "input/c" not in svg
    assert picture.draw(RESULTS[3:]) is None
