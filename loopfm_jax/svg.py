"""How the report's figures look: inline SVG that follows the page into dark mode.

Text stays text and every colour is a CSS variable. A method has one colour and one marker
everywhere (Okabe-Ito hues, safe for the colour-blind). The same numbers give the same bytes.
"""

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GRID = "#1d2733", "#dfe3e8"
PAGE = {"--ink": (INK, "#e8ecf1"), "--grid": (GRID, "#343c47")}
NAMED = ("fm", "base", "kd", "loopfm", "kd+loopfm", "loopfm+outcome", "kd+loopfm+outcome")
SERIES = (  # on light, on dark, marker; any further method takes one of the last two
    ("#a34f86", "#dd93c3", "P"),
    ("#66707c", "#a5afbc", "o"),
    ("#c77700", "#f2ab35", "s"),
    ("#0068a8", "#5db8f0", "^"),
    ("#007d5b", "#31c998", "D"),
    ("#c4480b", "#ff8f5a", "v"),
    ("#7a6a00", "#e3d44a", "X"),
)
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
WIDTH = 4.8  # inches; at this width the text is as large as a phone's


def variables(*, dark: bool) -> str:
    """CSS declarations of every colour the figures use."""
    pairs = PAGE | {f"--s{i}": pair[:2] for i, pair in enumerate(SERIES)}
    return " ".join(f"{name}: {pair[dark]};" for name, pair in pairs.items())


def style(method: str) -> int:
    """The index into SERIES, the same in every figure and every run."""
    if method.lower() in NAMED:
        return NAMED.index(method.lower())
    return len(SERIES) - 1 - sum(method.encode()) % 2


def new_axes(*, height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many inches, outside pyplot."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def draw_legend(figure: Figure, labels: Sequence[str]) -> None:
    """The methods above the axes, where there is more than one."""
    if len(labels) > 1:
        columns = min(len(labels), 3 if max(map(len, labels)) > 9 else 4)
        figure.legend(loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=1.6)


def render(figure: Figure, name: str) -> str:
    """The bare <svg> element, without date, metadata, fixed size and ids that nobody refers to."""
    file = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"loopfm {name}"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    text = re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + body
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace("'DejaVu Sans'", FONT)
    for variable, pair in PAGE.items():
        text = text.replace(pair[0], f"var({variable})")
    for i, (light, _, _) in enumerate(SERIES):
        text = text.replace(light, f"var(--s{i})")
    return text.strip()


def standalone(svg: str) -> str:
    """A rendered picture as a file of its own, in its light colours."""
    return svg.replace(">", f"><style>:root {{ {variables(dark=False)} }}</style>", 1) + "\n"
