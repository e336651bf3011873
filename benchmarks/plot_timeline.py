"""What happened when in a training loop, and its picture: a lane for training, one for saves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Span = tuple[float, float]

_STEP, _STALL, _OURS, _PEER, _INK = "#cfd8e3", "#d1383d", "#0b6e4f", "#8892a0", "#20262d"
_TRAINING, _SAVING, _HEIGHT = 0.62, 0.0, 0.44
_LABELLED = 0.035
"""A save gets a label if it takes at least this part of the picture's width."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one loop did, in seconds since it began."""

    steps: list[Span]
    """Begin and end of each training step."""
    stalls: list[Span]
    """Begin and end of each time in which training waited for a save."""
    saves: list[Span]
    """From the call of a save until its files were complete."""
    loop_s: float
    """When the loop was over."""

    @property
    def waited_s(self) -> float:
        """How long training waited for all saves together."""
        return sum(end - begin for begin, end in self.stalls)

    def facts(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self)


@dataclass(slots=True)
class Timeline:
    """What one rank did, in seconds since its loop began."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each training step."""
    stalls: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each time in which training waited for a save."""
    saves: list[tuple[float, float]] = field(default_factory=list)
    """From the first call of a save until all of its files were complete."""
    loop_s: float = 0.0
    """When the last step, or the stall after it, was over."""
    nbytes: int = 0
    """Bytes of the state dict on this rank."""


def merged(timelines: list[Timeline]) -> Drawn:
    """Take the steps of rank 0, and of each stall and each save the slowest rank."""
    first = timelines[0]
    slowest = [
        [(min(a for a, _ in same), max(b for _, b in same)) for same in zip(*lists, strict=True)]
        for lists in ([t.stalls for t in timelines], [t.saves for t in timelines])
    ]
    return Drawn(first.steps, *slowest, max(t.loop_s for t in timelines))


def draw(ways: dict[str, Drawn], title: str, machine: str, said: str, path: str) -> None:
    """Write one row for each way to save to `path`; all rows have the same axis.

    Args:
        ways: What was measured, by the title of its row; one of them has no saves. A title that
            names HFDualWriter gets the colour of this package.
        title: Headline of the picture.
        machine: Where it was measured.
        said: How many rounds were measured, and how busy the machine was.
        path: Picture to write.
    """
    import matplotlib as mpl  # noqa: PLC0415 - a run without `--plot` does not need it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    end = max(
        [one.loop_s for one in ways.values()] + [b for w in ways.values() for _, b in w.saves]
    )
    shown = {title: one for title, one in ways.items() if one.saves}
    (plain,) = (one for one in ways.values() if not one.saves)
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(11, 1.25 * len(shown) + 1.25), sharex=True, layout="constrained"
    )
    for axis, (way, one) in zip(axes, shown.items(), strict=True):
        _row(axis, way, one, plain.loop_s, end)
        axis.set_xlim(0, 1.16 * end)
    axes[-1].set_xlabel("seconds", fontsize=9, color=_INK)
    axes[-1].tick_params(axis="x", labelsize=9, length=3)
    _legend(axes[0])
    figure.suptitle(
        title,
        fontsize=12.5,
        x=0.01,
        ha="left",
        weight="bold",
        color=_INK,
    )
    figure.supxlabel(
        f"Measured: two gloo ranks, {said}. Dotted line: the loop without saves. {machine}",
        fontsize=7,
        x=0.01,
        ha="left",
        color="#59636e",
    )
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _row(axis: Axes, title: str, one: Drawn, plain_s: float, end_s: float) -> None:
    is_ours = "HFDualWriter" in title
    for begin, end in one.steps:
        shown = end - begin - 0.0015 * end_s
        axis.barh(_TRAINING, shown, left=begin, height=_HEIGHT, color=_STEP)
    for begin, end in one.stalls:
        # At least as wide as can be seen.
        shown = max(end - begin, 0.002 * end_s)
        axis.barh(_TRAINING, shown, left=begin, height=_HEIGHT, color=_STALL)
    colour = _OURS if is_ours else _PEER
    for begin, end in one.saves:
        shown = end - begin - 0.0015 * end_s
        axis.barh(_SAVING, shown, left=begin, height=_HEIGHT, color=colour)
        if end - begin < _LABELLED * end_s:
            continue
        axis.text(
            (begin + end) / 2,
            _SAVING,
            f"{end - begin:.1f} s",
            ha="center",
            va="center",
            fontsize=8.5,
            color="white",
        )
    axis.axvline(plain_s, color=_INK, lw=1, ls=":")
    axis.text(
        # A stall may come after the loop, for the second of two saves.
        max(one.loop_s, *(end for _, end in one.stalls), 0.0) + 0.012 * end_s,
        _TRAINING,
        f"waited {one.waited_s:.2f} s",
        va="center",
        fontsize=9.5,
        weight="bold",
        color=_STALL,
    )
    axis.set_ylim(_SAVING - 0.35, _TRAINING + 0.35)
    axis.set_yticks([_TRAINING, _SAVING], ["training", "saving"], fontsize=9, color=_INK)
    axis.set_title(
        title.replace("\n", " "),
        fontsize=10,
        loc="left",
        color=_INK,
        weight="bold" if is_ours else None,
    )
    axis.tick_params(axis="both", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _legend(axis: Axes) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415 - as above

    kinds = {
        "training step": _STEP,
        "training waits": _STALL,
        "save in the background": _PEER,
        "the same, by HFDualWriter": _OURS,
    }
    axis.legend(
        handles=[Patch(color=colour, label=label) for label, colour in kinds.items()],
        loc="lower right",
        bbox_to_anchor=(1, 1.0),
        ncols=4,
        fontsize=8.5,
        frameon=False,
    )
