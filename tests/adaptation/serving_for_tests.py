# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Queries to a tiny target with a tiny drafter, for the tests of adaptation."""

from __future__ import annotations

import torch
from conftest import prompt_of, tiny_target

from specblock_hf.adaptation import OnlineAdaptationCallback
from specblock_hf.drafting.drafter import DraftingCallback


GREEDY = {"do_sample": False, "max_new_tokens": 12}


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
    target = tiny_target("llama")
    return [
        target.generate(prompt_of(6, number % prompts), **(GREEDY | options))[0].tolist() for number in range(queries)
    ]


def weights_of(drafter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in drafter.parameters_of("full")]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def adapted(drafter, policy: str = "always", **options) -> OnlineAdaptationCallback:
    """A callback in the same thread, added to the drafter."""
    callback = OnlineAdaptationCallback(policy, **({"background": False, "every": 4} | options))
    drafter.add_callback(callback)
    return callback
