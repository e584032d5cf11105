# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Queries to a tiny target with a tiny drafter, for the tests of adaptation."""

from __future__ import annotations

from functools import cache

import torch
from conftest import prompt_of, tiny_target

from specblock_hf.adaptation import OnlineAdaptationCallback, UpdateSettings
from specblock_hf.drafters.common.registry import trainable_drafters
from specblock_hf.drafting.drafter import DraftingCallback


GREEDY = {"do_sample": False, "max_new_tokens": 12}
FAST = UpdateSettings(learning_rate=3e-3, steps=1, drift_weight=0.0)
KINDS = tuple(trainable_drafters())


class KeepCalls(DraftingCallback):
    """Keeps every call and what was committed in it."""

    def __init__(self):
        self.commits = []

    def on_commit(self, call, tree, scored, walk, pairs):
        self.commits.append((call, tree, scored, walk, pairs))


def serve(drafter, queries: int, first: int = 0, prompts: int = 4, **options) -> list[list[int]]:
    """Answer so many prompts, which repeat after `prompts`; the texts."""
    target = tiny_target("llama")
    texts = []
    for number in range(first, first + queries):
        output = target.generate(prompt_of(6, number % prompts), assistant_model=drafter, **(GREEDY | options))
        texts.append(output[0].tolist())
    return texts


def plain(queries: int, prompts: int = 4, **options) -> list[list[int]]:
    """The same without a drafter."""
    return [_plain(number % prompts, tuple(options.items())) for number in range(queries)]


@cache
def _plain(seed: int, options: tuple) -> list[int]:
    return tiny_target("llama").generate(prompt_of(6, seed), **(GREEDY | dict(options)))[0].tolist()


def weights_of(drafter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in drafter.parameters_of("full")]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def trainable(name: str, target):
    """A random drafter as `specblock train --drafter NAME` makes it for a target."""
    kind, fields = trainable_drafters()[name]
    if name in ("specblock", "eagle3", "medusa", "parallelspec", "falcon"):
        fields = fields | {"draft_vocab_size": min(20, target.config.vocab_size)}
    torch.manual_seed(3)
    return kind(kind.config_class.for_target(target.config, **fields)).eval()


def adapted(drafter, policy: str = "always", **options) -> OnlineAdaptationCallback:
    """A callback in the same thread, added to the drafter."""
    callback = OnlineAdaptationCallback(policy, **({"background": False, "every": 4} | options))
    drafter.add_callback(callback)
    return callback
