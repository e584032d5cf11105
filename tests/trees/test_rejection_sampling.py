# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Rules for drawn trees: exactness by enumeration of every draw and every coin, expected lengths, real coins."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from outcomes_for_tests import outcomes
from test_verification import tree_of
from toy_models_for_tests import Tokens, ToyModel, all_trees, distinct, path_in

from specblock_hf.trees.distributions import DraftDistributions
from specblock_hf.trees.rejection_sampling import GlobalCoins, SampledVerifier
from specblock_hf.trees.sampling import Shape, gumbel_draw, tree_shape
from specblock_hf.trees.tree import DraftTree


MODELS = 40
End = tuple[float, Tokens, torch.Tensor]
"""A way for a round to end: its mass, the drafted tokens that it kept, the distribution of the next one."""


def shape_of(seed: int, size: int) -> Shape:
    """A small shape: one or two forwards, two or three levels."""
    shapes = (
        tree_shape(3, 2, 2, vocab_size=size),
        tree_shape(3, 2, 1, 2, 1, vocab_size=size),
        tree_shape(3, 3, 3, vocab_size=size),
        tree_shape(4, 2, 1, 2, vocab_size=size),
    )
    return shapes[seed % 4]


def model_of(seed: int) -> ToyModel:
    return ToyModel(seed, 3 + seed % 2, noise=(0.1, 0.4, 0.9)[seed % 5 % 3], unknown=seed % 2)


def distribution_of_emitted(model: ToyModel, ends: list[End], length: int) -> dict[Tokens, float]:
    """The distribution of the first `length` tokens if rounds end so and the target goes on."""
    mass: dict[Tokens, float] = {}
    for part, kept, distribution in ends:
        for token, probability in enumerate(distribution.tolist()):
            mass[*kept, token] = mass.get((*kept, token), 0.0) + part * probability
    for size in range(1, length):
        for text in [text for text in mass if len(text) == size]:
            part = mass.pop(text)
            for token, probability in enumerate(model.target_distribution(text).tolist()):
                mass[*text, token] = mass.get((*text, token), 0.0) + part * probability
    return mass


def total_variation(model: ToyModel, distribution: dict[Tokens, float], length: int) -> float:
    plain = distribution_of_emitted(model, [(1.0, (), model.target_distribution(()))], length)
    return sum(abs(distribution.get(text, 0.0) - plain.get(text, 0.0)) for text in distribution | plain) / 2


def ends_of(model: ToyModel, trees: list[tuple[DraftTree, float]], rule: str) -> list[End]:
    ends = []
    for tree, mass in trees:
        tokens = tree.tokens[0].tolist()
        if int(tree.num_nodes[0]) == 1:
            ends.append((mass, (), model.target_distribution(())))
            continue
        for outcome in outcomes(tree, model, rule):
            kept = tuple(tokens[node] for node in outcome.nodes[1:])
            ends.append((mass * outcome.probability, kept, outcome.distribution))
    return ends


def expected_length(ends: list[End]) -> float:
    return sum(mass * len(kept) for mass, kept, _ in ends)


class Analytic:
    """Expected lengths by the recursion over siblings, in plain floats, without a tree."""

    def __init__(self, model: ToyModel, shape: Shape, rule: str):
        self.model, self.shape, self.rule = model, shape, rule

    def below(self, node: int, path: Tokens, weight: float) -> float:
        """Tokens kept below a shape's node that is verified with this weight."""
        children = [child for child, inner in enumerate(self.shape.nodes) if inner.parent == node]
        if not children or not weight:
            return 0.0
        owed = [weight * p for p in self.model.target_distribution(path).tolist()]
        forward, row, slot = self.shape.distributions[self.shape.nodes[children[0]].distribution]
        start = self.shape.starts[forward][row]
        q = self.model.draft_distribution(path[: len(path_in(self.shape, start))], slot).tolist()
        return self._without_replacement(children, path, owed, weight, q)

    def _without_replacement(self, children, path, owed, weight, q) -> float:
        if not children or not sum(q):
            return 0.0
        left = [max(w - x, 0.0) for w, x in zip(owed, [*q, 0.0], strict=False)]
        rejected = 1 - weight + sum(left)
        after = [w / rejected for w in left] if sum(left) else left
        kept = 0.0
        for token, x in enumerate(q):
            if x:
                accepted = min(1.0, owed[token] / x)
                rest = [0.0 if other == token else y / (1 - x) if x < 1 else 0.0 for other, y in enumerate(q)]
                later = self._without_replacement(children[1:], path, after, sum(after), rest)
                kept += x * (self._kept(children[0], (*path, token), accepted) + (1 - accepted) * later)
        return kept

    def _kept(self, child: int, path: Tokens, accepted: float) -> float:
        if self.rule == "block":
            return accepted + self.below(child, path, accepted)
        return accepted * (1 + self.below(child, path, 1.0))


def test_the_emitted_distribution_is_the_targets_and_blocks_keep_no_less():
    gained = 0.0
    for seed in range(MODELS):
        model = model_of(seed)
        shape = shape_of(seed, len(model.token_ids))
        trees = all_trees(model, shape)
        assert abs(sum(mass for _, mass in trees) - 1) < 1e-12
        lengths = {}
        for rule in ("token", "block"):
            ends = ends_of(model, trees, rule)
            distribution = distribution_of_emitted(model, ends, shape.height + 1)
            assert total_variation(model, distribution, shape.height + 1) < 1e-12, (seed, rule)
            lengths[rule] = expected_length(ends)
            analytic = Analytic(model, shape, rule).below(0, (), 1.0)
            assert abs(lengths[rule] - analytic) < 1e-9, (seed, rule)
        assert lengths["block"] >= lengths["token"] - 1e-12, seed
        gained += lengths["block"] - lengths["token"]
    assert gained > 0.01


@pytest.mark.parametrize("rule", ["token", "block"])
def test_tokens_that_were_not_drawn_may_stand_beside_drawn_ones(rule):
    """As look-ups do; some of them repeat a drawn token."""
    found = tree_of([(1, 0), (0, 1), (2, 0)])
    for seed in range(MODELS):
        model = model_of(seed)
        shape = tree_shape(2, 2 - seed % 2, 2)
        trees = [(tree.join(found), mass) for tree, mass in all_trees(model, shape)]
        distribution = distribution_of_emitted(model, ends_of(model, trees, rule), 3)
        assert total_variation(model, distribution, 3) < 1e-12, seed


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_tree_that_was_not_drawn_keeps_what_the_walk_keeps(rule):
    tree = tree_of([(1, 0), (0, 1), (2, 0), (2, 1), (1, 3)])
    for seed in range(MODELS):
        model = model_of(seed)
        ends = ends_of(model, [(tree, 1.0)], rule)
        assert total_variation(model, distribution_of_emitted(model, ends, 3), 3) < 1e-12
        distribution = model.target_distribution
        walk = distribution(())[1] * (1 + distribution((1,))[0] + distribution((1,))[2]) + distribution(())[2] * (
            1 + distribution((2,))[1]
        )
        assert abs(expected_length(ends) - float(walk)) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("fault", ["NaN", "nothing", "a token too far", "a token below 0"])
def test_draws_whose_distribution_cannot_be_read_count_as_not_drawn(rule, fault):
    for seed in range(6):
        model = model_of(seed)
        shape = shape_of(seed, len(model.token_ids))
        trees = [(unreadable(tree, fault), mass) for tree, mass in all_trees(model, shape)]
        distribution = distribution_of_emitted(model, ends_of(model, trees, rule), shape.height + 1)
        assert total_variation(model, distribution, shape.height + 1) < 1e-12, seed


def unreadable(tree: DraftTree, fault: str) -> DraftTree:
    """The tree with its last distribution, or the tokens of all distributions, made something else."""
    log_probs, ids = tree.distributions.log_probs.clone(), tree.distributions.token_ids.clone()
    if fault.startswith("a token"):
        ids[0] = 99 if fault == "a token too far" else -1
    else:
        log_probs[:, -1] = math.nan if fault == "NaN" else -math.inf
    return replace(tree, distributions=replace(tree.distributions, log_probs=log_probs, token_ids=ids))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_distribution_of_one_token_has_no_second_draw(rule):
    """Where float64 knows no other token, a later sibling is no draw of it and is not kept for one."""
    distributions = DraftDistributions(
        torch.tensor([[[0.0, -5000.0, -6000.0]]]), torch.arange(3), torch.tensor([[-1, 0, 0, 0]])
    )
    tree = replace(tree_of([(0, 0), (1, 0), (2, 0)]), distributions=distributions)
    for seed in range(MODELS):
        model = ToyModel(seed, 3, noise=0.4)
        assert (
            total_variation(model, distribution_of_emitted(model, ends_of(model, [(tree, 1.0)], rule), 2), 2) < 1e-12
        )


def test_the_enumeration_notices_a_distribution_that_was_misreported():
    """Drawn from one distribution, verified against another."""
    model, shape = model_of(1), tree_shape(2, 2, 2)
    trees = [
        (
            replace(tree, distributions=replace(tree.distributions, log_probs=tree.distributions.log_probs.flip(1))),
            mass,
        )
        for tree, mass in all_trees(model, shape)
    ]
    for rule in ("token", "block"):
        assert total_variation(model, distribution_of_emitted(model, ends_of(model, trees, rule), 3), 3) > 1e-3


class ManyCoins:
    """Real coins for many rounds at once, all of which have met the same ones so far."""

    def __init__(self, fallen: tuple[bool, ...], rounds: int, pending: list):
        self._given, self._fallen, self._rounds, self._pending = fallen, [], rounds, pending

    def accept(self, probability: float) -> bool:
        if len(self._fallen) < len(self._given):
            self._fallen.append(self._given[len(self._fallen)])
            return self._fallen[-1]
        accepted = int((torch.rand(self._rounds, dtype=torch.float64) < probability).sum())
        if 0 < accepted < self._rounds:
            self._pending.append(((*self._fallen, True), accepted))
            self._rounds -= accepted
            accepted = 0
        self._fallen.append(accepted > 0)
        return accepted > 0

    def draw(self, mass: torch.Tensor) -> int:
        self.counts = torch.multinomial(mass, self._rounds, replacement=True).bincount(minlength=len(mass)).tolist()
        return 0


def thrown(model: ToyModel, tree: DraftTree, rule: str, rounds: int) -> dict[Tokens, int]:
    """What so many rounds with real coins emit."""
    counts: dict[Tokens, int] = {}
    pending: list[tuple[tuple[bool, ...], int]] = [((), rounds)]
    while pending:
        fallen, rounds = pending.pop()
        coins = ManyCoins(fallen, rounds, pending)
        walk = SampledVerifier(model, rule, coins)(tree, [True], never_select, never_stop)
        kept = tuple(walk.tokens[0, :-1].tolist())
        for token, count in enumerate(coins.counts):
            counts[*kept, token] = counts.get((*kept, token), 0) + count
    return counts


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_distribution_with_real_draws_and_real_coins(rule):
    torch.manual_seed(1)
    model, runs = ToyModel(5, 4, 0.5, unknown=1), 200_000
    draw = gumbel_draw(torch.Generator().manual_seed(2))
    tree = model.grow(tree_shape(4, 2, 2), draw, runs)
    counts: dict[Tokens, int] = {}
    for one, rounds in distinct(tree, torch.ones(runs, dtype=torch.float64)):
        for text, count in thrown(model, one, rule, int(rounds)).items():
            counts[text] = counts.get(text, 0) + count
    for size in (1, 2):  # the target goes on where a round ended early
        for text in [text for text in counts if len(text) == size]:
            rounds = counts.pop(text)
            if rounds:
                drawn = torch.multinomial(model.target_distribution(text), rounds, replacement=True).bincount(
                    minlength=4
                )
                for token, count in enumerate(drawn.tolist()):
                    counts[*text, token] = counts.get((*text, token), 0) + count
    assert sum(counts.values()) == runs
    assert_drawn_from(distribution_of_emitted(model, [(1.0, (), model.target_distribution(()))], 3), counts)


def assert_drawn_from(distribution: dict[Tokens, float], counts: dict[Tokens, int]) -> None:
    """Chi-squared, six standard deviations wide."""
    runs = sum(counts.values())
    assert not any(count for text, count in counts.items() if not distribution[text])
    cells = [(runs * chance, counts.get(text, 0)) for text, chance in distribution.items() if chance]
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    degrees = len(cells) - 1
    assert degrees > 2 and statistic < degrees + 6 * (2 * degrees) ** 0.5


def test_the_global_coins():
    torch.manual_seed(0)
    coins = GlobalCoins()
    assert all(coins.accept(1.0) and not coins.accept(0.0) for _ in range(100))
    heads = sum(coins.accept(0.3) for _ in range(4000))
    assert abs(heads - 1200) < 6 * (4000 * 0.3 * 0.7) ** 0.5
    mass = torch.tensor([0.2, 0.0, 0.6], dtype=torch.float64)
    drawn = [coins.draw(mass) for _ in range(4000)]
    assert drawn.count(1) == 0 and abs(drawn.count(2) - 3000) < 6 * (4000 * 0.75 * 0.25) ** 0.5


class Scripted(GlobalCoins):
    """Accepts everything, and draws a given token."""

    def accept(self, probability: float) -> bool:
        return True

    def draw(self, mass: torch.Tensor) -> int:
        return 3


class Kept(ToyModel):
    """A target that has a token for everything and notes what was kept."""

    def __init__(self):
        super().__init__(0, 4, 0.0)
        self.kept: list[tuple[int, int]] = []

    def distribution(self, row: int, node: int, path: list[int]) -> torch.Tensor:
        return torch.full((4,), 0.25, dtype=torch.float64)

    def keep(self, row: int, node: int) -> None:
        self.kept.append((row, node))


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("emitted", [1, 2, 3, 4])
def test_nothing_is_emitted_after_a_stop(rule, emitted):
    target, told = Kept(), []

    def stop(row: int, token: int) -> bool:
        told.append(token)
        return len(told) == emitted

    verify = SampledVerifier(target, rule, Scripted())
    walk = verify(tree_of([(1, 0), (2, 1), (0, 2)]), [True], never_select, stop)
    assert told == walk.tokens[0].tolist() == [1, 2, 0, 3][:emitted]
    assert walk.nodes[0].tolist() == [0, 1, 2, 3][:emitted] == [node for _, node in target.kept]
    assert walk.lengths.tolist() == [emitted] and walk.stopped.tolist() == [True]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_rows_are_independent_and_a_row_without_a_draft_decodes_plainly(rule):
    target = Kept()
    tree = tree_of([(1, 0), (2, 1)], [], [(2, 0)], [(1, 0)])
    walk = SampledVerifier(target, rule, Scripted())(tree, [True, True, False, True], lambda row, node: 9, never_stop)
    assert walk.tokens.tolist() == [[1, 2, 3], [9, -1, -1], [-1, -1, -1], [1, 3, -1]]
    assert walk.nodes.tolist() == [[0, 1, 2], [0, -1, -1], [-1, -1, -1], [0, 1, -1]]
    assert target.kept == [(0, 0), (0, 1), (0, 2), (3, 0), (3, 1)]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_all_mass_in_the_tree_and_a_coin_that_falls_wrongly_still_emits_a_token_of_the_target(rule):
    """Only rounding can reject everything then."""

    class Unlucky(GlobalCoins):
        def accept(self, probability: float) -> bool:
            return probability == 1.0 and self.tries.pop()

    model = ToyModel(0, 4, 0.0)
    model.distribution = lambda row, node, path: torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    coins = Unlucky()
    coins.tries = [True, False]
    walk = SampledVerifier(model, rule, coins)(tree_of([(0, 0), (1, 0)]), [True], never_select, never_stop)
    assert walk.tokens[0].tolist()[0] in (0, 1)


def never_select(row: int, node: int) -> int:
    raise AssertionError("a row with a draft is verified by its distributions")


def never_stop(row: int, token: int) -> bool:
    return False
