# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 (https://huggingface.co/papers/2503.01840): one token a forward, from states of three layers."""

from ..common.registry import register_drafter
from .configuration import Eagle3Config
from .drafting import Eagle3Drafter
from .layouts import DeepSpecLayout, SafeAILabLayout, SGLangLayout, SpeculatorsLayout


register_drafter(
    Eagle3Config, Eagle3Drafter, layouts=[SpeculatorsLayout(), SGLangLayout(), DeepSpecLayout(), SafeAILabLayout()]
)

__all__ = ["Eagle3Config", "Eagle3Drafter"]
