# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""ParallelSpec (https://huggingface.co/papers/2410.05589): EAGLE's network, K tokens in one forward."""

from ..common.layout import UnreadLayout
from ..common.registry import register_drafter
from .configuration import ParallelSpecConfig
from .drafting import ParallelSpecDrafter


UNREAD = UnreadLayout(
    "peagle",
    "P-EAGLE",
    "it has several layers and one mask for all places",
    architectures=("PEagleDraftModel", "PEagleSpeculator"),
    speculators="peagle",
    hub_words=("eagle",),
)

register_drafter(ParallelSpecConfig, ParallelSpecDrafter, layouts=[UNREAD])

__all__ = ["ParallelSpecConfig", "ParallelSpecDrafter"]
