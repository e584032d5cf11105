# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The draft tree against slow Python versions of the same operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock_hf.trees.distributions import DraftDistributions
from specblock_hf.trees.paths import path_sums_on_host
from specblock_hf.trees.tree import DraftTree


QUICK = settings(max_examples=60, deadline=None)
INF = float("inf")


@dataclass
class Node:
    token: int
    parent: int
    log_prob: float


Row = list[Node]  # node 0 is the root; holes have parent -2


@st.composite
def rows(draw, max_nodes: int = 12, vocab: int = 3) -> Row:
    row = [Node(draw(st.integers(0, 9)), -1, 0.0)]
    for index in range(1, draw(st.integers(1, max_nodes + 1))):
        parents = [-2, *(i for i in range(index) if row[i].parent > -2)]
        parent = draw(st.sampled_from(parents))
        # Multiples of 1/8 add up exactly and tie often.
        log_prob = -INF if parent == -2 else -draw(st.integers(0, 16)) / 8
        row.append(Node(draw(st.integers(0, vocab - 1)), parent, log_prob))
    return row


@st.composite
def batches(draw, size: int = 3) -> list[Row]:
    batch = draw(st.lists(rows(), min_size=size, max_size=size))
    for row in batch:
        row[0].token = batch[0][0].token
    return batch


def tree_of(batch: list[Row], height: int | None = None) -> DraftTree:
    width = max(map(len, batch))
    padded = [row + [Node(0, -2, -INF)] * (width - len(row)) for row in batch]
    origin = [[[i % 2, i] if node.parent >= 0 else [-1, -1] for i, node in enumerate(row)] for row in padded]
    return DraftTree(
        tokens=torch.tensor([[node.token for node in row] for row in padded]),
        parents=torch.tensor([[node.parent for node in row] for row in padded]),
        log_probs=torch.tensor([[node.log_prob for node in row] for row in padded]),
        origin=torch.tensor(origin),
        height=height,
    )


def rows_of(tree: DraftTree) -> list[Row]:
    fields = (tree.tokens.tolist(), tree.parents.tolist(), tree.log_probs.tolist())
    return [[Node(*node) for node in zip(*row, strict=True)] for row in zip(*fields, strict=True)]


def line(row: Row, node: int) -> list[int]:
    """The nodes from the root to `node`."""
    parent = row[node].parent
    return [*line(row, parent), node] if parent >= 0 else [node]


def spelled(row: Row, node: int) -> tuple[int, ...]:
    return tuple(row[i].token for i in line(row, node)[1:])


def height_of(batch: list[Row]) -> int:
    return max(len(line(row, node)) - 1 for row in batch for node in range(len(row)))


def drafted(row: Row) -> list[int]:
    return [i for i, node in enumerate(row) if node.parent >= 0]


def cumulative(row: Row, node: int) -> float:
    return sum(row[i].log_prob for i in line(row, node))


def by_path(row: Row) -> dict[tuple[int, ...], float]:
    """Cumulative log-prob of every path of a row without copies."""
    paths = {spelled(row, node): cumulative(row, node) for node in drafted(row)}
    assert len(paths) == len(drafted(row)), "a path occurs twice"
    return paths


def assert_well_formed(row: Row) -> None:
    assert row[0].parent == -1 and row[0].log_prob == 0
    for index, node in enumerate(row[1:], start=1):
        if node.parent == -2:
            assert node.log_prob == -INF
        else:
            assert 0 <= node.parent < index and row[node.parent].parent != -2


def test_root_is_a_tree_without_a_draft():
    tree = DraftTree.root(torch.tensor([7, 9]))
    assert rows_of(tree) == [[Node(7, -1, 0.0)], [Node(9, -1, 0.0)]]
    assert tree.origin.tolist() == [[[-1, -1]], [[-1, -1]]]
    assert tree.num_nodes.tolist() == [1, 1]
    assert tree.depths().tolist() == [[0], [0]] and tree.ancestors().tolist() == [[[True]], [[True]]]
    assert tree.merge_duplicates().prune(4).tokens.tolist() == [[7], [9]]


@QUICK
@given(batches(), st.booleans())
def test_derived_quantities(batch, tell_height):
    tree = tree_of(batch, height_of(batch) if tell_height else None)
    padded = rows_of(tree)
    assert tree.num_nodes.tolist() == [1 + len(drafted(row)) for row in batch]
    assert tree.depths().tolist() == [[len(line(row, i)) - 1 for i in range(len(row))] for row in padded]
    assert tree.cumulative_log_probs().tolist() == [[cumulative(row, i) for i in range(len(row))] for row in padded]
    seen = [[[j in line(row, i) for j in range(len(row))] for i in range(len(row))] for row in padded]
    assert tree.ancestors().tolist() == seen


def merged_as_released(row: Row) -> dict[tuple[int, ...], float]:
    """The release's merge to the letter: level by level, the likeliest of equal siblings gets the others' children."""
    parents = [node.parent for node in row]
    scores = [cumulative(row, node) for node in range(len(row))]
    depth = [len(line(row, node)) - 1 for node in range(len(row))]
    for level in range(1, max(depth) + 1):
        groups: dict[tuple[int, int], list[int]] = {}
        for node in drafted(row):
            if depth[node] == level:
                groups.setdefault((parents[node], row[node].token), []).append(node)
        for copies in groups.values():
            winner = max(copies, key=lambda node: scores[node])
            for loser in set(copies) - {winner}:
                scores[loser] = None
                parents = [winner if parent == loser else parent for parent in parents]
    return {spelled(row, node): scores[node] for node in drafted(row) if scores[node] is not None}


def merged_with_recomputation(row: Row) -> dict[tuple[int, ...], float]:
    """The best log-prob of each path's copies, added up along the path."""
    best: dict[tuple[int, ...], float] = {}
    for node in drafted(row):
        path = spelled(row, node)
        best[path] = max(best.get(path, -INF), row[node].log_prob)
    return {path: sum(best[path[: i + 1]] for i in range(len(path))) for path in best}


@QUICK
@given(batches())
def test_merge_duplicates(batch):
    for recompute, expected in ((True, merged_with_recomputation), (False, merged_as_released)):
        merged = rows_of(tree_of(batch).merge_duplicates(recompute))
        for row, result in zip(batch, merged, strict=True):
            assert_well_formed(result)
            assert by_path(result) == expected(row)


def test_children_of_a_merged_copy_gain_from_the_better_copy():
    row = [Node(0, -1, 0.0), Node(1, 0, -1.0), Node(1, 0, -0.5), Node(2, 1, -0.25)]
    assert by_path(rows_of(tree_of([row]).merge_duplicates())[0]) == {(1,): -0.5, (1, 2): -0.75}
    assert by_path(rows_of(tree_of([row]).merge_duplicates(recompute=False))[0]) == {(1,): -0.5, (1, 2): -1.25}


def test_different_paths_do_not_collide():
    row, level = [Node(0, -1, 0.0)], [0]
    for _ in range(3):
        first = len(row)
        row += [Node(token, parent, -1.0) for parent in level for token in range(20)]
        level = list(range(first, len(row)))
    tree = tree_of([row], height=3).merge_duplicates()
    assert tree.num_nodes.tolist() == [1 + 20 + 400 + 8000]


@QUICK
@given(batches(), st.lists(st.integers(0, 14), min_size=3, max_size=3))
def test_prune_keeps_the_likeliest_tree(batch, budgets):
    tree = tree_of(batch)
    pruned = tree.prune(tuple(budgets))
    assert pruned.tokens.shape[1] == 1 + min(max(budgets), tree.tokens.shape[1] - 1)
    for row, result, budget in zip(batch, rows_of(pruned), budgets, strict=True):
        assert_well_formed(result)
        kept = drafted(result)
        assert kept == list(range(1, 1 + min(budget, len(drafted(row)))))
        scores = sorted((cumulative(row, node) for node in drafted(row)), reverse=True)
        assert sorted((cumulative(result, node) for node in kept), reverse=True) == scores[:budget]
        everything = [(spelled(row, node), cumulative(row, node)) for node in drafted(row)]
        for node in kept:
            everything.remove((spelled(result, node), cumulative(result, node)))


@QUICK
@given(batches(), st.integers(1, 14))
def test_prune_puts_the_likeliest_path_first(batch, budget):
    for result in rows_of(tree_of(batch).prune(budget)):
        node = 0
        while children := [child for child in drafted(result) if result[child].parent == node]:
            assert node + 1 in children
            assert result[node + 1].log_prob == max(result[child].log_prob for child in children)
            node += 1
        rest = [cumulative(result, other) for other in drafted(result) if other > node]
        assert rest == sorted(rest, reverse=True)


def test_prune_keeps_each_nodes_origin():
    row = [Node(0, -1, 0.0), Node(1, 0, -3.0), Node(2, 0, -1.0), Node(3, 2, -1.0)]
    pruned = tree_of([row]).prune(2)
    assert pruned.tokens.tolist() == [[0, 2, 3]]
    assert pruned.origin.tolist() == [[[-1, -1], [0, 2], [1, 3]]]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("broken", [math.nan, 1e-3, INF, -INF])
def test_a_broken_drafter_cannot_break_the_tree(broken, recompute):
    row = [Node(0, -1, 0.0), Node(1, 0, -1.0), Node(2, 1, broken), Node(3, 2, -1.0), Node(4, 3, broken)]
    for budget in range(5):
        pruned = tree_of([row]).merge_duplicates(recompute).prune(budget)
        assert pruned.tokens.tolist() == [[0, 1, 2, 3, 4][: budget + 1]]
        assert pruned.parents.tolist() == [[-1, 0, 1, 2, 3][: budget + 1]]


@QUICK
@given(batches(), st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_limit_depth(batch, depths):
    limited = tree_of(batch, height_of(batch)).limit_depth(depths)
    assert limited.max_depth == min(max(depths), height_of(batch))
    for row, result, depth in zip(batch, rows_of(limited), depths, strict=True):
        assert_well_formed(result)
        wanted = [node for node in drafted(row) if len(line(row, node)) - 1 <= depth]
        assert drafted(result) == wanted
        assert [result[node] for node in wanted] == [row[node] for node in wanted]


@QUICK
@given(batches(), batches())
def test_merge_is_the_union(batch, other):
    union = tree_of(batch, height_of(batch)).merge(tree_of(other, height_of(other)))
    assert union.max_depth == max(height_of(batch), height_of(other))
    for row, addition, result in zip(batch, other, rows_of(union), strict=True):
        assert_well_formed(result)
        shift = len(row) - 1
        both = row + [Node(n.token, n.parent + shift * (n.parent > 0), n.log_prob) for n in addition[1:]]
        assert by_path(result) == merged_with_recomputation(both)


@QUICK
@given(batches(), st.lists(st.integers(0, 14), min_size=3, max_size=3), st.integers(0, 4))
def test_a_batch_equals_its_rows(batch, budgets, depth):
    """Every operation gives the same nodes in the same order, padding beyond a row's own width aside."""
    whole = tree_of(batch)
    operations = {
        "merge_duplicates": lambda tree, _: tree.merge_duplicates(),
        "as released": lambda tree, _: tree.merge_duplicates(recompute=False),
        "prune": lambda tree, rows: tree.prune([budgets[row] for row in rows]),
        "limit_depth": lambda tree, _: tree.limit_depth(depth),
        "merge": lambda tree, _: tree.merge(tree).prune(20),
    }
    for name, operation in operations.items():
        result = rows_of(operation(whole, range(3)))
        for i, row in enumerate(batch):
            alone = rows_of(operation(tree_of([row]), [i]))[0]
            assert [n for n in result[i] if n.parent > -2] == [n for n in alone if n.parent > -2], name


def test_nothing_depends_on_the_values():
    """Tensors without data refuse whatever would have to wait for the device or give a shape that depends on it."""
    tokens = torch.empty(2, 9, dtype=torch.long, device="meta")
    log_probs = torch.empty(2, 9, device="meta")
    tree = DraftTree(tokens, tokens, log_probs, tokens.unsqueeze(-1).expand(-1, -1, 2), height=4)
    pruned = tree.merge(tree).merge_duplicates(recompute=False).limit_depth(2).prune((3, 5))
    assert pruned.tokens.shape == (2, 6) and pruned.max_depth == 2
    assert pruned.ancestors().shape == (2, 6, 6) and pruned.depths().shape == (2, 6)
    assert pruned.num_nodes.shape == (2,)


@pytest.mark.parametrize("budget", [(1,), (1, 2, 3), -1, (2, -1)])
def test_a_limit_needs_one_number_per_row(budget):
    tree = DraftTree.root(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"pass one number >= 0, or one for each row"):
        tree.prune(budget)
    with pytest.raises(ValueError, match=r"pass one number >= 0, or one for each row"):
        tree.limit_depth(budget)


class Letters:
    def decode(self, token_ids: list[int]) -> str:
        return "".join("abcdefgh"[i] for i in token_ids)


def test_to_text():
    half, quarter = math.log(0.5), math.log(0.25)
    row = [Node(0, -1, 0.0), Node(1, 0, quarter), Node(2, 0, half), Node(3, 2, half), Node(4, 2, quarter)]
    row += [Node(0, -2, -INF), Node(5, 3, 0.0), Node(6, 1, quarter)]
    tree = tree_of([[Node(7, -1, 0.0)], row])
    assert tree.to_text(Letters(), row=1, accepted=[0, 2, 4]).splitlines() == [
        "'a' *",
        "├─ 'c' 0.500 (0, 2) *",
        "│  ├─ 'd' 0.500 (1, 3)",
        "│  │  └─ 'f' 1.000 (0, 6)",
        "│  └─ 'e' 0.250 (0, 4) *",
        "└─ 'b' 0.250 (1, 1)",
        "   └─ 'g' 0.250 (1, 7)",
    ]
    assert tree.to_text(Letters()) == "'h'"


def chain_and_siblings(probabilities: list[list[float]], parents: list[list[int]]) -> DraftTree:
    """Rows of the same width with these conditional probabilities."""
    shape = torch.tensor(parents)
    origin = torch.zeros(*shape.shape, 2, dtype=torch.long)
    return DraftTree(torch.arange(shape.shape[1]).expand_as(shape), shape, torch.tensor(probabilities).log(), origin)


@pytest.mark.parametrize(
    ("at_least", "parents"), [(0.29, [[-1, 0, 0, 1]]), (0.31, [[-1, 0]]), (0.7, [[-1]]), (0.1, [[-1, 0, 0, 1, 3]])]
)
def test_nodes_that_are_not_worth_it_leave_with_their_columns(at_least, parents):
    tree = chain_and_siblings([[1.0, 0.6, 0.3, 0.5, 0.5]], [[-1, 0, 0, 1, 3]])  # paths: 0.6, 0.3, 0.3, 0.15
    assert tree.keep_likely(0.0) is tree
    assert tree.keep_likely(at_least).parents.tolist() == parents


def test_a_batch_is_as_wide_as_the_row_with_most_worthwhile_nodes():
    tree = chain_and_siblings([[1.0, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.1]], [[-1, 0, 1, 2], [-1, 0, 0, 0]])
    kept = tree.keep_likely(0.2)
    assert kept.parents.tolist() == [[-1, 0, 1], [-1, 0, 0]]
    assert tree.keep_likely(0.3).parents.tolist() == [[-1, 0, -2], [-1, 0, 0]]


@pytest.mark.parametrize(
    ("multiple", "parents"),
    [
        (2, [[-1, 0, 1, 0], [-1, 0, 0, 0]]),  # three are worth it: the fourth is the next
        (3, [[-1, 0, 1], [-1, 0, 0]]),
        (4, [[-1, 0, 1, 0], [-1, 0, 0, 0]]),
        (8, [[-1, 0, 1, 0, 2], [-1, 0, 0, 0, -2]]),  # as many as there are
    ],
)
def test_worthwhile_nodes_are_filled_up_to_a_multiple(multiple, parents):
    tree = chain_and_siblings(
        [[1.0, 0.5, 0.5, 0.125, 0.125], [1.0, 0.5, 0.25, 0.125, 0.0]], [[-1, 0, 1, 0, 2], [-1, 0, 0, 0, -2]]
    )
    kept = tree.keep_likely(0.2, multiple=multiple)
    assert kept.parents.tolist() == parents
    assert kept.num_nodes.tolist() == [sum(p > -2 for p in row) for row in parents]
    assert tree.keep_likely(0.0, multiple=multiple) is tree


def test_a_drawn_tree_stays_whole():
    tree = chain_and_siblings([[1.0, 0.01]], [[-1, 0]])
    tree.distributions = DraftDistributions(torch.zeros(1, 1, 3), torch.arange(3), torch.tensor([[-1, 0]]))
    assert tree.keep_likely(0.5) is tree


@QUICK
@given(batches(), st.sets(st.integers(0, 4), min_size=3, max_size=3), st.booleans())
def test_some_rows_of_a_larger_batch(batch, places, drawn):
    tree = tree_of(batch, height_of(batch))
    width = tree.tokens.shape[1]
    if drawn:
        kinds = torch.arange(3 * width).view(3, width) % 2 - 1
        tree.distributions = DraftDistributions(torch.randn(3, 2, 4), torch.arange(4), kinds)
    rows, roots = sorted(places), torch.tensor([3, 1, 4, 1, 5])
    roots[rows] = tree.tokens[:, 0]
    spread = tree.scatter_rows(rows, roots)
    own = rows_of(spread)
    assert [own[row] for row in rows] == rows_of(tree) and spread.height == tree.height
    assert spread.origin[rows].equal(tree.origin)
    for row in set(range(5)) - places:
        assert own[row] == [Node(roots[row], -1, 0.0)] + [Node(0, -2, -INF)] * (width - 1)
        assert (spread.origin[row] == -1).all()
    if drawn:
        assert spread.distributions.log_probs[rows].equal(tree.distributions.log_probs) and spread.distributions.rows[
            rows
        ].equal(kinds)
        assert spread.distributions.token_ids is tree.distributions.token_ids and len(spread.distributions.rows) == 5


@QUICK
@given(batches(), st.integers(0, 3))
def test_padding_leaves_the_nodes_alone(batch, added):
    tree = tree_of(batch)
    size = tree.tokens.shape[1]
    padded = tree.pad(size + added)
    assert torch.equal(padded.pack().parents, tree.pack().parents) and torch.equal(padded.num_nodes, tree.num_nodes)
    assert torch.equal(padded.depths()[:, :size], tree.depths()) and not padded.depths()[:, size:].any()
    seen = padded.ancestors()
    assert torch.equal(seen[:, :size, :size], tree.ancestors())
    assert torch.equal(seen[:, size:], torch.eye(size + added, dtype=torch.bool)[size:].expand(len(batch), -1, -1))
    assert not seen[:, :size, size:].any() and (padded.cumulative_log_probs()[:, size:] == -INF).all()


@QUICK
@given(batches(), st.floats(1e-6, 1.0), st.integers(2, 5))
def test_what_is_kept_of_each_row_is_what_pruning_keeps(batch, at_least, multiple):
    tree = tree_of(batch)
    totals = tree.cumulative_log_probs()
    for row in range(len(tree.parents)):
        on_host = path_sums_on_host(tree.parents[row].tolist(), tree.log_probs[row].tolist())
        assert on_host == pytest.approx(totals[row].tolist(), abs=1e-4)
    kept = tree.keep_likely(at_least, multiple=multiple)
    worth = int((totals >= math.log(at_least)).sum(1).max())
    wide = min(-(-worth // multiple) * multiple, tree.tokens.shape[1])
    assert kept.tokens.shape[1] == wide and kept.max_depth <= tree.max_depth
    if wide < tree.tokens.shape[1]:
        pruned = tree.prune(wide - 1)
        assert torch.allclose(
            kept.cumulative_log_probs().sort(1).values, pruned.cumulative_log_probs().sort(1).values, atol=1e-5
        )
        for row in kept.parents.tolist():
            assert all(parent < node for node, parent in enumerate(row))
