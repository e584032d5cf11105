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
"""The draft tree: tokens, parents and log-probabilities of everything that one round proposes. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class DraftTree:
    """
    A batch of draft trees, padded to the widest row. Parents come before their children; node 0 is the last committed token.

    Args:
        tokens (`torch.LongTensor` of shape `[B, N]`): Target token ids.
        parents (`torch.LongTensor` of shape `[B, N]`): Index of the parent in the same row; -1 for the root, -2 for padding.
        log_probs (`torch.Tensor` of shape `[B, N]`): log q(token | parent) by the drafter; 0 for the root, -inf for padding.
        origin (`torch.LongTensor` of shape `[B, N, 2]`): (drafter forward, slot) that proposed the node; -1, -1 for the root.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    log_probs: torch.Tensor
    origin: torch.LongTensor
