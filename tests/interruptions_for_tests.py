# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a user hands to a call to hear of its tokens, and how it may end the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from targets_for_tests import config_of
from torch import nn
from transformers.generation.streamers import BaseStreamer

from specblock_hf import DraftingCallback
from specblock_hf.drafting.drafter import TreeDrafter


class Broken(RuntimeError):
    """Something of the user's raises."""


class Interrupted(KeyboardInterrupt):
    """The user presses a key."""


class Gone(SystemExit):
    """The process is told to go."""


ERRORS: dict[str, type[BaseException]] = {"error": Broken, "interrupt": Interrupted, "exit": Gone}


class Ended:
    """
    Something that the user's code calls again and again.

    Args:
        error (`type`): What it raises in the end.
        left (`int`): Calls that go well.
    """

    def __init__(self, error: type[BaseException], left: int):
        self.error, self.left = error, left

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error("ended by the user")


class Listener(BaseStreamer):
    """Keeps the tokens of one prompt; `ended` is called after each."""

    def __init__(self, ended: Callable[[], None] | None = None):
        self.tokens: list[int] | None = None
        self.ended = ended

    def put(self, value: torch.Tensor) -> None:
        if self.tokens is None:
            self.tokens = []  # it was the prompt
            return
        self.tokens += value.flatten().tolist()
        if self.ended is not None:
            self.ended()

    def end(self) -> None:
        pass


class Watch(DraftingCallback):
    """Counts what a call commits and how wide its trees are; `ended` is called at `event`."""

    def __init__(self, event: str = "", ended: Callable[[], None] | None = None):
        self.commits = self.widest = 0
        self.event, self.ended = event, ended

    def _at(self, event: str) -> None:
        if event == self.event:
            self.ended()

    def on_generate_begin(self, call) -> None:
        self._at("on_generate_begin")

    def on_prompt(self, call, pairs) -> None:
        self._at("on_prompt")

    def on_draft(self, call, tree) -> None:
        self.widest = max(self.widest, tree.tokens.shape[1] - 1)
        self._at("on_draft")

    def on_verify(self, call, tree, scored) -> None:
        self._at("on_verify")

    def on_commit(self, call, tree, scored, walk, pairs) -> None:
        self.commits += 1
        self._at("on_commit")

    def on_generate_end(self, call) -> None:
        self._at("on_generate_end")


@contextmanager
def interrupted(by: str, ended: Ended | None, drafter: TreeDrafter, target: Any) -> Iterator[None]:
    """The drafter or the target raises in the middle of its work."""
    if by == "drafter":
        propose = drafter.propose
        drafter.propose = lambda *args: ended() or propose(*args)
        try:
            yield
        finally:
            del drafter.propose
    elif by == "target":
        depth = config_of(target).get_text_config().num_hidden_layers
        layers = next(m for m in target.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        # The layers before it have written to the cache already.
        handle = layers[-1].register_forward_pre_hook(ended)
        try:
            yield
        finally:
            handle.remove()
    else:
        yield
