# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan that finds itself, in a simulated service: regret is bounded, and the same trace gives the same choices."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from dataclasses import replace

import pytest
from plan_service_for_tests import SETTING, Nature, SimulatedService

from specblock_hf.calibration.costs import CostCurves
from specblock_hf.planning.controller import PlanController
from specblock_hf.planning.estimates import band_of
from specblock_hf.planning.offers import LOOKUPS, Choice, Offer, Round, Way
from specblock_hf.planning.record import FIRST_SHARE, SHARE, Record


# SmolLM2-135M-Instruct and the shipped drafter on two cores, rounded; in float32 a second node costs half a step.
COSTS = {
    "bf16": CostCurves(
        ((1, 0.0235), (4, 0.0238), (8, 0.0262), (12, 0.0295), (16, 0.0305), (24, 0.0345), (32, 0.040), (64, 0.060)),
        0.0055,
        ((4, 0.006), (8, 0.008), (32, 0.02)),
        0.0013,
        0.0245,
        "bf16",
    ),
    "fp32": CostCurves(
        ((1, 0.042), (4, 0.060), (8, 0.061), (12, 0.067), (16, 0.074), (24, 0.090), (32, 0.102), (64, 0.158)),
        0.0062,
        ((4, 0.006), (8, 0.008), (32, 0.02)),
        0.001,
        0.0425,
        "fp32",
    ),
}
WAYS = {
    Way(1): [(4, 2.15), (8, 2.36), (12, 2.46), (24, 2.59)],
    Way(2, 4): [(12, 2.63), (24, 2.82)],
    Way(2, 8): [(32, 2.99), (60, 3.14)],
}
OFFER = Offer(WAYS, 60, trusted=True)
TOKENS = 1500  # a dozen answers
CODE, CHAT = Nature(1.3), Nature(0.05)


def served(costs: str, offer: Offer, nature, tokens=TOKENS, controller=None, **options) -> SimulatedService:
    curves = COSTS[costs]
    nature = nature if callable(nature) else (lambda _, always=nature: always)
    return SimulatedService(curves, offer, nature, **options).run(controller or PlanController(), tokens)


def speed(service: SimulatedService, first: int = 0) -> float:
    """Of the best choice's, from a round on."""
    lost = service.lost[-1] - (service.lost[first - 1] if first else 0.0)
    return 1 - lost / (service.seconds * (1 - first / len(service.lost)))


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("right", [0.3, 0.7, 1.0, 1.3])
def test_regret_is_bounded(costs, right):
    regrets = [speed(served(costs, OFFER, Nature(right), seed=seed)) for seed in range(3)]
    assert sum(regrets) / len(regrets) > 0.93 and min(regrets) > 0.87


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("offer", [OFFER, replace(OFFER, finds=True), replace(OFFER, trusted=False)])
def test_a_drafter_that_is_never_right_costs_little(costs, offer):
    service = served(costs, offer, Nature(0.0))
    assert service.tokens / service.seconds * COSTS[costs].plain > 0.96
    late = service.choices[len(service.choices) // 2 :]
    assert sum(choice.nodes > 0 for choice in late) < 0.15 * len(late)
    # What it looks for in vain once it knows: 2 % of the time.
    assert speed(service, len(service.lost) // 2) > 0.98


@pytest.mark.parametrize("costs", COSTS)
def test_it_finds_the_best_plan_when_a_text_changes_its_nature(costs):
    def nature(tokens):
        return CODE if 1500 <= tokens < 3000 else CHAT

    service = served(costs, OFFER, nature, 4500)
    parts = {CHAT: [], CODE: []}
    emitted = 0.0
    for number, choice in enumerate(service.choices):
        here = nature(emitted)
        emitted += service.expected(choice, here)[0]
        parts[here].append(number)
    # In the last third of each part.
    for part, drafts in ((parts[CODE], True), (parts[CHAT], False)):
        late = [service.choices[number].nodes > 0 for number in part[-len(part) // 4 :]]
        assert (sum(late) > 0.9 * len(late)) if drafts else (sum(late) < 0.2 * len(late))
    assert speed(service) > 0.88


@pytest.mark.parametrize("costs", COSTS)
def test_spikes_do_not_talk_it_into_nonsense(costs):
    for nature, least in ((Nature(1.0), 0.92), (Nature(0.0), 0.95)):
        speeds = [speed(served(costs, OFFER, nature, spikes=0.05, seed=seed)) for seed in range(3)]
        assert sum(speeds) / len(speeds) > least, speeds


def test_the_same_trace_gives_the_same_choices():
    first, again = (served("bf16", OFFER, Nature(0.7), 300, seed=7) for _ in range(2))
    assert first.choices == again.choices and len({choice.nodes for choice in first.choices}) > 2


def test_first_rounds_are_small_and_grow():
    service = served("bf16", OFFER, CODE, 400)
    assert [choice.nodes for choice in service.choices[:2]] == [0, 0]
    largest = 3
    for choice in service.choices:  # twice the rows, the root counted
        assert choice.nodes + 1 <= 2 * (largest + 1)
        largest = max(largest, choice.nodes)


@pytest.mark.parametrize("sizes", [(), (7, 13)])
def test_no_more_than_the_drafter_offers(sizes):
    offer = replace(OFFER, most=16, sizes=sizes)
    service = served("bf16", offer, CODE, 600)
    nodes = {choice.nodes for choice in service.choices}
    assert max(nodes) <= 16 and (not sizes or nodes <= {0, *sizes})
    assert all(choice.way in WAYS for choice in service.choices if choice.nodes)


@pytest.mark.parametrize("sizes", [(7, 15, 31, 60), (31, 60), (7, 60), (60,)])
def test_captured_sizes_are_grown_into_one_after_the_other(sizes):
    # As on a GPU: nodes cost little, and each captured size is a step further than twice the one before.
    curves = CostCurves(
        ((1, 0.0093), (8, 0.0099), (16, 0.0103), (32, 0.0108), (64, 0.0117)), 0.002, (), 0.0003, 0.0093, ""
    )
    ways = {Way(2): [(8, 2.4), (16, 2.8), (32, 3.1), (60, 3.4)]}
    service = SimulatedService(curves, Offer(ways, 60, True, cuts=False, sizes=sizes), lambda _: Nature(1.0))
    service.run(PlanController(), TOKENS)
    chosen = [choice.nodes for choice in service.choices]
    assert set(chosen) == {0, *sizes} and service.best(Nature(1.0))[1].nodes == 60
    assert chosen[100:].count(60) > 0.8 * len(chosen[100:]) and speed(service, 100) > 0.96
    first = [chosen.index(size) for size in sizes]
    assert first == sorted(first)


def test_sure_matches_leave_the_drafter_out():
    offer, sure = replace(OFFER, finds=True), Nature(0.5, (0.3, 0.0, 0.0, 0.7))
    service = served("bf16", offer, sure, 800)
    assert all(choice.way == LOOKUPS or choice.enough_found <= 2.0 for choice in service.choices[-20:])
    assert speed(service) > 0.93


def test_where_matches_appear_it_drafts_them_soon():
    offer = replace(OFFER, finds=True)

    def nature(tokens):
        return Nature(0.0) if tokens < 600 else Nature(0.0, (0.3, 0.0, 0.0, 0.7))

    service = served("bf16", offer, nature, 900)
    emitted, late = 0.0, []
    for choice in service.choices:
        emitted += service.expected(choice, nature(emitted))[0]
        if emitted > 750:
            late.append(choice)
    assert sum(choice.nodes > 0 for choice in late) > 0.9 * len(late)


def test_another_call_is_another_text():
    """What little a text accepted is held against the next one only as part of the long run."""

    def drafted(begins: bool) -> int:
        controller = PlanController()
        served("bf16", OFFER, CHAT, 150, controller)
        plain = controller.next(SETTING, OFFER)
        assert not plain.nodes or plain.learns
        if begins:
            controller.begin(SETTING)
        return sum(choice.nodes > 0 for choice in served("bf16", OFFER, CODE, 20, controller).choices[:8])

    assert drafted(begins=True) > 6 and drafted(begins=False) < 4
    frozen = PlanController()
    served("bf16", OFFER, CHAT, 150, frozen)
    before = frozen.freeze().to_dict()
    frozen.begin(SETTING)
    frozen.begin(replace(SETTING, batch_size=8))
    assert frozen.to_dict() == before
    # One that is frozen after a poor text drafts as one does that begins with another.
    learning = PlanController()
    learning.__setstate__({"saved": before, "frozen": False})
    plain = learning.next(SETTING, OFFER)
    assert not plain.nodes or plain.learns
    learning.begin(SETTING)
    assert frozen.next(SETTING, OFFER).nodes and learning.next(SETTING, OFFER).nodes
    assert frozen.describe(SETTING) == learning.describe(SETTING)


def test_the_plan_in_effect_is_told_after_a_lesson_too():
    controller = PlanController()
    service = SimulatedService(COSTS["bf16"], OFFER, lambda _: Nature(1.0))
    lessons = 0
    for _ in range(200):
        service.run(controller, 1)
        if service.choices[-1].learns and len(service.choices) > 20:
            lessons += 1
            assert "nothing is known yet" not in controller.describe(SETTING)
    assert lessons


def test_lessons_cost_no_more_than_their_share():
    controller = PlanController()
    service = served("fp32", OFFER, Nature(0.0), 3000, controller)
    record = controller.to_dict()["records"][0]
    assert record["spent"] <= FIRST_SHARE * 0.05 + SHARE * record["seconds"] + 0.3
    assert sum(choice.learns for choice in service.choices) > 10  # and never ends


def test_rows_of_a_batch_wait_for_the_slowest():
    one, four = (replace(SETTING, batch_size=size) for size in (1, 4))
    controller, choice = PlanController(), Choice(4, Way(1))
    for setting in (one, four):
        for _ in range(60):
            for asked, emitted, rest in ((Choice(0), 1, 0.02), (choice, 1.4, 0.024)):
                rows = [[(-1.0, number < 2) for number in range(5)]] * 4
                seen = Round(asked, rows if asked.nodes else [], 1 + asked.nodes, emitted, True, 0.0, 0.0, rest)
                controller.observe(setting, OFFER, seen)
    worths = []
    for setting in (one, four):
        controller.next(setting, OFFER)
        worths.append(controller.describe(setting))
    tokens = [float(worth.split(": ")[1].split(" tokens")[0]) for worth in worths]
    assert tokens[0] > tokens[1] > 1


def learned(controller: PlanController) -> list[dict]:
    return [{name: value for name, value in r.items() if name != "rate"} for r in controller.to_dict()["records"]]


def test_a_frozen_controller_learns_and_tries_nothing():
    controller = PlanController()
    served("bf16", OFFER, CODE, 300, controller)
    before = learned(controller)
    service = served("bf16", OFFER, CHAT, 200, controller.freeze())
    assert len(set(service.choices)) == 1 and service.choices[0].nodes
    assert learned(controller) == before
    assert "frozen" in repr(controller)


def test_what_was_learned_is_saved_copied_and_loaded(tmp_path):
    controller = PlanController()
    served("bf16", replace(OFFER, finds=True), Nature(1.0, (0.5, 0.2, 0.2, 0.1)), 300, controller)
    controller.save(tmp_path / "plans.json")
    before = controller.to_dict()
    for other in (
        PlanController.load(tmp_path / "plans.json"),
        copy.deepcopy(controller),
        pickle.loads(pickle.dumps(controller)),
    ):
        assert other.to_dict() == before
        assert other.next(SETTING, OFFER) == copy.deepcopy(controller).next(SETTING, OFFER)


def test_what_holds_elsewhere_is_ignored_with_one_line(tmp_path, caplog):
    controller = PlanController()
    served("bf16", OFFER, CODE, 300, controller)
    controller.save(tmp_path / "plans.json")
    loaded, elsewhere = PlanController.load(tmp_path / "plans.json"), replace(SETTING, machine="another")
    with caplog.at_level(logging.WARNING):
        assert loaded.next(elsewhere, OFFER) == PlanController().next(elsewhere, OFFER)
        loaded.next(elsewhere, OFFER)
        loaded.next(replace(elsewhere, sampled=True), OFFER)
    assert [record.message for record in caplog.records] == [
        f"What was loaded of plans is for another target or machine than {elsewhere}: not used."
    ]
    caplog.clear()
    again = PlanController.load(tmp_path / "plans.json")
    again.next(replace(SETTING, batch_size=4), OFFER)
    assert again.next(SETTING, OFFER).nodes and not caplog.records


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99, "records": []}', '{"version": 1, "records": [{}]}'])
def test_a_file_that_is_none_of_ours_is_refused(tmp_path, text):
    (tmp_path / "plans.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds no plans that this release can read; save them again"):
        PlanController.load(tmp_path / "plans.json")


def test_a_drafter_that_had_to_catch_up_is_looked_at_again_at_once():
    controller, lesson = PlanController(), Choice(4, Way(1), learns=True)
    controller.next(SETTING, OFFER)
    row = [(-1.0, False)] * 4
    seen = Round(lesson, [row], 5, 1.0, True, 0.0, 0.1, 0.03, usual=False)
    controller.observe(SETTING, OFFER, seen)
    assert controller.next(SETTING, OFFER) == lesson
    controller.observe(SETTING, OFFER, replace(seen, usual=True))
    assert controller.next(SETTING, OFFER) != lesson
    controller.observe(SETTING, OFFER, seen)
    controller.begin(SETTING)  # another call may have another drafter
    assert controller.next(SETTING, OFFER) != lesson


def test_tokens_that_are_read_again_cost_what_nodes_do():
    record, usual, row = Record(), Record(), [(-1.0, False)] * 3
    seen = Round(Choice(3, Way(1)), [row], 4, 1.0, True, 0.0, 0.1, 0.03)
    usual.observe(OFFER, seen)
    record.observe(OFFER, replace(seen, columns=10))
    assert list(usual.verify.sizes) == [4] and list(record.verify.sizes) == [12]  # of a band
    (plain,), (again,) = usual.gains.values(), record.gains.values()
    assert (plain.fill, again.fill) == (1.0, 3.0) and plain.hits == again.hits
    assert record.grown == usual.grown  # no larger tree was tried


def test_settings_are_kept_apart():
    controller, sampled = PlanController(), replace(SETTING, sampled=True)
    served("bf16", OFFER, CODE, 300, controller)
    assert controller.next(SETTING, OFFER).nodes
    assert controller.next(sampled, OFFER).nodes == 0 and controller.describe(sampled).startswith("plain steps")


def test_measured_costs_are_taken_over():
    controller, curves = PlanController(), COSTS["fp32"]
    controller.fill(SETTING, OFFER, *curves.for_controller(OFFER.ways))
    choice = controller.freeze().next(SETTING, OFFER)  # which tries nothing else first
    rate, best = SimulatedService(curves, OFFER, lambda _: Nature(1.0)).best(Nature(1.0))
    assert choice.nodes and choice.way == best.way and choice.enough_found == math.inf
    tokens, seconds = SimulatedService(curves, OFFER, lambda _: Nature(1.0)).expected(choice, Nature(1.0))
    assert tokens / seconds > 0.98 * rate
    dear = replace(curves, verify=((1, 0.042), (64, 64.0)))
    controller.fill(SETTING, OFFER, *dear.for_controller(OFFER.ways))
    assert not controller.next(SETTING, OFFER).nodes  # frozen as it is


def test_what_is_not_captured_yet_teaches_no_times_and_is_tried_again():
    controller, offer = PlanController(), OFFER
    for _ in range(3):
        assert not controller.next(SETTING, offer).nodes
        controller.observe(SETTING, offer, Round(Choice(0), [], 1, 1.0, False, 0.0, 0.0, 9.0, settled=False))
    assert "a plain step is measured first" in controller.next(SETTING, offer).why
    for _ in range(2):
        controller.observe(SETTING, offer, Round(Choice(0), [], 1, 1.0, False, 0.0, 0.0, 0.02))
    lesson = controller.next(SETTING, offer)
    while not lesson.nodes or not lesson.learns:
        controller.observe(SETTING, offer, Round(Choice(0), [], 1, 1.0, False, 0.0, 0.0, 0.02))
        lesson = controller.next(SETTING, offer)
    row = [(-1.0, True)] * lesson.nodes
    for _ in range(9):
        seen = Round(lesson, [row], 1 + lesson.nodes, 2.0, True, 0.0, 7.0, 8.0, settled=False)
        controller.observe(SETTING, offer, seen)
        assert controller.next(SETTING, offer) is lesson
    (record,) = controller._records.values()
    assert set(record.verify.sizes) == {1} and not record.draft and not record.spent
    # What it accepted counts.
    assert sum(gains.rounds for gains in record.gains.values()) == 9


def test_what_a_way_accepts_of_an_easy_text_is_not_all_its_own():
    """One forward serves both texts, two forwards the easy one alone."""
    record, one, two = Record(), Choice(7, Way(1)), Choice(12, Way(2, 4))
    for choice, kept, rounds in ((one, 4, 30), (two, 5, 20), (None, 0, 0), (one, 1, 60)):
        if choice is None:
            record.forget_text()
        for _ in range(rounds):
            row = [(-1.0, node < kept) for node in range(choice.nodes)]
            record.observe(OFFER, Round(choice, [row], choice.nodes + 1, 1.0 + kept, True, 0.0, 0.005, 0.025))
    record.forget_text()
    of_one, of_two = (_beside_the_prior(record, choice) for choice in (one, two))
    assert of_two / of_one == pytest.approx(1, rel=0.25)


def test_what_a_way_accepted_of_hard_texts_does_not_rest_on_it_when_texts_become_easy():
    """One forward serves the hard texts and is then left, two forwards serve ten easy ones."""
    record, one, two = Record(), Choice(7, Way(1)), Choice(12, Way(2, 4))
    for choice, kept in (*[(one, 1)] * 6, *[(two, 4)] * 10):
        record.forget_text()
        for _ in range(40):
            row = [(-1.0, node < kept) for node in range(choice.nodes)]
            record.observe(OFFER, Round(choice, [row], choice.nodes + 1, 1.0 + kept, True, 0.0, 0.005, 0.025))
    seen = 4 / OFFER.drafts(two.way, two.nodes) / (1 / OFFER.drafts(one.way, one.nodes))
    of_one, of_two = (_beside_the_prior(record, choice) for choice in (one, two))
    # Most of that is laid to the texts. (What each way accepts in the long run, by itself, made it 1.97.)
    assert of_two / of_one - 1 < (seen - 1) / 3 and seen > 3


def _beside_the_prior(record, choice):
    gains, recorded = record.gains[f"{choice.way.name} 0"], OFFER.drafts(choice.way, choice.nodes)
    return gains.expected(OFFER.prior(choice.way, 0))[band_of(choice.nodes)] / recorded


def test_what_look_ups_promise_says_nothing_of_the_drafter():
    record, offer = Record(), replace(OFFER, finds=True)
    seen = Round(Choice(7, Way(1)), [[(-1.0, True)] * 7], 8, 8.0, True, 3.0, 0.005, 0.025)
    record.observe(offer, seen)
    assert (record.hits, record.prior, record.levels[0].hits, record.levels[1].hits) == (0.0, 0.0, 7.0, 0.0)
    record.observe(offer, replace(seen, found=1.0))
    assert record.hits == 7.0 < record.levels[1].hits and record.levels[0].hits == 7.0


def test_a_batch_is_heard_as_one_text():
    one, eight = Record(), Record()
    seen = Round(Choice(7, Way(1)), [[(-1.0, node < 2) for node in range(7)]], 8, 3.0, True, 0.0, 0.005, 0.025)
    for _ in range(20):
        one.observe(OFFER, seen)
        eight.observe(OFFER, replace(seen, rows=seen.rows * 8))
    levels = [record.levels[1] for record in (one, eight)]
    assert levels[1].hits == pytest.approx(levels[0].hits, rel=1e-6)
    assert eight.hits == pytest.approx(8 * one.hits, rel=0.02)
