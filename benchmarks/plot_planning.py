"""The figures of `planning.py` as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from planning import Sample

_COLOUR = {"deepseek": "#0b6e4f", "dense": "#7a869a"}
_TITLE = {
    "deepseek": "DeepSeek-V3, 64 x FSDP, {hf_tensors:,} HF tensors",
    "dense": "dense, {hf_tensors:,} HF tensors",
}
_BAR, _AIM = 0.1, 0.05


def draw(samples: Sequence[Sample], machine: str, path: str) -> None:
    """Write our seconds over the items of all ranks, and their ratio to torch's, to `path`.

    matplotlib is loaded here, so that a run without `--plot` does not need it.
    """
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
    for model in _COLOUR:
        found = [sample for sample in samples if sample.model == model]
        if found:
            _seconds(axes[0], found)
            _ratio(axes[1], found)
    _finish(axes[0], "ours, CPU s", "items of all ranks, millions")
    axes[0].set_xlim(left=0)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    _ranks_axis(axes[1], sorted({sample.ranks for sample in samples}))
    figure.suptitle(
        "What the export adds to global planning", fontsize=12, x=0.01, ha="left", weight="bold"
    )
    figure.supxlabel(f"Coordinator, one thread. {machine}", fontsize=7, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _seconds(axis: Axes, samples: Sequence[Sample]) -> None:
    import numpy as np  # noqa: PLC0415

    items = np.array([sample.items for sample in samples])
    seconds = np.array([sample.ours_s for sample in samples])
    label = _TITLE[samples[0].model].format(hf_tensors=samples[-1].hf_tensors)
    colour = _COLOUR[samples[0].model]
    if len(samples) > 2:
        slope, offset = np.polyfit(items, seconds, 1)
        label += f"\n{offset:.2f} s + {slope * 1e6:.2f} µs an item"
        ends = np.array([0, items.max()])
        axis.plot(ends / 1e6, offset + slope * ends, color=colour, lw=1, ls="--", zorder=2)
    axis.plot(items / 1e6, seconds, "o", color=colour, ms=5, label=label, zorder=3)


def _ratio(axis: Axes, samples: Sequence[Sample]) -> None:
    ranks = [sample.ranks for sample in samples]
    colour = _COLOUR[samples[0].model]
    axis.plot(ranks, [100 * sample.ratio for sample in samples], "o-", color=colour, ms=5, zorder=3)
    rest = [100 * s.ours_s / (s.torch_s - s.validate_s) for s in samples]
    axis.plot(ranks, rest, "o--", color=colour, ms=4, mfc="white", lw=1, zorder=2)


def _ranks_axis(axis: Axes, ranks: Sequence[int]) -> None:
    _finish(axis, "ours as a part of torch's planning, %", "ranks")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ranks, [f"{count:,}" for count in ranks])
    axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
    for value, name in ((_BAR, "bar"), (_AIM, "aim")):
        axis.axhline(100 * value, color="#c9b458", lw=1.2, zorder=1)
        axis.annotate(
            f"{name} {value:.0%}",
            (1.01, 100 * value),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color="#8a7a2a",
        )
    axis.annotate(
        "dashed: torch without its check for overlaps",
        (0.02, 0.03),
        xycoords="axes fraction",
        fontsize=8,
        color="#555555",
    )


def _finish(axis: Axes, title: str, below: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(below, fontsize=9)
    axis.grid(color="#dddddd", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
