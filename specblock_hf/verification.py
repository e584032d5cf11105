# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Walking a scored draft tree: which drafted tokens the target keeps. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from .tree import DraftTree


@dataclass
class Walk:
    """
    What one round emits. Emitted token j of a row was chosen by the target at node j of the row, so the two line up as pairs.

    Args:
        nodes (`torch.LongTensor` of shape `[B, E]`): Kept nodes: the root, then the accepted ones; -1 is padding.
        tokens (`torch.LongTensor` of shape `[B, E]`): Emitted tokens: the accepted ones, then the target's own; -1 is padding.
        lengths (`torch.LongTensor` of shape `[B]`): Emitted tokens of each row; 0 for a row that had finished before.
        stopped (`torch.BoolTensor` of shape `[B]`): The row's last emitted token ends it.
    """

    nodes: torch.LongTensor
    tokens: torch.LongTensor
    lengths: torch.LongTensor
    stopped: torch.BoolTensor


Select = Callable[[int, int], int]
"""`select(row, node)`: the target's token after that node; called once per emitted token, in order."""

Stop = Callable[[int, int], bool]
"""`stop(row, token)`: whether this emitted token ends the row; called once per emitted token, in order."""


class Verifier(Protocol):
    """A rule that turns a drafted tree and the target's laws at its nodes into emitted tokens."""

    def __call__(self, tree: DraftTree, active: list[bool], select: Select, stop: Stop) -> Walk: ...
