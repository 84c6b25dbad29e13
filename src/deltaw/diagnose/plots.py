"""Pictures of a diagnosis: the loss, the spectra by kind of place, update against weight by layer.

Each is a matplotlib figure. Ink is one colour, so that a report can swap it for the page's own.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from deltaw.diagnose.diagnose import Diagnosis
from deltaw.diagnose.findings import FLAT
from deltaw.diagnose.sites import SiteRow

INK = "#1b2330"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c7ae6", "#7f8c8d")
"""Okabe and Ito's, which stay apart for colour-blind eyes, and two more."""
SETTINGS = {
    "svg.hashsalt": "deltaw", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip
MOST_ROLES = len(COLOURS)


def pictures(found: Diagnosis) -> dict[str, Callable[[], Any]]:
    """What can be drawn of `found`, by name: a function that makes the figure."""
    ready: dict[str, Callable[[], Any]] = {}
    if found.log is not None and len(found.log.steps) > 1:
        ready["loss"] = lambda: _loss(found)
    if any(r.spectrum is not None and r.spectrum.norm > 0 and r.spectrum.given > 1 for r in found.rows):
        ready["spectra"] = lambda: _spectra(found)
    if any(r.ratio for r in found.rows):
        ready["norms"] = lambda: _grid(found, lambda r: r.ratio, "Update norm over weight norm, |dW| / |W|", True)
    if any((r.rank or 0) > 1 and _used(r) for r in found.rows):
        title = "Rank in use: values that hold 99 % of the update's energy, over the rank given"
        ready["ranks"] = lambda: _grid(found, _used, title, False)
    return ready


def drawn(make: Callable[[], Any], kind: str, transparent: bool = False) -> bytes:
    """A picture as "png" or "svg"; transparent for a page that brings its own background."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        figure = make()
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(out, format=kind, dpi=150, transparent=transparent, metadata=metadata, bbox_inches="tight")
    return out.getvalue()


def _figure(width: float, height: float, **layout: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**layout)


def _loss(found: Diagnosis) -> Any:
    assert found.log is not None
    steps = found.log.steps
    x = [s.step for s in steps]
    figure, (axis, below) = _figure(7.2, 4.4, nrows=2, sharex=True, height_ratios=[4, 1])
    axis.plot(x, [s.loss for s in steps], ".", color=COLOURS[0], alpha=0.35, label="training, each step")
    if found.curve is not None:
        n = len(found.curve.means)
        cuts = [round(i * len(x) / n) for i in range(n + 1)]
        middles = [statistics.fmean(x[a:b]) for a, b in pairwise(cuts)]
        axis.plot(middles, found.curve.means, "-", color=COLOURS[0], label="training, mean of an eighth of the steps")
        if found.curve.plateau_step is not None:
            axis.axvline(found.curve.plateau_step, color=INK, linestyle=":", linewidth=1)
            axis.annotate(
                "plateau from here", (found.curve.plateau_step, 0.97), xycoords=("data", "axes fraction"),
                xytext=(4, 0), textcoords="offset points", va="top", fontsize=9,
            )  # fmt: skip
    evals = [(e.step, e.loss) for e in found.log.evals if e.loss is not None]
    if evals:
        axis.plot(*zip(*evals, strict=True), "D-", color=COLOURS[1], label="validation rows")
    axis.set_ylabel("loss (nats a target token)")
    axis.set_title("Loss over the run")
    values = [s.loss for s in steps if math.isfinite(s.loss) and s.loss > 0]
    if values and max(values) > 20 * min(statistics.median(values), max(values)):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.legend(loc="best", fontsize=9)
    below.plot(x, [s.lr for s in steps], color=COLOURS[2])
    below.set_ylabel("learning\nrate")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    below.set_xlabel("optimizer step")
    return figure


def _roles(rows: list[SiteRow]) -> list[str]:
    return list(dict.fromkeys(r.role for r in rows))


def _spectra(found: Diagnosis) -> Any:
    rows = [r for r in found.rows if r.spectrum is not None and r.spectrum.norm > 0]
    figure, axis = _figure(7.2, 3.8)
    for role, colour in zip(_roles(rows)[:MOST_ROLES], COLOURS, strict=False):
        lines = [r.spectrum.values for r in rows if r.role == role and r.spectrum is not None]
        length = min(256, max(map(len, lines)))
        at = [[v[i] / v[0] for v in lines if i < len(v) and v[i] > 0] for i in range(length)]
        known = [(i + 1, statistics.median(v)) for i, v in enumerate(at) if v]
        count = f" ({len(lines)})" if len(lines) > 1 else ""
        axis.plot(*zip(*known, strict=True), "o-", markersize=3, color=colour, label=role + count)
    axis.set_yscale("log")
    axis.axhline(FLAT, color=INK, linestyle=":", linewidth=1, label="flat, if it\nends above")
    axis.set_title("Singular values of the update, median over the places of a kind")
    axis.set_xlabel("singular value, the largest first")
    axis.set_ylabel("share of the largest")
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, title="kind (places)")
    return figure


def _used(row: SiteRow) -> float | None:
    if row.spectrum is None or row.rank is None:
        return None
    return row.spectrum.rank_99 / row.spectrum.given


def _grid(found: Diagnosis, value: Callable[[SiteRow], float | None], title: str, log: bool) -> Any:
    """Layers by kinds of place as a map of colours."""
    from matplotlib.colors import LogNorm, Normalize

    rows = [r for r in found.rows if value(r) is not None]
    roles = _roles(rows)
    layers = sorted({r.layer for r in rows if r.layer is not None}) or [0]
    where = {n: i for i, n in enumerate(layers)}
    cells = [[math.nan] * len(layers) for _ in roles]
    for r in rows:
        cells[roles.index(r.role)][where.get(r.layer if r.layer is not None else layers[0], 0)] = value(r) or math.nan
    known = [v for line in cells for v in line if v == v]
    figure, axis = _figure(7.2, 1.3 + 0.28 * len(roles))
    low, high = min(known), max(known)
    norm = LogNorm(low, max(high, low * 1.01)) if log else Normalize(0, 1)
    image = axis.imshow(cells, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(roles)), roles)
    every = max(1, math.ceil(len(layers) / 16))
    axis.set_xticks(range(0, len(layers), every), [str(n) for n in layers[::every]])
    axis.set_xlabel("layer")
    axis.set_title(title)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure
