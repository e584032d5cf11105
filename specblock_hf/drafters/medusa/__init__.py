# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Medusa (https://huggingface.co/papers/2401.10774): independent heads on the target's last state."""

from ..common.registry import register_drafter
from .configuration import MedusaConfig
from .drafting import MedusaDrafter


register_drafter(MedusaConfig, MedusaDrafter)

__all__ = ["MedusaConfig", "MedusaDrafter"]
