# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Block diffusion: DFlash, DFlash 2, JetSpec and DSpark, blocks of tokens from one forward over masks."""

from ..common.registry import register_drafter
from .configuration import BlockDiffusionConfig
from .drafting import BlockDiffusionDrafter
from .layouts import DFlashLayout, DSparkLayout, OtherDFlashLayout


register_drafter(
    BlockDiffusionConfig,
    BlockDiffusionDrafter,
    trainable={"dflash": {}, "jetspec": {"causal": True}},
    layouts=[DFlashLayout(), DSparkLayout(), OtherDFlashLayout()],
)

__all__ = ["BlockDiffusionConfig", "BlockDiffusionDrafter"]
