# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""ParallelSpec (https://huggingface.co/papers/2410.05589): EAGLE's network, K tokens in one forward."""

from ..common.registry import register_drafter
from .configuration import ParallelSpecConfig
from .drafting import ParallelSpecDrafter


register_drafter(ParallelSpecConfig, ParallelSpecDrafter)

__all__ = ["ParallelSpecConfig", "ParallelSpecDrafter"]
