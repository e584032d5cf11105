# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Block diffusion: DFlash, DFlash 2, JetSpec and DSpark, blocks of tokens from one forward over masks."""

from ..common.layout import UnreadLayout
from ..common.registry import register_drafter
from .configuration import BlockDiffusionConfig
from .drafting import BlockDiffusionDrafter
from .layouts import DFlashLayout, DSparkLayout, OtherDFlashLayout, SpecForgeDSparkLayout
from .speculators import SpeculatorsBlockLayout


# Asked first, because they call themselves DFlash as well.
UNREAD = [
    UnreadLayout(
        "domino",
        "Domino",
        "a recurrent network over the path corrects its logits",
        architectures=("DominoDraftModel",),
        projector="domino",
        hub_words=("domino",),
    ),
    UnreadLayout("xpress", "XPress", "its network is not known", speculators="xpress", hub_words=("xpress",)),
]

register_drafter(
    BlockDiffusionConfig,
    BlockDiffusionDrafter,
    trainable={"dflash": {}, "jetspec": {"causal": True}},
    layouts=[
        *UNREAD,
        DFlashLayout(),
        DSparkLayout(),
        SpecForgeDSparkLayout(),
        SpeculatorsBlockLayout(),
        OtherDFlashLayout(),
    ],
)

__all__ = ["BlockDiffusionConfig", "BlockDiffusionDrafter"]
