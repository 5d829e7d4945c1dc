"""What the plots of all pages share. They are Bokeh's.

Of the kept plotting libraries on PyPI that work without a network it has the least to put into a file, 1.3 MB: Plotly's
only bundle there has 4.5 MB, and Vega-Lite's comes in a wheel of 33 MB with a browser engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

#: Distinct for most kinds of colour vision (Okabe and Ito, 2008), as in the pictures of ``lbgym compare --out``.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#8c8c8c")
INK, FAINT = "#1b2330", "#667085"
_DASHES = ("solid", "dashed", "dotted")
#: Numbers of all lines of a page together, and of one at most.
_NUMBERS, _POINTS = 120_000, 400
_TIME = "time, s"
#: Characters of a name that leaves room for the plot beside it, and for one with a row of its own; and pixels of a plot
#: in a narrow window.
_SHORT_NAME, _LONGER_NAME, _NARROW = 14, 22, 330
#: More servers than this are shown by their least, median and largest.
MOST_SERVERS = 16


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of a page.

    Attributes:
        title: above it.
        text: how to read it, if that needs to be said.
        figure: drawn.
        wide: whether it has a row of its own.
    """

    title: str
    text: str
    figure: Figure
    wide: bool = False


def require_bokeh() -> None:
    """Refuse what needs Bokeh where it is missing.

    Raises:
        MissingExtraError: without it.
    """
    try:
        import bokeh  # noqa: F401
    except ImportError:
        raise MissingExtraError("bokeh", "report", "an HTML report") from None


def new_figure(**options: Any) -> Figure:
    """A figure as wide as its place; options are Bokeh's."""
    from bokeh.plotting import figure

    made = figure(
        sizing_mode="stretch_width",
        height=320,
        tools="pan,box_zoom,wheel_zoom,reset,save",
        toolbar_location="above",
        background_fill_color="#ffffff",
        border_fill_color=None,
        outline_line_color=None,
        **options,
    )
    made.toolbar.logo = None
    made.grid.grid_line_color = "#e3e7ed"
    for axis in made.axis:
        axis.axis_line_color = "#98a2b3"
        axis.major_tick_line_color = axis.minor_tick_line_color = "#98a2b3"
        axis.axis_label_text_font_style = "normal"
    return made


def finished(figure: Figure, *, wide: bool = False) -> Figure:
    """Legends beside the plot, or below it where names are long; their entries hide what they name.

    Args:
        figure: whose plot is drawn.
        wide: whether it has a row of its own.
    """
    if figure.legend:
        legend = figure.legend[0]
        items: list[Any] = list(legend.items)
        longest = max(len(item.label.value) for item in items)
        below = longest > (_LONGER_NAME if wide else _SHORT_NAME)
        figure.add_layout(legend, "below" if below else "right")
        legend.click_policy = "hide"
        legend.border_line_color = None
        legend.label_text_font_size = "12px"
        if below:
            # As many as a narrow window has room for.
            columns = max(1, _NARROW // (40 + 7 * longest))
            legend.orientation, legend.ncols, legend.location = "horizontal", columns, "top_left"
            figure.height = int(figure.height or 0) + 24 * -(-len(items) // columns)
    return figure


def style(k: int) -> dict[str, Any]:
    """Colour and dashes of the k-th line."""
    dash = _DASHES[k // len(COLOURS) % len(_DASHES)]
    return {"line_color": COLOURS[k % len(COLOURS)], "line_dash": dash, "line_width": 1.8}


def hover(tooltips: Sequence[tuple[str, str]], renderers: Sequence[Any]) -> Any:
    """What is shown of the point under the pointer."""
    from bokeh.models import HoverTool

    return HoverTool(tooltips=list(tooltips), renderers=list(renderers), point_policy="snap_to_data")


def every_of(rows: int, lines: int) -> int:
    """Rows of a time series per point of a plot, so that a page with so many lines stays small."""
    points = max(50, min(_POINTS, _NUMBERS // max(lines, 1)))
    return max(1, -(-rows // points))


def over_time(
    time: NDArray[Any], lines: Mapping[str, NDArray[Any]], label: str, every: int, *, steps: bool = False
) -> Figure:
    """Lines over time, each a mean over ``every`` rows.

    Args:
        time: seconds, float[T].
        lines: float[T] by name.
        label: of the vertical axis.
        every: rows per point.
        steps: values stay until the next: every so many-th is shown instead of a mean.
    """
    from bokeh.models import ColumnDataSource

    figure = new_figure(x_axis_label=_TIME, y_axis_label=label)
    values = {name: short(line[::every] if steps else thinned(line, every)) for name, line in lines.items()}
    source = ColumnDataSource({_TIME: short(time[::every]), **values})
    drawn: list[Any] = []
    for k, name in enumerate(lines):
        options: dict[str, Any] = {"source": source, "name": name, **style(k)}
        if len(lines) > 1:
            options["legend_label"] = name
        if steps:
            drawn.append(figure.step(_TIME, name, mode="after", **options))
        else:
            drawn.append(figure.line(_TIME, name, **options))
    figure.add_tools(hover((("", "$name"), ("time", f"@{{{_TIME}}} s"), ("", "@$name{0.[000]}")), drawn))
    return finished(figure)


def per_server(values: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """A line per server of float[T, N]; of many servers the least, the median and the largest value."""
    if values.shape[1] <= MOST_SERVERS:
        return dict(zip(names, values.T, strict=True))
    known = np.isfinite(values).any(axis=1)
    lines = {name: np.full(len(values), np.nan) for name in ("least", "median", "largest")}
    for line, q in zip(lines.values(), (0.0, 0.5, 1.0), strict=True):
        line[known] = np.nanquantile(values[known], q, axis=1)
    return lines


def thinned(values: NDArray[Any], every: int) -> NDArray[np.float64]:
    """Means of so many values each, of those that are finite; the last ones may be fewer."""
    starts = np.arange(0, len(values), every)
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0).astype(np.float64), starts)
    return np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def short(values: NDArray[Any]) -> NDArray[np.float32]:
    """Half the bytes; six digits are more than a plot shows."""
    return values.astype(np.float32)
