"""AUC that the paper reports (arXiv 2605.29280, section 3 of PAPER), on TaobaoAd.

Its own tables differ by up to .007 for one configuration, and its data, VMs and FM are others than
those of most studies here: what can be compared is the order of rows, not the numbers.
"""

FOUR = ("base", "kd", "loopfm", "kd+loopfm")


def _methods(column: str, *values: float) -> dict[tuple[str, str], float]:
    return {(m, column): value for m, value in zip(FOUR, values, strict=True)}


def _rows(**values: float) -> dict[tuple[str, str], float]:
    return {(row, ""): value for row, value in values.items()}


def _curve(column: str, values: dict[int, float]) -> dict[tuple[str, str], float]:
    return {(str(x), column): value for x, value in values.items()}


def _capacity(row: str, *values: float) -> dict[tuple[str, str], float]:
    return {(row, m): value for m, value in zip(FOUR[1:], values, strict=True)}


PAPER: dict[str, dict[tuple[str, str], float]] = {
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
        ("base", "width 32"): 0.5932,
        ("raw", "width 32"): 0.6302,
        ("loopfm", "width 32"): 0.6319,
        ("raw+loopfm", "width 32"): 0.6362,
        ("base", "width 2"): 0.5843,
        ("raw", "width 2"): 0.6186,
        ("loopfm", "width 2"): 0.6233,
        ("raw+loopfm", "width 2"): 0.6305,
    },
    "tap": _rows(embedding=0.6338, hidden_0=0.6340, hidden_1=0.6328, all=0.6341)
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
"""Table -> (row, column) -> AUC."""
