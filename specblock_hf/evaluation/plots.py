# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a benchmark's figures. They need matplotlib, which the extra `plots` installs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .methods import PLAIN, in_words


if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito's, which people tell apart however they see colours (https://jfly.uni-koeln.de/color)."""

PLAIN_COLOUR = "#999999"

MARKERS = "osD^vPX*"

SUITE_NAMES = {"humaneval": "HumanEval", "mtbench": "MT-Bench", "gsm8k": "GSM8K", "mean": "mean of the suites"}


def require_matplotlib() -> None:
    """
    Raises:
        ImportError: It is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib, which is not installed; run `pip install specblock_hf[plots]`.")


def draw_benchmark(summary: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """
    Write `tokens.png`, `speedup.png`, `round.png` and `acceptance.png` with a panel for each temperature.

    Args:
        summary (mapping): From [`summarise`].
        folder (`str` or `Path`): An existing folder.

    Returns:
        `list[Path]`: What was written; rounds are left out where no method has any.

    Raises:
        ImportError: matplotlib is not installed.
    """
    temperatures = summary["temperatures"]
    pictures: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {"tokens": draw_tokens, "speedup": draw_speedup}
    if any(method["round"] for figures in temperatures for method in figures["methods"]):
        pictures |= {"round": draw_rounds, "acceptance": draw_acceptance}
    return [_draw(Path(folder) / f"{name}.png", temperatures, draw) for name, draw in pictures.items()]


def _draw(path: Path, temperatures: list[Mapping[str, Any]], draw: Callable[[Axes, Mapping[str, Any]], None]) -> Path:
    require_matplotlib()
    # A figure of its own instead of pyplot, whose figures are global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5 * len(temperatures)), layout="constrained")
    for axes, figures in zip(figure.subplots(len(temperatures), squeeze=False)[:, 0], temperatures, strict=True):
        how = "greedy" if figures["temperature"] == 0 else f"sampled at temperature {figures['temperature']:g}"
        axes.set_title(how, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, figures)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=120)
    return path


def styles(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How each method's bars look in all pictures: a colour, and a hatch where the colours are used up."""
    names = [method["method"] for method in figures["methods"] if method["method"] != PLAIN]
    found: dict[str, dict[str, Any]] = {PLAIN: {"color": PLAIN_COLOUR}}
    for number, name in enumerate(names):
        again, place = divmod(number, len(COLOURS))
        found[name] = {"color": COLOURS[place], "hatch": "//" * again, "edgecolor": "white"}
    return found


def draw_tokens(axes: Axes, figures: Mapping[str, Any]) -> None:
    """Bars of tokens per second over all suites, plain decoding included, with the figures beside them."""
    methods, style = figures["methods"], styles(figures)
    for place, method in enumerate(methods):
        bars = axes.barh(place, method["tokens_per_second"], **style[method["method"]])
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(methods)), [in_words(method["method"]) for method in methods])
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second")


def draw_speedup(axes: Axes, figures: Mapping[str, Any]) -> None:
    """Bars of speed over plain decoding by suite, with their intervals."""
    methods = [method for method in figures["methods"] if method["method"] != PLAIN]
    groups, style = [*figures["suites"], "mean"], styles(figures)
    width = 0.8 / max(len(methods), 1)
    for number, method in enumerate(methods):
        cells = [method["suites"][suite] for suite in figures["suites"]] + [method["mean"]]
        places = [group + (number - (len(methods) - 1) / 2) * width for group in range(len(groups))]
        below, above = zip(
            *((c["speedup"] - c["low"], c["high"] - c["speedup"]) for c in cells),
            strict=True,
        )
        # The interval of a mean of resampled means holds the mean itself but for rounding.
        errors = [[max(0.0, end) for end in ends] for ends in (below, above)]
        look = style[method["method"]] | {"label": in_words(method["method"]), "ecolor": "#404040"}
        axes.bar(places, [c["speedup"] for c in cells], width, yerr=errors, capsize=2, **look)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [SUITE_NAMES.get(group, group) for group in groups])
    axes.set_ylabel("times the speed of plain generate()")


def draw_rounds(axes: Axes, figures: Mapping[str, Any]) -> None:
    """Bars of a round's time by part; tau stands beside the name."""
    methods = [method for method in figures["methods"] if method["round"]]
    names = [f"{in_words(method['method'])}\ntau {method['round']['tau']:.2f}" for method in methods]
    start = [0.0] * len(methods)
    parts = {"draft": "drafting", "verify": "the target's verifying forward", "host": "everything else"}
    for (part, words), colour in zip(parts.items(), COLOURS, strict=False):
        times = [method["round"][f"{part}_ms"] for method in methods]
        axes.barh(names, times, left=start, label=words, color=colour)
        start = [before + time for before, time in zip(start, times, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a round")


def draw_acceptance(axes: Axes, figures: Mapping[str, Any]) -> None:
    """Lines of the acceptance of each position given the one before."""
    style = styles(figures)
    for number, method in enumerate(figures["methods"]):
        shares = [at["given_before"] for at in method["acceptance"]]
        if shares:
            look = {"color": style[method["method"]]["color"], "marker": MARKERS[number % len(MARKERS)]}
            axes.plot(range(1, len(shares) + 1), shares, label=in_words(method["method"]), **look)
    axes.set_ylim(0, 1)
    axes.set_xlabel("position below the root")
    axes.set_ylabel("accepted, given the one before")
