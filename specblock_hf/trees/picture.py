# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Pictures of draft trees: a colour for each drafter forward, the accepted path marked, several trees side by side. They
need matplotlib, which the extra `plots` installs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .tree import FOUND, Decoder, DraftTree, children_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes


FORMATS = (".svg", ".png")
COLOURS = (
    "#8ecae6",
    "#ffb703",
    "#b5e48c",
    "#f4978e",
    "#cdb4db",
    "#a8dadc",
    "#e9c46a",
    "#bde0fe",
    "#d0d1b8",
    "#ffafcc",
)
"""Of drafter forwards 0, 1, ...; then they begin again."""

FOUND_COLOUR, ROOT_COLOUR, KEPT_COLOUR = "#dddddd", "#ffffff", "#2d6a4f"
WIDTH_OF_A_LEVEL, HEIGHT_OF_A_LEAF = 1.25, 0.42  # inches
LONGEST_TEXT = 16  # characters that fit between two levels


@dataclass(frozen=True)
class TreePanel:
    """
    One tree of a picture.

    Args:
        title (`str`): What stands above it.
        tree ([`DraftTree`]): The tree.
        accepted (sequence of `int`, *optional*, defaults to `()`): Nodes on the accepted path, the root counted.
        row (`int`, *optional*, defaults to 0): Which tree of the batch.
    """

    title: str
    tree: DraftTree
    accepted: Sequence[int] = ()
    row: int = 0


def place_nodes(parents: Sequence[int], log_probs: Sequence[float]) -> dict[int, tuple[int, int]]:
    """
    Where the nodes of a tree go: the depth to the right, a line for each leaf. A node stands on the line of its
    likeliest child, so that the likeliest path is straight, and less likely children stand below.

    Args:
        parents (sequence of `int`): As in [`DraftTree`], of one row.
        log_probs (sequence of `float`): Likewise.

    Returns:
        `dict[int, tuple[int, int]]`: (depth, line) of every node that is not padding.
    """
    children = children_of(parents)
    places: dict[int, tuple[int, int]] = {}
    stack, lines = [(0, 0, True)], 0
    while stack:
        node, depth, on_line = stack.pop()
        lines += not on_line
        places[node] = (depth, lines)
        likeliest_last = sorted(children[node], key=log_probs.__getitem__)
        stack += [(child, depth + 1, child == likeliest_last[-1]) for child in likeliest_last]
    return places


def draw_tree(axes: Axes, panel: TreePanel, tokenizer: Decoder) -> None:
    """
    Draw one tree.

    Args:
        axes (`matplotlib.axes.Axes`): To draw on.
        panel ([`TreePanel`]): What to draw.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes one token at a time.
    """
    from matplotlib.patches import Patch

    tree, row = panel.tree, panel.row
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    forwards = [forward for forward, _ in tree.origin[row].tolist()]
    places = place_nodes(parents, tree.log_probs[row].tolist())
    kept = set(panel.accepted)
    for node, (depth, line) in places.items():
        marked = node in kept
        if node:
            x, y = places[parents[node]]
            # Down along the parent's column, then to the right: lines of siblings share a stem.
            axes.plot(
                [x, x, depth],
                [y, line, line],
                color=KEPT_COLOUR if marked else "#999999",
                linewidth=2.5 if marked else 0.8,
                zorder=1 + marked,
            )
        box = {
            "boxstyle": "round,pad=0.25",
            "facecolor": _colour(forwards[node]),
            "edgecolor": KEPT_COLOUR if marked else "#666666",
            "linewidth": 2.2 if marked else 0.6,
        }
        # A token may be a dollar sign, which would begin a formula.
        text = _short(tokenizer.decode([tokens[node]]))
        axes.text(depth, line, text, ha="center", va="center", size=8, zorder=3, bbox=box, parse_math=False)
    axes.set_xlim(-0.6, max(depth for depth, _ in places.values()) + 0.6)
    axes.set_ylim(max(line for _, line in places.values()) + 0.8, -0.8)
    axes.axis("off")
    axes.set_title(f"{panel.title}\n{len(places) - 1} drafted, {max(len(kept) - 1, 0)} accepted", size=10)
    numbers = sorted({forwards[node] for node in places if node})
    names = {number: "found in the text" if number == FOUND else f"drafter forward {number}" for number in numbers}
    patches = [Patch(facecolor=_colour(forward), edgecolor="#666666", label=name) for forward, name in names.items()]
    patches.append(Patch(facecolor="white", edgecolor=KEPT_COLOUR, linewidth=2.2, label="kept by the target"))
    axes.legend(handles=patches, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)


def save_trees(path: str | Path, panels: Sequence[TreePanel], tokenizer: Decoder) -> None:
    """
    Write one picture with all trees side by side.

    Args:
        path (`str` or `Path`): Ends in `.svg` or `.png`; its folder is made if absent.
        panels (sequence of [`TreePanel`]): From left to right.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes one token at a time.

    Raises:
        ValueError: The file's name ends in something else.
        ImportError: matplotlib is not installed.
    """
    path = check_format(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sizes = [
        [1 + max(place[axis] for place in places.values()) for axis in (0, 1)]
        for places in (place_nodes(p.tree.parents[p.row].tolist(), p.tree.log_probs[p.row].tolist()) for p in panels)
    ]
    widths = [max(4.0, WIDTH_OF_A_LEVEL * levels) for levels, _ in sizes]
    height = 1.6 + HEIGHT_OF_A_LEAF * max(lines for _, lines in sizes)
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    # One scale for all: the first line of every tree is as high as that of the largest.
    columns = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, panel in zip(columns, panels, strict=True):
        draw_tree(axes, panel, tokenizer)
        axes.set_ylim(max(lines for _, lines in sizes) - 0.2, -0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text stays text in an SVG, to be searched and copied; without a date the same tree gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tree"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def check_format(path: str | Path) -> Path:
    """
    Raises:
        ValueError: Trees are not drawn in the format that the file's name ends in.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} is neither an SVG nor a PNG file; end its name in {' or '.join(FORMATS)}.")
    return path


def _colour(forward: int) -> str:
    if forward < 0:
        return FOUND_COLOUR if forward == FOUND else ROOT_COLOUR
    return COLOURS[forward % len(COLOURS)]


def _short(text: str) -> str:
    """A token's text with its spaces and line ends visible, its end cut off if it is long."""
    shown = repr(text)[1:-1].replace(" ", "\u2423")
    return shown if len(shown) <= LONGEST_TEXT else f"{shown[: LONGEST_TEXT - 1]}…"
