# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""SpecBlock (https://huggingface.co/papers/2605.07243): blocks of tokens, branches where a rank head doubts."""

from ..common.registry import register_drafter
from .configuration import SpecBlockConfig
from .drafting import SpecBlockDrafter
from .layout import ReleaseLayout


register_drafter(SpecBlockConfig, SpecBlockDrafter, layouts=[ReleaseLayout()])

__all__ = ["SpecBlockConfig", "SpecBlockDrafter"]
