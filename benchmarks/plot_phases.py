"""Where the time of a save goes: a bar for each file system and number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = {
    "stage": "stage",
    "plan": "plan",
    "slot wait": "slot wait",
    "write dcp": "write DCP",
    "write hf": "write HF",
    "sync": "fsync",
    "finish": "finish",
}
"""Phases of a save as the manifest names them, in order, and as readers see them."""

_COLOURS = ("#d1383d", "#c9b458", "#dfe3e8", "#3b7ea1", "#0b6e4f", "#7fb7a4", "#7a5c99")
_REST = "#8892a0"


@dataclass(frozen=True, slots=True)
class Bar:
    """The phases of a save."""

    label: str
    seconds: dict[str, float]
    """Median seconds of each phase, of the rank that took longest."""
    total_s: float
    """Median seconds from the call until all files were durable."""

    @property
    def rest_s(self) -> float:
        """Seconds that no phase counts: torch's collectives, the last fsync, and the rename.

        Each phase is that of its slowest rank, so the phases may add up to more than the total.
        """
        return max(0.0, self.total_s - sum(self.seconds.values()))


def draw_phases(bars: list[Bar], machine: str, path: str) -> None:
    """Write one stacked bar for each of `bars` to `path`."""
    import matplotlib as mpl  # noqa: PLC0415 - a run that draws nothing does not need it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(9.5, 1.3 + 0.36 * len(bars)), layout="constrained")
    places = list(range(len(bars)))[::-1]
    left = [0.0] * len(bars)
    for (name, title), colour in zip(PHASES.items(), _COLOURS, strict=True):
        values = [bar.seconds[name] for bar in bars]
        axis.barh(places, values, left=left, color=colour, label=title, height=0.66)
        left = [a + b for a, b in zip(left, values, strict=True)]
    rest = [bar.rest_s for bar in bars]
    axis.barh(places, rest, left=left, color=_REST, label="rest", height=0.66)
    for place, bar in zip(places, bars, strict=True):
        end = max(bar.total_s, sum(bar.seconds.values()))
        axis.text(end, place, f"  {bar.total_s:.2f} s", va="center", fontsize=9)
    axis.set_yticks(places, [bar.label for bar in bars], fontsize=9)
    axis.set_xlim(right=1.1 * max(max(bar.total_s, sum(bar.seconds.values())) for bar in bars))
    axis.set_xlabel("seconds, medians; each phase is that of its slowest rank", fontsize=9)
    axis.legend(ncols=8, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.supxlabel(machine, fontsize=7, x=0.01, ha="left")
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
