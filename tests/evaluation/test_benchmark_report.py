# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures, tables and plots of a benchmark, from answers made by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock_hf.checkpoints.card import CardFacts
from specblock_hf.evaluation import plots
from specblock_hf.evaluation.methods import in_words
from specblock_hf.evaluation.plots import draw_benchmark, require_matplotlib
from specblock_hf.evaluation.report import describe_plan, main_table, markdown
from specblock_hf.evaluation.summary import acceptance_by_position, geometric_mean, speed_ratios, summarise, tau


METHODS = {"vanilla": "plain", "prompt_lookup": "transformers", "eagle3": "eagle3", "specblock": "specblock"}
SETTING = {
    "conditions": {
        "target": "tiny",
        "dtype": "bfloat16",
        "hardware": "an abacus",
        "versions": {"torch": "2"},
        "methods": list(METHODS),
        "kinds": METHODS,
        "temperatures": [0.0, 1.0],
        "limit": 2,
        "max_new_tokens": 60,
        "repeats": 1,
    },
    "plans": {
        "eagle3": {"plan": [12, 4, None], "from": "given"},
        "specblock": {"plan": [8, 1, None], "from": "calibrated, measured acceptance", "expected_speedup": 1.5},
    },
}


def row(method, suite="code", prompt="1", seconds=1.0, tokens=60, turn=0, temperature=0.0, **more):
    place = {"suite": suite, "prompt": prompt, "turn": turn, "temperature": temperature, "method": method}
    times = seconds if isinstance(seconds, list) else [seconds]
    return place | {"tokens": tokens, "seconds": times} | more


def drafted(method, accepted, cost, rows, **more):
    """`cost`: seconds of draft, verify and host of all rounds; the last round is cut by the end of the answer."""
    times = dict(zip(("draft_seconds", "verify_seconds", "host_seconds"), cost, strict=True))
    counts = {
        "rounds": len(accepted),
        "nodes": 9 * len(accepted),
        "draft_calls": 2 * len(accepted),
        "draft_rows": rows,
    }
    cut = [False] * (len(accepted) - 1) + [True]
    return row(method, accepted=accepted, cut=cut, **times, **counts, **more)


ROWS = [
    row("vanilla", seconds=4.0),
    row("vanilla", prompt="2", seconds=[1.0, 9.0, 2.0]),
    row("vanilla", "chat", "1", seconds=1.0, tokens=10),
    row("vanilla", "chat", "1", seconds=3.0, tokens=30, turn=1),
    row("prompt_lookup", seconds=2.0, target_calls=30, identical=True),
    row("prompt_lookup", prompt="2", seconds=4.0, target_calls=30, identical=True),
    row("prompt_lookup", "chat", "1", seconds=2.0, tokens=10, target_calls=10, identical=True),
    row("prompt_lookup", "chat", "1", seconds=6.0, tokens=30, target_calls=30, turn=1, identical=True),
    drafted("eagle3", [3, 1, 0], (0.3, 0.5, 0.2), 20.0, seconds=2.0, identical=True),
    drafted("eagle3", [3, 3], (0.1, 0.2, 0.1), 10.0, prompt="2", seconds=1.0, identical=True),
    drafted("eagle3", [0, 0], (0.1, 0.2, 0.1), 10.0, suite="chat", seconds=1.0, tokens=10, identical=True),
    drafted("eagle3", [1], (0.1, 0.2, 0.1), None, suite="chat", seconds=3.0, tokens=30, turn=1, identical=True),
    drafted("specblock", [1, 1], (0.1, 0.2, 0.1), 40.0, seconds=1.0, identical=False, differs_at=3, margin=0.125),
    drafted("specblock", [1, 0], (0.1, 0.2, 0.1), 40.0, prompt="2", seconds=1.0, identical=True),
    drafted(
        "specblock", [2], (0.1, 0.2, 0.1), None, suite="chat", seconds=0.5, tokens=10, identical=False, margin=None
    ),
    drafted("specblock", [0], (0.1, 0.2, 0.1), None, suite="chat", seconds=1.5, tokens=30, turn=1, identical=True),
]


@pytest.fixture
def summary():
    return summarise(SETTING, ROWS)


def methods_of(summary) -> dict:
    (figures,) = summary["temperatures"]
    return {method["method"]: method for method in figures["methods"]}


def test_a_ratio_is_a_prompts_speed_over_plain_with_all_its_turns_and_the_median_time():
    plain = [one for one in ROWS if one["method"] == "vanilla"]
    ratios = speed_ratios([one for one in ROWS if one["method"] == "specblock"], plain)
    assert ratios == {"code": [4.0, 2.0], "chat": [2.0]}


def test_speeds_are_geometric_means_and_every_suite_weighs_the_same(summary):
    specblock = methods_of(summary)["specblock"]
    assert specblock["suites"]["code"]["speedup"] == pytest.approx(math.sqrt(8))
    assert specblock["suites"]["chat"] == {"prompts": 1, "speedup": 2.0, "low": 2.0, "high": 2.0, "tau": 2.0}
    assert specblock["mean"]["speedup"] == pytest.approx(math.sqrt(math.sqrt(8) * 2))
    assert specblock["mean"]["tau"] == pytest.approx((1.75 + 2.0) / 2)
    assert specblock["tokens_per_second"] == pytest.approx(160 / 4)
    vanilla = methods_of(summary)["vanilla"]
    assert vanilla["mean"] == {"speedup": 1.0, "low": 1.0, "high": 1.0, "tau": None}
    assert vanilla["round"] is None and vanilla["identical"] is None and vanilla["acceptance"] == []


def test_tau_of_transformers_own_helpers_counts_every_forward(summary):
    assert methods_of(summary)["prompt_lookup"]["suites"]["code"]["tau"] == 2.0
    assert tau([row("x", accepted=[3, 1, 0], cut=[False] * 3)]) == pytest.approx(1 + 4 / 3)
    assert tau([row("x")]) is None


def test_a_round_is_pooled_over_all_answers_and_compared_with_eagle3(summary):
    eagle3, specblock = (methods_of(summary)[name] for name in ("eagle3", "specblock"))
    cost = eagle3["round"]
    assert cost["draft_ms"] == pytest.approx(1000 * 0.6 / 8) and cost["verify_ms"] == pytest.approx(1000 * 1.1 / 8)
    assert cost["host_ms"] == pytest.approx(1000 * 0.5 / 8) and cost["draft_share"] == pytest.approx(0.6 / 2.2)
    assert cost["tau"] == pytest.approx(1 + 11 / 8) and cost["ms_per_token"] == pytest.approx(2200 / (8 + 11))
    assert cost["forwards"] == 2 and cost["nodes"] == 9
    # Weighed by rounds, without the answer in which none could be counted.
    assert cost["rows"] == pytest.approx((3 * 20 + 2 * 10 + 2 * 10) / 7)
    assert eagle3["to_eagle3"] == {"draft_ms": 1.0, "rows": 1.0, "draft_share": 1.0}
    assert specblock["to_eagle3"]["draft_ms"] == pytest.approx((0.4 / 6) / (0.6 / 8))
    assert specblock["to_eagle3"]["draft_share"] == pytest.approx(0.25 / (0.6 / 2.2))
    assert specblock["to_eagle3"]["rows"] == pytest.approx(40 / cost["rows"])
    assert methods_of(summary)["prompt_lookup"]["to_eagle3"] is None


def test_acceptance_leaves_out_rounds_that_the_end_has_cut():
    found = acceptance_by_position([row("x", accepted=[3, 1, 0, 9], cut=[False, False, False, True]), row("y")])
    shares = [(round(at["reached"], 6), at["given_before"]) for at in found]
    assert shares == [(0.666667, pytest.approx(2 / 3)), (0.333333, 0.5), (0.333333, 1.0)]


def test_a_model_card_can_be_made_of_it(summary):
    facts = CardFacts(results=json.loads(json.dumps(summary)))
    assert [row["suite"] for row in facts.results["rows"]] == [
        "code, eagle3",
        "chat, eagle3",
        "code, specblock",
        "chat, specblock",
    ]
    wanted = {"suite": "chat, specblock", "prompts": 1, "temperature": 0.0, "tau": 2.0, "speedup": pytest.approx(2.0)}
    assert facts.results["rows"][-1] == wanted and facts.results["hardware"] == "an abacus"


def test_identity_is_counted(summary):
    assert methods_of(summary)["specblock"]["identical"] == {"same": 2, "of": 4, "margins": [0.125]}
    assert methods_of(summary)["eagle3"]["identical"] == {"same": 4, "of": 4, "margins": []}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), min_size=1, max_size=3))
def test_the_interval_lies_within_the_ratios_and_around_the_mean(suites):
    mean, low, high = geometric_mean(suites)
    logs = [sum(map(math.log, ratios)) / len(ratios) for ratios in suites]
    assert mean == pytest.approx(math.exp(sum(logs) / len(logs)))
    least, most = min(map(min, suites)), max(map(max, suites))
    assert least * (1 - 1e-9) <= low <= high <= most * (1 + 1e-9)


def test_the_interval_narrows_with_more_prompts_and_is_the_same_every_time():
    few, many = geometric_mean([[1.0, 4.0]]), geometric_mean([[1.0, 4.0] * 20])
    assert few == geometric_mean([[1.0, 4.0]]) and (few[1], few[2]) == (1.0, 4.0)
    assert few[1] < many[1] < 2.0 < many[2] < few[2]


def test_the_table_has_the_papers_form(summary):
    lines = main_table(summary["temperatures"][0]).splitlines()
    head = "| method | code Spd | code tau | chat Spd | chat tau | mean Spd | mean tau | draft share | tokens/s |"
    assert lines[0] == head
    assert lines[2] == "| vanilla | 1.00 | – | 1.00 | – | 1.00 | – | – | 16.0 |"
    assert lines[3].startswith(
        "| prompt_lookup | 1.00 (0.50-2.00) | 2.00 | 0.50 | 1.00 | 0.71 (0.50-1.00) | 1.50 | – |"
    )
    assert lines[5].startswith("| specblock | 2.83 (2.00-4.00) | 1.75 | 2.00 | 2.00 | 2.38 (2.00-2.83) |")
    assert lines[5].endswith("| 25% | 40.0 |")


def test_the_report_says_everything(summary):
    text = markdown(summary)
    assert "tiny in bfloat16 on an abacus; torch 2." in text and "16 answers, 0.8 minutes of decoding." in text
    assert "- plan of specblock: 8 nodes, 1 forward (calibrated, measured acceptance, 1.50x expected)" in text
    assert "- plan of eagle3: 12 nodes, 4 forwards, all starts (given)" in text
    assert "## Temperature 0\n" in text and "## Temperature 1\n" not in text
    costs = "66.7 ms | 133.3 ms | 66.7 ms | 145.5 | 2.0 | 40.0 | 9.0 | 0.89 | 0.92 | 2.80 |"
    assert f"| specblock | 8 nodes, 1 forward | {costs}" in text
    assert "| T_draft / EAGLE-3 | draft share / EAGLE-3 | draft rows / EAGLE-3 |" in text
    assert "| eagle3 | 0.75 (0.75) | 0.67 (0.50) | 1.00 (0.50) |" in text
    assert "| specblock | 2 of 4 | 50% | 0.125 | 0.125 |" in text
    json.dumps(summary)


def test_without_eagle3_nothing_is_compared_with_it():
    conditions = SETTING["conditions"] | {"methods": ["vanilla", "specblock"]}
    chosen = [one for one in ROWS if one["method"] in ("vanilla", "specblock")]
    text = markdown(summarise(SETTING | {"conditions": conditions}, chosen))
    assert "EAGLE" not in text and "T_verify" in text


def test_plain_alone_has_one_table():
    conditions = SETTING["conditions"] | {"methods": ["vanilla"]}
    chosen = [one for one in ROWS if one["method"] == "vanilla"]
    text = markdown(summarise({"conditions": conditions, "plans": {}}, chosen))
    assert text.count("\n| --- |") == 1 and "###" not in text


def test_plans_in_words():
    assert describe_plan(None) == "–" and describe_plan([0, 1, None]) == "no drafts (none pays)"
    assert describe_plan([8, 2, 4]) == "8 nodes, 2 forwards, 4 starts"


def test_plots_are_drawn(summary, tmp_path):
    pytest.importorskip("matplotlib")
    both = summarise(SETTING, ROWS + [one | {"temperature": 1.0} for one in ROWS])
    assert len(both["temperatures"]) == 2
    sizes = []
    for number, figures in enumerate((summary, both)):
        folder = tmp_path / str(number)
        folder.mkdir()
        drawn = draw_benchmark(figures, folder)
        assert [path.name for path in drawn] == ["tokens.png", "speedup.png", "round.png", "acceptance.png"]
        headers = [path.read_bytes()[:24] for path in drawn]
        assert all(header.startswith(b"\x89PNG\r\n") for header in headers)
        sizes.append([int.from_bytes(header[20:24]) for header in headers])
    assert all(two == 2 * one for one, two in zip(*sizes, strict=True))


def test_bars_and_lines_are_the_figures(summary):
    figure = pytest.importorskip("matplotlib.figure").Figure
    tokens, speed, rounds, accepted = figure().subplots(4)
    (figures,) = summary["temperatures"]
    plots.draw_tokens(tokens, figures)
    assert [bar.get_width() for bar in tokens.patches] == [m["tokens_per_second"] for m in figures["methods"]]
    labels = [label.get_text() for label in tokens.get_yticklabels()]
    assert labels == ["plain generate()", "transformers' prompt lookup", "EAGLE-3", "SpecBlock"]
    plots.draw_speedup(speed, figures)
    heights = [bar.get_height() for bar in speed.patches]
    wanted = [m["suites"]["code"]["speedup"] for m in figures["methods"][1:]]
    assert heights[::3] == pytest.approx(wanted) and len(heights) == 9
    plots.draw_rounds(rounds, figures)
    ours = [m["round"] for m in figures["methods"] if m["round"]]
    wanted = [cost[f"{part}_ms"] for part in ("draft", "verify", "host") for cost in ours]
    assert [bar.get_width() for bar in rounds.patches] == pytest.approx(wanted)
    plots.draw_acceptance(accepted, figures)
    assert [list(line.get_ydata()) for line in accepted.lines] == [[0.75, pytest.approx(2 / 3), 1.0], [1.0]]


def test_methods_in_words():
    assert in_words("specblock:best_first+lookup") == "SpecBlock, best-first tree + look-ups in the text"
    assert in_words("assistant:org/small") == "transformers' assisted decoding, org/small"
    assert in_words("mine+lookup") == "mine + look-ups in the text"


def test_every_method_keeps_one_look_of_its_own():
    names = ["vanilla", *(f"drafter{number}" for number in range(12))]
    looks = plots.styles({"methods": [{"method": name} for name in names]})
    assert list(looks) == names and len({(look["color"], look.get("hatch")) for look in looks.values()}) == 13


def test_a_legend_hides_no_bar(summary, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, dpi: drawn.append(self))
    draw_benchmark(summary, tmp_path)
    legends = [(axes, axes.get_legend()) for one in drawn for axes in one.axes if axes.get_legend()]
    for axes, legend in legends:
        axes.figure.draw_without_rendering()
        assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert len(legends) == 3


def test_matplotlib_is_asked_for_in_one_sentence(monkeypatch, summary, tmp_path):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pictures need matplotlib, .*; run `pip install specblock_hf\[plots\]`."):
        require_matplotlib()
