"""The figures of one benchmark run as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from report import Result, median

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _PEER, _FLOOR = "#0b6e4f", "#7a869a", "#c9b458"


def draw(results: list[Result], title: str, machine: str, path: str) -> None:
    """Write bars of stall, total and extra memory, with a dot for each round, to `path`.

    matplotlib is loaded here, so that a run without `--plot` does not need it.
    """
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    with_memory = any(r.memory and r.memory.peak for r in results)
    panels = 3 if with_memory else 2
    figure, axes = plt.subplots(
        1, panels, figsize=(4.6 * panels, 1.6 + 0.62 * len(results)), layout="constrained"
    )
    _panel(axes[0], results, [r.stall_s for r in results], "training blocked, s")
    _panel(axes[1], results, [r.total_s for r in results], "until durable, s")
    if with_memory:
        gib = [[(r.memory.peak - r.memory.base) / 2**30] if r.memory else [] for r in results]
        _panel(axes[2], results, gib, "extra memory of a rank at its peak, GiB")
    for axis in axes[1:]:
        axis.set_yticklabels([])
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", weight="bold")
    figure.supxlabel(f"Bars: medians; dots: rounds. {machine}", fontsize=7, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _limit(medians: list[float], samples: list[float]) -> float:
    """End of the axis: the slowest contender may run out of it, lest it squash all others."""
    *_, second, slowest = [0.001, 0.001, *sorted(medians)]
    return 2 * second if slowest > 3 * second else 1.18 * max([slowest, *samples])


def _panel(axis: Axes, results: list[Result], samples: list[list[float]], title: str) -> None:
    places = list(range(len(results)))[::-1]
    colours = [{"ours": _OURS, "floor": _FLOOR}.get(r.name, _PEER) for r in results]
    medians = [median(values) if values else 0.0 for values in samples]
    limit = _limit(medians, [v for values in samples for v in values])
    axis.set_xlim(0, limit)
    axis.barh(places, medians, color=colours, height=0.62, zorder=2)
    for place, values, middle in zip(places, samples, medians, strict=True):
        if len(values) > 1:
            axis.plot(values, [place] * len(values), "o", ms=3, color="black", alpha=0.45, zorder=3)
        text = f"{middle:.2f}" if values else "n/a"
        cut = middle > 0.86 * limit
        if middle > limit:
            text += " →"
        axis.annotate(
            text,
            (limit if cut else middle, place),
            # Above the dots, which lie on the middle line.
            xytext=(-4, 0) if cut else (4, 8),
            textcoords="offset points",
            ha="right" if cut else "left",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"} if cut else None,
            zorder=4,
        )
    axis.set_yticks(places, [f"{r.title}\n({r.formats})" for r in results], fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(axis="x", color="#dddddd", zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
