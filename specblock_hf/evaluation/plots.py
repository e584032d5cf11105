# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a benchmark's figures. They need matplotlib, which the extra `plots` installs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .methods import PLAIN


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def require_matplotlib() -> None:
    """
    Raises:
        ImportError: It is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib, which is not installed; run `pip install specblock_hf[plots]`.")


def draw_benchmark(summary: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """
    Write `speedup.png`, `round.png` and `acceptance.png` with a panel for each temperature.

    Args:
        summary (mapping): From [`summarise`].
        folder (`str` or `Path`): An existing folder.

    Returns:
        `list[Path]`: What was written; rounds are left out where no method has any.

    Raises:
        ImportError: matplotlib is not installed.
    """
    temperatures = summary["temperatures"]
    pictures: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {"speedup": draw_speedup}
    if any(method["round"] for figures in temperatures for method in figures["methods"]):
        pictures |= {"round": draw_rounds, "acceptance": draw_acceptance}
    return [_draw(Path(folder) / f"{name}.png", temperatures, draw) for name, draw in pictures.items()]


def _draw(path: Path, temperatures: list[Mapping[str, Any]], draw: Callable[[Axes, Mapping[str, Any]], None]) -> Path:
    require_matplotlib()
    # A figure of its own instead of pyplot, whose figures are global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5 * len(temperatures)), layout="constrained")
    for axes, figures in zip(figure.subplots(len(temperatures), squeeze=False)[:, 0], temperatures, strict=True):
        axes.set_title(f"temperature {figures['temperature']:g}")
        draw(axes, figures)
    figure.savefig(path, dpi=120)
    return path


def draw_speedup(axes: Axes, figures: Mapping[str, Any]) -> None:
    """Bars of speed over plain decoding by suite, with their intervals."""
    methods = [method for method in figures["methods"] if method["method"] != PLAIN]
    groups = [*figures["suites"], "mean"]
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
        axes.bar(places, [c["speedup"] for c in cells], width, yerr=errors, capsize=2, label=method["method"])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("speed over plain generate()")
    _legend(axes)


def draw_rounds(axes: Axes, figures: Mapping[str, Any]) -> None:
    """Bars of a round's time by part; tau stands beside the name."""
    methods = [method for method in figures["methods"] if method["round"]]
    names = [f"{method['method']}\ntau {method['round']['tau']:.2f}" for method in methods]
    start = [0.0] * len(methods)
    for part in ("draft", "verify", "host"):
        times = [method["round"][f"{part}_ms"] for method in methods]
        axes.barh(names, times, left=start, label=part)
        start = [before + time for before, time in zip(start, times, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a round")
    _legend(axes)


def draw_acceptance(axes: Axes, figures: Mapping[str, Any]) -> None:
    """Lines of the acceptance of each position given the one before."""
    for method in figures["methods"]:
        shares = [at["given_before"] for at in method["acceptance"]]
        if shares:
            axes.plot(range(1, len(shares) + 1), shares, marker="o", label=method["method"])
    axes.set_ylim(0, 1)
    axes.set_xlabel("position below the root")
    axes.set_ylabel("accepted, given the one before")
    _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
