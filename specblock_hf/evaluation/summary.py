# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
From the answers of a benchmark to its figures. Speed is a ratio to plain `generate()` prompt by prompt, summarised by
the geometric mean with a bootstrap interval over prompts; everything about rounds is pooled over all answers.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .benchmark import Row, median_seconds
from .methods import PLAIN


RESAMPLES = 2000
CONFIDENCE = 0.95
DEEPEST = 8
"""Positions whose acceptance is reported."""

CARD_FIELDS = ("hardware", "dtype", "versions")
WITHOUT_NETWORK = ("plain", "transformers", "lookup")


def summarise(setting: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """
    Args:
        setting (mapping): `conditions` (with `methods`, their `kinds`, and `temperatures`) and `plans`.
        rows (sequence of `Row`): From [`Benchmark.run`], of whole units.

    Returns:
        `dict`: The setting and, for each temperature, the figures of each method, ready for JSON; `hardware`, `dtype`,
        `versions` and `rows` are what `specblock push --results` reads.
    """
    temperatures = []
    for temperature in setting["conditions"]["temperatures"]:
        chosen = [row for row in rows if row["temperature"] == temperature]
        if not chosen:
            continue
        by_method: dict[str, list[Row]] = {name: [] for name in setting["conditions"]["methods"]}
        for row in chosen:
            by_method[row["method"]].append(row)
        methods = [_method_figures(name, made, by_method[PLAIN], setting) for name, made in by_method.items()]
        _compare_with_eagle3(methods)
        suites = list(dict.fromkeys(row["suite"] for row in chosen))
        temperatures.append({"temperature": temperature, "suites": suites, "methods": methods})
    seconds = sum(sum(row["seconds"]) for row in rows)
    summary = dict(setting) | {"answers": len(rows), "answer_seconds": seconds, "temperatures": temperatures}
    return summary | {name: setting["conditions"][name] for name in CARD_FIELDS} | {"rows": _card_rows(temperatures)}


def _card_rows(temperatures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a model card takes of it (see [`CardFacts`]): the suites of each method that has a drafter's network."""
    return [
        {"suite": f"{suite}, {method['method']}", "temperature": figures["temperature"]}
        | {name: cell[name] for name in ("prompts", "tau", "speedup")}
        for figures in temperatures
        for method in figures["methods"]
        if method["kind"] not in WITHOUT_NETWORK
        for suite, cell in method["suites"].items()
        if cell["tau"] is not None
    ]


def _method_figures(name: str, rows: list[Row], plain: list[Row], setting: Mapping[str, Any]) -> dict[str, Any]:
    suites: dict[str, dict[str, Any]] = {}
    ratios = speed_ratios(rows, plain)
    for suite, of_prompts in ratios.items():
        speedup, low, high = geometric_mean([of_prompts])
        figures = {"prompts": len(of_prompts), "speedup": speedup, "low": low, "high": high}
        suites[suite] = figures | {"tau": tau([row for row in rows if row["suite"] == suite])}
    speedup, low, high = geometric_mean(list(ratios.values()))
    taus = [figures["tau"] for figures in suites.values()]
    mean_tau = None if None in taus else statistics.mean(taus)
    compared = [row["identical"] for row in rows if "identical" in row]
    margins = sorted(row["margin"] for row in rows if row.get("margin") is not None)
    return {
        "method": name,
        "kind": setting["conditions"]["kinds"][name],
        "plan": setting["plans"][name]["plan"] if name in setting["plans"] else None,
        "tokens_per_second": _rate(rows),
        "suites": suites,
        "mean": {"speedup": speedup, "low": low, "high": high, "tau": mean_tau},
        "round": round_figures(rows),
        "acceptance": acceptance_by_position(rows),
        "identical": {"same": sum(compared), "of": len(compared), "margins": margins} if compared else None,
    }


def speed_ratios(rows: Sequence[Row], plain: Sequence[Row]) -> dict[str, list[float]]:
    """For each suite every prompt's tokens per second, all turns together, over those of plain decoding."""
    prompts: dict[tuple[str, str], tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for column, made in enumerate((rows, plain)):
        for row in made:
            prompts[row["suite"], row["prompt"]][column].append(row)
    ratios: dict[str, list[float]] = defaultdict(list)
    for (suite, _), (ours, theirs) in prompts.items():
        ratios[suite].append(_rate(ours) / _rate(theirs))
    return dict(ratios)


def _rate(rows: Sequence[Row]) -> float:
    return sum(row["tokens"] for row in rows) / sum(median_seconds(row) for row in rows)


def geometric_mean(suites: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """
    The geometric mean of ratios and its 95 % percentile bootstrap interval. Every suite weighs the same, and prompts
    are resampled within their suite.

    Args:
        suites (sequence of sequences of `float`): Every prompt's ratio, suite by suite.

    Returns:
        `tuple[float, float, float]`: Mean, lower and upper end.
    """

    logs = [[math.log(ratio) for ratio in ratios] for ratios in suites]

    def mean(samples: Sequence[Sequence[float]]) -> float:
        return math.exp(statistics.fmean(statistics.fmean(sample) for sample in samples))

    draw = random.Random(0)
    means = sorted(mean([draw.choices(ratios, k=len(ratios)) for ratios in logs]) for _ in range(RESAMPLES))
    outside = round(RESAMPLES * (1 - CONFIDENCE) / 2)
    return mean(logs), means[outside], means[-1 - outside]


def tau(rows: Sequence[Row]) -> float | None:
    """
    Tokens emitted per verification over all answers. The prompt's forward of a tree drafter verifies nothing and does
    not count, nor does its token; that of transformers' own helpers verifies drafts and does.
    """
    calls = sum(row.get("target_calls", 0) for row in rows)
    if calls:
        return sum(row["tokens"] for row in rows) / calls
    accepted = [kept for row in rows for kept in row.get("accepted", ())]
    return 1 + statistics.mean(accepted) if accepted else None


def round_figures(rows: Sequence[Row]) -> dict[str, Any] | None:
    """What a round of a tree drafter costs on average, in milliseconds, forwards, rows and nodes; `None` without."""
    rows = [row for row in rows if row.get("rounds")]
    if not rows:
        return None
    rounds = sum(row["rounds"] for row in rows)
    parts = {name: sum(row[f"{name}_seconds"] for row in rows) for name in ("draft", "verify", "host")}
    total = sum(parts.values())
    counted = [row for row in rows if row["draft_rows"] is not None]
    weight = sum(row["rounds"] for row in counted)
    draft_rows = sum(row["draft_rows"] * row["rounds"] for row in counted) / weight if weight else None
    pooled_tau = tau(rows)
    return {f"{name}_ms": 1000 * seconds / rounds for name, seconds in parts.items()} | {
        "tau": pooled_tau,
        "draft_share": parts["draft"] / total,
        "ms_per_token": 1000 * total / rounds / pooled_tau,
        "forwards": sum(row["draft_calls"] for row in rows) / rounds,
        "rows": draft_rows,
        "nodes": sum(row["nodes"] for row in rows) / rounds,
    }


def acceptance_by_position(rows: Sequence[Row]) -> list[dict[str, float]]:
    """
    For each position below the root, over the rounds that the end of an answer did not cut: the share of rounds that
    kept it (`reached`), and that share of the rounds that kept the position before (`given_before`).
    """
    accepted = [
        kept for row in rows for kept, cut in zip(row.get("accepted", ()), row.get("cut", ()), strict=True) if not cut
    ]
    at_least = [sum(kept >= depth for kept in accepted) for depth in range(DEEPEST + 1)]
    return [
        {"reached": at_least[depth] / at_least[0], "given_before": at_least[depth] / at_least[depth - 1]}
        for depth in range(1, DEEPEST + 1)
        if at_least[depth]
    ]


def _compare_with_eagle3(methods: list[dict[str, Any]]) -> None:
    """Add every method's draft time, draft rows and draft share as shares of the first EAGLE-3's, if there is one."""
    reference = next((m["round"] for m in methods if m["kind"] == "eagle3" and m["round"] is not None), None)
    for method in methods:
        ours = method["round"]
        if reference is None or ours is None:
            method["to_eagle3"] = None
            continue
        names = [name for name in ("draft_ms", "rows", "draft_share") if ours[name] is not None and reference[name]]
        method["to_eagle3"] = {name: ours[name] / reference[name] for name in names}
