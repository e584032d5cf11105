# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""One self-contained web page that steps through the rounds of an answer: trees, what was kept, and what it cost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..devices import synchronize
from ..drafting.drafter import DraftingCall, DraftingCallback, TreeDrafter
from ..drafting.pairs import Pairs, Scored
from ..trees.picture import place_nodes
from ..trees.tree import FOUND, DraftTree
from ..trees.verification import Walk


TEMPLATE = Path(__file__).parents[1] / "templates" / "trace.html"

PLACE_OF_DATA = '"DATA"'


class RoundKeeper(DraftingCallback):
    """
    Keeps every round of the one call that it listens to, and shows them as a page.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        device (`torch.device`): Where the target runs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, device: torch.device):
        self.tokenizer = tokenizer
        self.device = device
        self.first: list[str] = []
        self.rounds: list[dict[str, Any]] = []
        self.times: list[float] = []

    def on_draft(self, call: DraftingCall, tree: DraftTree) -> None:
        self._note_time()

    def on_verify(self, call: DraftingCall, tree: DraftTree, scored: Scored) -> None:
        self._note_time()

    def on_commit(self, call: DraftingCall, tree: DraftTree, scored: Scored, walk: Walk, pairs: Pairs) -> None:
        self._note_time()
        emitted = [self.tokenizer.decode([token]) for token in walk.tokens[0].tolist() if token >= 0]
        if len(self.times) == 1:  # the prompt's
            self.first = emitted
        else:
            milliseconds = [1000 * (after - before) for before, after in zip(self.times, self.times[1:], strict=False)]
            kept = {node for node in walk.nodes[0].tolist() if node >= 0}
            self.rounds.append({"nodes": self._nodes(tree, kept), "emitted": emitted, "milliseconds": milliseconds})
        self.times = self.times[-1:]

    def _note_time(self) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def _nodes(self, tree: DraftTree, kept: set[int]) -> list[dict[str, Any]]:
        """Each node's text, place, parent, probability given its parent, origin, and whether it was kept."""
        tokens, parents, origin = tree.tokens[0].tolist(), tree.parents[0].tolist(), tree.origin[0].tolist()
        places = place_nodes(parents, tree.log_probs[0].tolist())
        order = {node: number for number, node in enumerate(places)}
        probabilities = tree.log_probs[0].exp().tolist()
        return [
            {
                "text": self.tokenizer.decode([tokens[node]]),
                "at": place,
                "parent": order[parents[node]] if node else None,
                "probability": round(probabilities[node], 4),
                "forward": "found" if origin[node][0] == FOUND else origin[node][0],
                "slot": origin[node][1],
                "kept": node in kept,
            }
            for node, place in places.items()
        ]

    def page(self, title: str, prompt_ids: torch.LongTensor, shown: int = 1) -> str:
        """
        The rounds as a page that needs no other file.

        Args:
            title (`str`): Of the page.
            prompt_ids (`torch.LongTensor` of shape `[1, T]`): What the call was given.
            shown (`int`, *optional*, defaults to 1): The round that it begins at, if its address names none.
        """
        prompt = self.tokenizer.decode(prompt_ids[0], skip_special_tokens=True)
        data = {"title": title, "prompt": prompt, "first": self.first, "rounds": self.rounds, "shown": shown}
        # Text may hold the end of a script.
        return TEMPLATE.read_text(encoding="utf-8").replace(PLACE_OF_DATA, json.dumps(data).replace("<", "\\u003c"), 1)


def trace_page(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: TreeDrafter,
    prompt_ids: torch.LongTensor,
    title: str,
    **generate_kwargs: Any,
) -> str:
    """
    Generate, and show all rounds on a page that needs no other file.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        drafter ([`TreeDrafter`]): The drafter.
        prompt_ids (`torch.LongTensor` of shape `[1, T]`): One prompt.
        title (`str`): Of the page.
        **generate_kwargs: For `generate()`, such as `max_new_tokens`.

    Returns:
        `str`: The page's HTML. Its times are those of this call, with the keeping of rounds between them.
    """
    keeper = RoundKeeper(tokenizer, target.device)
    drafter.add_callback(keeper)
    try:
        defaults = {"attention_mask": torch.ones_like(prompt_ids)}
        target.generate(prompt_ids, assistant_model=drafter, **(defaults | generate_kwargs))
    finally:
        drafter.remove_callback(keeper)
    return keeper.page(title, prompt_ids)
