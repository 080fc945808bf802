"""Can a figure be read? No text over another text or over a mark, no mark outside its panel, and nothing outside the canvas."""
import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def texts_of(figure):
    """The texts that are drawn, with their boxes in pixels; tick labels only of ticks inside the axes' limits."""
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not (low - slack <= tick.get_loc() <= high + slack and axis.get_visible()):
                    hidden |= {id(tick.label1), id(tick.label2)}
                hidden |= {id(label) for label, shown in ((tick.label1, tick.label1.get_visible()),
                                                          (tick.label2, tick.label2.get_visible())) if not shown}
    renderer = figure._get_renderer()
    return [(text, text.get_window_extent(renderer)) for text in figure.findobj(Text)
            if text.get_text().strip() and text.get_visible() and id(text) not in hidden]


def marks_of(figure):
    """(axes, box or path) of every marker, dot and line that shows data, in pixels."""
    points = figure.dpi / 72
    for axes in figure.axes:
        for line in axes.lines:
            if line.get_transform() != axes.transData or not line.get_visible():
                continue
            places = axes.transData.transform(line.get_xydata())
            places = places[np.isfinite(places).all(axis=1)]
            if line.get_linestyle() != "None" and len(places) > 1:
                yield axes, Path(places)
            if line.get_marker() not in ("None", "", None):
                half = line.get_markersize() * points / 2
                yield from ((axes, Bbox([place - half, place + half])) for place in places)
        for dots in axes.collections:
            if isinstance(dots, PathCollection):
                half = np.sqrt(dots.get_sizes().max()) * points / 2 if len(dots.get_sizes()) else 0
                yield from ((axes, Bbox([place - half, place + half]))
                            for place in axes.transData.transform(dots.get_offsets()))


def overlaps(figure, slack=1.0):
    """What cannot be read, in words; boxes may touch by `slack` pixels."""
    found, texts = [], [(text.get_text(), box.padded(-slack)) for text, box in texts_of(figure)]
    for place, (name, box) in enumerate(texts):
        found += [f"{name!r} lies over {other!r}" for other, against in texts[:place] if box.overlaps(against)]
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1:
            found.append(f"{name!r} leaves the canvas")
    shown = {axes: [(name, seen) for name, box in texts if (seen := Bbox.intersection(box, axes.get_window_extent()))
                    is not None and seen.width > 0 and seen.height > 0] for axes in figure.axes}
    for axes, mark in marks_of(figure):
        inside = axes.get_window_extent()
        if isinstance(mark, Bbox) and not mark.overlaps(inside):
            found.append("a mark lies outside its panel")
        for name, seen in shown[axes]:
            if mark.overlaps(seen) if isinstance(mark, Bbox) else mark.intersects_bbox(seen, filled=False):
                found.append(f"{name!r} lies over a mark")
        if isinstance(mark, Bbox) and inside.padded(2).contains(*np.mean([mark.p0, mark.p1], axis=0)):
            if not (figure.bbox.x0 <= mark.x0 and mark.x1 <= figure.bbox.x1 and figure.bbox.y0 <= mark.y0
                    and mark.y1 <= figure.bbox.y1):
                found.append("a mark leaves the canvas")
    return list(dict.fromkeys(found))


def assert_no_overlaps(figure):
    """AssertionError that names each text of the figure which lies over another, over a mark, or off the canvas."""
    assert not (found := overlaps(figure)), found
