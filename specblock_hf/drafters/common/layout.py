# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the published layouts of drafters have in common."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from transformers import PreTrainedConfig


Tensors = dict[str, torch.Tensor]


class Layout(StrEnum):
    """Who wrote a checkpoint, as its `config.json` tells."""

    OURS = "specblock_hf"
    SPECBLOCK = "specblock"
    SAFEAILAB = "safeailab"
    SGLANG = "sglang"
    SPECULATORS = "speculators"
    DFLASH = "dflash"
    DSPARK = "dspark"


def rope_parameters_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers 5 keeps it. The authors of both methods mean 10000 where nothing is said."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", "default")
    return {"rope_type": kind, **scaling, "rope_theta": float(config.get("rope_theta", 10000.0))}


def target_fields(target: PreTrainedConfig) -> dict[str, Any]:
    text = target.get_text_config()
    return {
        "target_num_layers": text.num_hidden_layers,
        "target_name_or_path": target.name_or_path or None,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
    }
