# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 (https://huggingface.co/papers/2503.01840): one token a forward, from states of three layers."""

from ..common.layout import UnreadLayout
from ..common.registry import register_drafter
from .configuration import Eagle3Config
from .drafting import Eagle3Drafter
from .layouts import DeepSpecLayout, SafeAILabLayout, SGLangLayout, SpeculatorsLayout


UNREAD = [
    UnreadLayout(
        "gemma4-eagle3", "Gemma 4 EAGLE-3", "its layer is Gemma 4's own", architectures=("Gemma4Eagle3Model",)
    ),
    UnreadLayout(
        "mtp",
        "multi-token prediction (MTP)",
        "its layer is one of the target's kind",
        architectures=("MTPDraftModel",),
        speculators="mtp",
        hub_words=("mtp",),
    ),
]

register_drafter(
    Eagle3Config,
    Eagle3Drafter,
    layouts=[*UNREAD, SpeculatorsLayout(), SGLangLayout(), DeepSpecLayout(), SafeAILabLayout()],
)

__all__ = ["Eagle3Config", "Eagle3Drafter"]
