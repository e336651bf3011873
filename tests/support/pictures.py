"""The drawings of the documentation, made from source: `python tests/support/pictures.py`.

A test compares the files with what this module makes. The pictures of specs are drawn from the
functions below, run on tensors that hold the numbers of their own elements. The tests of the page
check that its specs mean the same as these functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

DOCS = Path(__file__).parents[2] / "docs"
INK, MUTED, PAPER, EDGE = "#20262d", "#59636e", "#ffffff", "#b6bfca"
COLOURS = ("#b9dfd0", "#f3d9a4", "#c5d3ee", "#eec3bf")
FONT = 'font-family="system-ui, sans-serif"'
CELL, GAP = 28, 34

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """A runtime tensor, and what the hub has of it."""

    fqn: str
    shape: tuple[int, ...]
    to_hub: Callable[[Tensors], Tensors]


EXAMPLES: Mapping[str, Example] = {
    "renamed": Example("tok.weight", (3, 4), lambda t: {"embed.weight": t["tok.weight"]}),
    "fused": Example(
        "qkv",
        (6, 4),
        lambda t: {
            "q.weight": t["qkv"][:4],
            "k.weight": t["qkv"][4:5],
            "v.weight": t["qkv"][5:],
        },
    ),
    "padded": Example("head", (4, 3), lambda t: {"lm_head.weight": t["head"][:3]}),
    "stacked": Example(
        "experts", (2, 3, 2), lambda t: {f"experts.{e}.weight": t["experts"][e] for e in range(2)}
    ),
    "interleaved": Example(
        "gate_up",
        (3, 4),
        lambda t: {"gate.weight": t["gate_up"][:, ::2].T, "up.weight": t["gate_up"][:, 1::2].T},
    ),
}


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    """Return a whole picture on white paper, which reads on dark pages too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" {FONT}>'
    )
    paper = f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{PAPER}"/>'
    return "\n".join([head, f"<title>{title}</title>", paper, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, *, size: float = 13, more: str = "") -> str:
    """Return a line of text that begins at a point, or as `more` says."""
    fill = "" if "fill=" in more else f' fill="{INK}"'
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}"{fill} {more}>{words}</text>'


def box(  # noqa: PLR0917 - the order is that of SVG
    x: float, y: float, width: float, height: float, fill: str, more: str = ""
) -> str:
    """Return a rectangle with an edge."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
        f'stroke="{EDGE}" {more}/>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = MUTED) -> str:
    """Return an arrow between two points."""
    angle = math.atan2(y2 - y1, x2 - x1)
    head = " ".join(
        f"{x2 - 9 * math.cos(angle + turn):.1f},{y2 - 9 * math.sin(angle + turn):.1f}"
        for turn in (-0.42, 0.42)
    )
    x3, y3 = x2 - 6 * math.cos(angle), y2 - 6 * math.sin(angle)
    line = f'<path d="M{x1:g} {y1:g} L{x3:.1f} {y3:.1f}" stroke="{colour}" stroke-width="1.6"/>'
    return f'{line}<polygon points="{x2:g},{y2:g} {head}" fill="{colour}"/>'


def grid(x: float, y: float, numbers: torch.Tensor, colour_of: Mapping[int, str]) -> Iterator[str]:
    """Draw a matrix of numbers as cells."""
    for i, row in enumerate(numbers.tolist()):
        for j, number in enumerate(row):
            left, top = x + j * CELL, y + i * CELL
            yield box(left, top, CELL, CELL, colour_of.get(number, PAPER))
            yield text(
                left + CELL / 2,
                top + CELL / 2 + 4,
                str(number),
                size=11.5,
                more='text-anchor="middle"',
            )


def draw_example(name: str) -> str:
    """Draw one example: the runtime tensor at the left, the tensors of the hub at the right."""
    example = EXAMPLES[name]
    runtime = torch.arange(math.prod(example.shape)).reshape(example.shape)
    hub = example.to_hub({example.fqn: runtime})
    colours = dict(zip(hub, COLOURS, strict=False))
    colour_of = {n: colours[key] for key, value in hub.items() for n in value.flatten().tolist()}
    layers = list(runtime) if runtime.ndim == 3 else [runtime]
    parts = [text(24, 28, example.fqn, more='font-weight="600"')]
    shape = "(" + ", ".join(map(str, example.shape)) + ")"
    parts.append(text(24, 46, f"runtime, {shape}", size=11.5, more=f'fill="{MUTED}"'))
    y = 60.0
    for layer in layers:
        parts += grid(24, y, layer, colour_of)
        y += CELL * len(layer) + 12
    left_width = CELL * layers[0].shape[1]
    x, bottom = 24 + left_width + 90, y
    parts.append(arrow(x - 70, 60 + (y - 72) / 2, x - 20, 60 + (y - 72) / 2))
    for key, value in hub.items():
        parts.append(text(x, 28, key, more='font-weight="600"'))
        size = f"hub, ({', '.join(map(str, value.shape))})"
        parts.append(text(x, 46, size, size=11.5, more=f'fill="{MUTED}"'))
        parts += grid(x, 60, value, colour_of)
        bottom = max(bottom, 60 + CELL * len(value) + 12)
        x += max(CELL * value.shape[1], 8.0 * len(key)) + GAP
    return svg(x, bottom + 8, f"How {example.fqn} maps to tensors of the hub", parts)


def draw_data_flow() -> str:
    """Draw where the bytes of a save go: from the shards of two ranks to one directory."""
    width, height = 900, 452
    green, blue = COLOURS[0], COLOURS[2]
    parts = [
        text(24, 34, "training thread", size=12, more=f'fill="{MUTED}" font-weight="600"'),
        text(348, 34, "in the background", size=12, more=f'fill="{MUTED}" font-weight="600"'),
        f'<path d="M328 20 V{height - 88}" stroke="{EDGE}" stroke-dasharray="4 5"/>',
    ]
    for rank, (top, colour) in enumerate(((56, green), (218, blue))):
        parts += [
            box(24, top, 124, 108, colour, 'rx="6"'),
            text(36, top + 24, f"rank {rank}", more='font-weight="600"'),
            text(36, top + 46, "its shards of", size=12),
            text(36, top + 63, "weights and", size=12),
            text(36, top + 80, "optimizer", size=12),
            arrow(150, top + 54, 204, top + 54),
            text(154, top + 44, "copy", size=11.5, more=f'fill="{MUTED}"'),
            box(206, top, 104, 108, colour, 'rx="6"'),
            text(218, top + 24, "slab", more='font-weight="600"'),
            text(218, top + 46, "reused", size=12),
            text(218, top + 63, "host memory", size=12),
        ]
    parts += [
        box(458, 50, 288, 290, "#f6f8fa", 'rx="6"'),
        text(472, 72, ".incomplete-&lt;save id&gt;/", size=12.5, more='font-family="monospace"'),
    ]
    for rank, (top, colour) in enumerate(((84, green), (246, blue))):
        parts += [
            box(472, top, 262, 34, colour, 'rx="4"'),
            text(484, top + 22, f"__{rank}_0.distcp", size=12.5, more='font-family="monospace"'),
            arrow(312, top + 17, 470, top + 17),
        ]
    parts.append(text(472, 138, "hf/", size=12.5, more='font-family="monospace"'))
    spans = ((56, green), (50, blue), (80, green), (76, blue))
    for number, top in enumerate((146, 190)):
        x = 472.0
        for length, colour in spans if number == 0 else spans[::-1]:
            parts.append(box(x, top, length, 30, colour))
            x += length
        name = f"model-0000{number + 1}-of-00002.safetensors"
        parts.append(text(480, top + 20, name, size=11.5, more='font-family="monospace"'))
    parts += [
        arrow(312, 128, 470, 156),
        arrow(312, 152, 470, 200),
        arrow(312, 234, 470, 168),
        arrow(312, 252, 470, 212),
        text(472, 304, ".metadata, dcp-hf.json, index,", size=12),
        text(472, 322, "config, tokenizer: the coordinator", size=12),
        arrow(750, 195, 806, 195, INK),
        text(751, 184, "rename", size=12, more='font-weight="600"'),
        box(808, 150, 76, 90, COLOURS[1], 'rx="6"'),
        text(820, 190, "ckpt/", size=12.5, more='font-family="monospace"'),
        text(820, 208, "step-100", size=12, more='font-family="monospace"'),
    ]
    steps = (
        (24, "stage", "the only time in which", "training waits"),
        (348, "plan, write", "each rank its own bytes; no rank", "gathers a tensor"),
        (
            640,
            "finish",
            "all bytes proved, all files fsynced,",
            "then one rename publishes both halves",
        ),
    )
    for x, title, first, second in steps:
        parts += [
            text(x, height - 58, title, more='font-weight="600"'),
            text(x, height - 38, first, size=12, more=f'fill="{MUTED}"'),
            text(x, height - 21, second, size=12, more=f'fill="{MUTED}"'),
        ]
    return svg(width, height, "The bytes of a save, from two ranks to one directory", parts)


def pictures() -> dict[str, str]:
    """Return the text of each picture, by file name."""
    specs = {f"spec-{name}.svg": draw_example(name) for name in EXAMPLES}
    return {"data-flow.svg": draw_data_flow(), **specs}


if __name__ == "__main__":
    for name, drawing in pictures().items():
        (DOCS / name).write_text(drawing)
