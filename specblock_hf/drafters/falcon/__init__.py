# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Falcon (https://huggingface.co/papers/2412.12639): semi-autoregressive blocks of tokens."""

from ..common.registry import register_drafter
from .configuration import FalconDrafterConfig
from .drafting import FalconDrafter


register_drafter(FalconDrafterConfig, FalconDrafter, trainable={"falcon": {}})

__all__ = ["FalconDrafterConfig", "FalconDrafter"]
