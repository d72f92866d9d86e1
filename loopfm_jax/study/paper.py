"""AUC that the paper reports (arXiv 2605.29280, section 3 of PAPER).

Beside a study of another log stand the numbers of TaobaoAd, the paper's main data set: what can be
compared then is the order of rows. Its own tables differ by up to .007 for one configuration.
"""

from collections.abc import Mapping

Numbers = Mapping[tuple[str, str], float]
"""(row, column) -> AUC."""

FOUR = ("base", "kd", "loopfm", "kd+loopfm")


def _methods(column: str, *values: float) -> dict[tuple[str, str], float]:
    return {(m, column): value for m, value in zip(FOUR, values, strict=True)}


def _rows(**values: float) -> dict[tuple[str, str], float]:
    return {(row, ""): value for row, value in values.items()}


def _curve(column: str, values: dict[int, float]) -> dict[tuple[str, str], float]:
    return {(str(x), column): value for x, value in values.items()}


def _capacity(row: str, *values: float) -> dict[tuple[str, str], float]:
    return {(row, m): value for m, value in zip(FOUR[1:], values, strict=True)}


TAOBAO: dict[str, Numbers] = {
    "transfers": {
        **_methods("fm2", 0.5790, 0.5855, 0.6203, 0.6205),
        **_methods("fmfm", 0.5833, 0.5885, 0.6066, 0.6106),
        **_methods("deepfm", 0.5886, 0.5980, 0.6245, 0.6344),
        **_methods("dien", 0.5945, 0.5958, 0.6335, 0.6354),
        **_methods("dmr", 0.5967, 0.6002, 0.6361, 0.6356),
        **_methods("dmin", 0.5932, 0.6002, 0.6319, 0.6346),
        ("kd+current", "deepfm"): 0.5985,
        ("kd+fitnets", "deepfm"): 0.5984,
        ("kd+entity", "deepfm"): 0.5983,
        ("item-only", "deepfm"): 0.6172,
    },
    "pooling": _rows(mean=0.6118, sum=0.6300, din=0.6112, dmin=0.6344),
    "raw": {
        ("base", "dmin, width 32"): 0.5932,
        ("raw", "dmin, width 32"): 0.6302,
        ("loopfm", "dmin, width 32"): 0.6319,
        ("raw+loopfm", "dmin, width 32"): 0.6362,
        ("base", "dmin, width 2"): 0.5843,
        ("raw", "dmin, width 2"): 0.6186,
        ("loopfm", "dmin, width 2"): 0.6233,
        ("raw+loopfm", "dmin, width 2"): 0.6305,
    },
    "tap": _rows(embedding=0.6338, hidden_0=0.6340, hidden_1=0.6328)  # "all" has d = 64 there
    | {("soft label", ""): 0.6286, ("item-only", ""): 0.6291},
    "checkpoint": {("fixed", "kd+loopfm"): 0.6344, ("fresh", "kd+loopfm"): 0.6311},
    "length": _curve("kd+loopfm", {10: 0.6327, 25: 0.6338, 50: 0.6346, 75: 0.6347, 100: 0.6352}),
    "dim": _curve("kd+loopfm", {8: 0.6339, 16: 0.6337, 32: 0.6345, 64: 0.6341, 128: 0.6342}),
    "capacity": {
        **_capacity("2, 32-16-8", 0.5888, 0.6159, 0.6243),
        **_capacity("4, 64-32-16", 0.5900, 0.6179, 0.6266),
        **_capacity("8, 128-64-32", 0.5952, 0.6142, 0.6284),
        **_capacity("16, 256-128-64", 0.5887, 0.6172, 0.6267),
        **_capacity("32, 512-256-128", 0.5901, 0.6175, 0.6272),
    },
    "seeds": _methods("", 0.5884, 0.5978, 0.6230, 0.6342),
}
KUAI: dict[str, Numbers] = {
    "transfers": {
        **_methods("deepfm", 0.6877, 0.6998, 0.6898, 0.6847),
        **_methods("dien", 0.7115, 0.7223, 0.7212, 0.7252),
        **_methods("dmr", 0.7158, 0.7261, 0.7244, 0.7267),
        **_methods("dmin", 0.7176, 0.7233, 0.7244, 0.7257),
    },
    "pooling": _rows(base=0.6877, mean=0.6965, dmin=0.6847),
    "unsequenced": _rows(base=0.7056, kd=0.7071)
    | {("loopfm, mean", ""): 0.7167, ("kd+loopfm, mean", ""): 0.7146},
}
AMAZON: dict[str, Numbers] = {
    "transfers": {
        **_methods("deepfm", 0.8035, 0.8119, 0.8127, 0.8179),
        **_methods("dien", 0.8490, 0.8640, 0.8537, 0.8645),
        **_methods("dmr", 0.8456, 0.8631, 0.8475, 0.8650),
        **_methods("dmin", 0.8386, 0.8551, 0.8388, 0.8554),
    }
}
PAPER = {
    "taobao_ad": TAOBAO,
    "taobao_ad_x1": TAOBAO,
    "kuaivideo_x1": KUAI,
    "amazon_electronics_x1": AMAZON,
}
"""Data set -> table -> numbers."""


def published(dataset: str, table: str) -> Numbers:
    """What the paper has beside a table; empty if nothing."""
    return PAPER.get(dataset, TAOBAO).get(table, {})
