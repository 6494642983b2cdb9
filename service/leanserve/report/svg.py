"""A matplotlib figure as SVG inside an HTML page: it follows the page's colours and font, light or dark.

Matplotlib draws with a few marker colours; each is then replaced by the page's CSS variable, which works because the
SVG is inline. Text stays text, so that it is sharp, selectable and set in the page's font.
"""

from __future__ import annotations

import re
import warnings
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, ACCENT, GOOD, BAD, SURFACE = (f"#0{digit}0{digit}0{digit}" for digit in range(1, 8))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    ACCENT: "--accent",
    GOOD: "--good",
    BAD: "--bad",
    SURFACE: "--surface",
}
WIDTH = 5.2
"""Inches (72 units each) of every figure: narrow enough to be read on a phone, where it is shrunk to fit."""


def new_figure(height: float) -> Figure:
    """An empty figure of the common width and this height in inches, without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")


def bare(axes: Axes) -> None:
    """Strip an axes to what carries information: light grid, no frame, muted labels."""
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=MUTED, labelsize=11)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=MUTED, size=11)
    axes.yaxis.label.set(color=MUTED, size=11)


def inline(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element. `name` keeps its ids apart from those of other figures on the page.

    `description` tells what is to be seen to those who cannot see it. The result depends on nothing but the figure.
    """
    import matplotlib as mpl

    text = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # Names may use scripts that matplotlib's own font lacks; the browser draws the text, with its fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _adopt(text.getvalue(), name, description)


def _adopt(document: str, name: str, description: str) -> str:
    """Turn a stand-alone SVG document into an element of the page."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    opening, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    rest = rest.replace("xlink:href=", "href=").replace('id="', f'id="{name}-')
    rest = rest.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    return f'<svg {box.group() if box else ""} role="img" aria-label="{escape(description)}">{rest.strip()}'
