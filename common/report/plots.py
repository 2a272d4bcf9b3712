"""The pictures of a report: inline SVG in the text colour of the page, the same bytes for the same numbers.

They are about as wide as a phone's screen, so that letters of 9 points can be read there.
"""

import html
import io
import re
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from common.cli import size_text

WIDTH = 4.2  # inches
# Stands for the colour of the text around the picture, light or dark.
INK = "#010203"
# Okabe & Ito's colours, which people with colour blindness can tell apart, in the order of report.KINDS.
COLORS = ("#999999", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#f0e442")
OURS = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # without it the names would be random
}
STYLE = ("default", OURS)  # whatever matplotlibrc says
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # dates and versions would differ


@dataclass(frozen=True)
class Scale:
    """The range of a heat map in dB, the same in every report; values beyond it have the colours of its ends."""

    low: float
    look: float  # under it: look here
    fine: float  # from here on: fine
    high: float


# Rounding to 4 bits in blocks of 32 gives 17 to 25 dB, to 8 bits more than 40.
OF_WEIGHTS = Scale(0, 15, 20, 50)
# The error from one weight alone. Where a whole encoder has 30 dB, fewer than 1 word in 100 changes. The errors of a
# hundred weights of 40 dB each add up to 20 dB.
OF_OUTPUTS = Scale(10, 30, 40, 60)


@style.context(STYLE)
def sizes(components: dict[str, dict[str, dict[str, int]]], kinds: tuple[str, ...]) -> str:
    """Draw component → exported, optimized → kind → bytes as bars, one below the other."""
    bars = [(f"{name}, {side}", numbers) for name, pair in components.items() for side, numbers in pair.items()]
    largest = max(sum(numbers.values()) for _, numbers in bars)
    unit, scale = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    figure, axes = _axes(2.9)
    left = [0.0] * len(bars)
    for kind, color in zip(kinds, COLORS, strict=True):
        widths = [numbers[kind] / scale for _, numbers in bars]
        if any(widths):
            axes.barh(range(len(bars)), widths, left=left, color=color, label=kind.replace("_", " "), height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for i, (_, numbers) in enumerate(bars):
        axes.annotate(size_text(sum(numbers.values())), (left[i], i), (3, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(left))  # room for the numbers
    axes.set_xlabel(unit)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return _svg(figure, "size", "Size of each component before and after, by what its bytes are")


@style.context(STYLE)
def by_layer(name: str, cells: dict[tuple[str, int], tuple[float, int]], title: str, scale: Scale) -> str:
    """Draw (role, layer) → dB and bits as a map of roles by layers. Weights with more bits than others have a dot, and
    those under `scale.look` an outline."""
    roles = list(dict.fromkeys(role for role, _ in cells))
    layers = 1 + max(layer for _, layer in cells)
    values = [[cells.get((role, layer), (float("nan"), 0))[0] for layer in range(layers)] for role in roles]
    fewest = min(bits for _, bits in cells.values())
    figure, axes = _axes(0.9 + 0.24 * len(roles))
    colors = mpl.colormaps["viridis"].resampled(32)
    mesh = axes.pcolormesh(values, cmap=colors, vmin=scale.low, vmax=scale.high, edgecolor=INK, linewidth=0.2)
    dots = [(layer + 0.5, roles.index(role) + 0.5) for (role, layer), (_, bits) in cells.items() if bits > fewest]
    if dots:
        across, down = zip(*dots, strict=True)
        axes.scatter(across, down, s=14, color="#d55e00", edgecolors="white", linewidths=0.5)
    for (role, layer), (ratio, _) in cells.items():
        if ratio < scale.look:
            corner = (layer + 0.1, roles.index(role) + 0.1)
            axes.add_patch(Rectangle(corner, 0.8, 0.8, fill=False, edgecolor="#d55e00", linewidth=1.5))
    axes.set_yticks([i + 0.5 for i in range(len(roles))], roles)
    axes.invert_yaxis()
    step = 1 if layers <= 12 else 4
    axes.set_xticks([i + 0.5 for i in range(0, layers, step)], [str(i) for i in range(0, layers, step)])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, location="top", aspect=13, pad=0.02, label=title)
    bar.set_ticks([scale.low, scale.look, scale.fine, scale.high])
    bar.ax.text((scale.low + scale.look) / 2, 0.5, "look here", color="white", ha="center", va="center", fontsize=8)
    bar.ax.text((scale.fine + scale.high) / 2, 0.5, "fine", color="black", ha="center", va="center", fontsize=8)
    bar.outline.set_visible(False)
    assert bar.solids is not None, "a colour bar of a mesh is a mesh"
    bar.solids.set_edgecolor("face")  # no seams
    return _svg(figure, name, f"{title}, by layer and role")


@style.context(STYLE)
def by_length(points: list[tuple[float, float]]) -> str:
    """Draw (seconds, dB) of each clip as points."""
    figure, axes = _axes(2.8)
    seconds, ratios = zip(*points, strict=True)
    axes.scatter(seconds, ratios, s=14, color="#0072b2", alpha=0.7, linewidths=0)
    axes.set_xlabel("length of the clip, s")
    axes.set_ylabel("signal to error, dB")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.grid(color=INK, alpha=0.15, linewidth=0.5)
    return _svg(figure, "length", "Signal to error of the encoder’s output against clip length")


@style.context(STYLE)
def increases(rows: list[tuple[str, float, float, float]], limit: float | None) -> str:
    """Draw percentage points and the ends of their interval by name, for all clips and each language, and the limit."""
    names, points, low, high = zip(*rows, strict=True)
    figure, axes = _axes(0.7 + 0.24 * len(rows))
    axes.axvline(0, color=INK, linewidth=0.8)
    if limit is not None:
        axes.axvline(limit, color="#d55e00", linewidth=1, linestyle="--")
    axes.hlines(range(len(rows)), low, high, color="#0072b2", linewidth=2)
    axes.scatter(points, range(len(rows)), s=30, color="#0072b2", zorder=3)
    axes.set_yticks(range(len(rows)), [name if len(name) <= 12 else f"{name[:11]}…" for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("change of the word error rate, points" + (" (dashed: the limit)" if limit is not None else ""))
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.5)
    return _svg(figure, "increases", "Change of the word error rate by language, with its interval")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str, label: str) -> str:
    """The picture as an element of a page. `name` keeps its ids apart from those of other pictures; screen readers
    read `label`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
