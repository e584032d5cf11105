# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of trees: where nodes go, and that what is drawn is what the tree says."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import tiny_tokenizer

from specblock_hf.trees.picture import (
    COLOURS,
    FOUND_COLOUR,
    KEPT_COLOUR,
    LONGEST_TEXT,
    TreePanel,
    place_nodes,
    save_trees,
)
from specblock_hf.trees.tree import FOUND, DraftTree


pytest.importorskip("matplotlib")


class Spelled:
    """Decodes ids into given texts."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, token_ids):
        return self.texts[token_ids[0]]


def tree_of(tokens, parents, log_probs=None, forwards=None) -> DraftTree:
    forwards = forwards or [-1] + [0] * (len(tokens) - 1)
    return DraftTree(
        tokens=torch.tensor([tokens]),
        parents=torch.tensor([parents]),
        log_probs=torch.tensor([log_probs or [0.0] + [-1.0] * (len(tokens) - 1)]),
        origin=torch.tensor([[[forward, 0] for forward in forwards]]),
    )


def test_the_likeliest_path_is_straight_and_the_others_stand_below():
    #  0 -> 1 (-2) -> 3
    #    -> 2 (-1) -> 4 (-3), 5 (-2); padding last
    places = place_nodes([-1, 0, 0, 1, 2, 2, -2], [0.0, -2.0, -1.0, -1.0, -3.0, -2.0, -9.0])
    assert places == {0: (0, 0), 2: (1, 0), 5: (2, 0), 4: (2, 1), 1: (1, 2), 3: (2, 2)}


@st.composite
def trees(draw):
    size = draw(st.integers(1, 24))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, size)]
    log_probs = [0.0] + [draw(st.floats(-5, 0)) for _ in range(1, size)]
    return parents, log_probs


@given(trees())
def test_no_two_nodes_share_a_place_and_every_leaf_has_its_line(tree):
    parents, log_probs = tree
    places = place_nodes(parents, log_probs)
    assert places.keys() == set(range(len(parents))) and len(set(places.values())) == len(parents)
    assert all(places[node][0] == places[parents[node]][0] + 1 for node in range(1, len(parents)))
    leaves = set(range(len(parents))) - set(parents)
    assert {line for _, line in places.values()} == set(range(len(leaves)))
    for node in range(len(parents)):
        children = [child for child in range(1, len(parents)) if parents[child] == node]
        straight = [child for child in children if places[child][1] == places[node][1]]
        assert len(straight) == bool(children)
        assert all(log_probs[straight[0]] >= log_probs[child] for child in children)


def draw(tmp_path, tree, accepted=(), tokenizer=None) -> str:
    path = tmp_path / "new" / "tree.svg"
    save_trees(path, [TreePanel("one", tree, accepted)], tokenizer or tiny_tokenizer())
    return path.read_text()


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_an_svg_spells_the_tokens_and_colours_the_forwards(tmp_path):
    # Root a; b by forward 0, c by forward 1, d found; padding spells z.
    svg = draw(tmp_path, tree_of([2, 3, 4, 5, 27], [-1, 0, 1, 0, -2], forwards=[-1, 0, 1, FOUND, -1]))
    assert sorted(texts(svg)[:4]) == ["a", "b", "c", "d"] and "z" not in texts(svg)
    assert {"one", "3 drafted, 0 accepted"} < set(texts(svg))
    assert {"drafter forward 0", "drafter forward 1", "found in the text", "kept by the target"} < set(texts(svg))
    # A box and an entry of the legend each.
    assert [svg.count(colour) for colour in (COLOURS[0], COLOURS[1], FOUND_COLOUR, COLOURS[2])] == [2, 2, 2, 0]


def test_the_accepted_path_is_marked(tmp_path):
    tree = tree_of([2, 3, 4, 5], [-1, 0, 1, 0])
    marks = [draw(tmp_path, tree, accepted).count(KEPT_COLOUR) for accepted in ((), (0,), (0, 1), (0, 1, 2))]
    # The legend; then a box, and for every further node a box and a line.
    assert marks == [1, 2, 4, 6]
    assert "3 drafted, 2 accepted" in draw(tmp_path, tree, (0, 1, 2))


def test_odd_tokens_are_drawn_as_text(tmp_path):
    tokenizer = Spelled(["$", " \n", "x" * 40, "\\frac$"])
    drawn = texts(draw(tmp_path, tree_of([0, 1, 2, 3], [-1, 0, 0, 0]), tokenizer=tokenizer))
    assert {"$", "\u2423\\n", "x" * (LONGEST_TEXT - 1) + "…", "\\\\frac$"} < set(drawn)


def test_the_same_tree_gives_the_same_file(tmp_path):
    tree = tree_of([2, 3, 4], [-1, 0, 1])
    assert draw(tmp_path, tree, (0, 1)) == draw(tmp_path, tree, (0, 1)) != draw(tmp_path, tree, (0,))


def test_two_trees_stand_side_by_side_on_one_scale(tmp_path):
    small, large = tree_of([2, 3], [-1, 0]), tree_of([2, 4, 5, 6], [-1, 0, 0, 0])
    path = tmp_path / "two.svg"
    save_trees(path, [TreePanel("small", small), TreePanel("large", large)], tiny_tokenizer())
    svg = path.read_text()
    assert {"small", "large", "1 drafted, 0 accepted", "3 drafted, 0 accepted"} < set(texts(svg))
    roots = re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>a</text>', svg)
    (left, height), (right, same_height) = roots
    assert float(left) < float(right) and float(height) == pytest.approx(float(same_height), abs=0.1)


def test_a_png_is_one(tmp_path):
    save_trees(tmp_path / "tree.PNG", [TreePanel("one", tree_of([2, 3], [-1, 0]))], tiny_tokenizer())
    assert (tmp_path / "tree.PNG").read_bytes().startswith(b"\x89PNG\r\n")


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tree.jpg is neither an SVG nor a PNG file; end its name in .svg or .png."):
        save_trees(tmp_path / "tree.jpg", [TreePanel("one", tree_of([2, 3], [-1, 0]))], tiny_tokenizer())
