# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the published layouts of drafters have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ...checkpoints.files import WEIGHTS
from ...checkpoints.saving import save_folder_whole


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


def write_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Tensors, mapping: Tensors | None = None
) -> None:
    """Write `config.json`, the weights and maybe `vocab_mapping.pt`: all of them, or nothing."""
    with save_folder_whole(folder, obsolete=WEIGHTS) as written:
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
        if mapping is not None:
            torch.save(mapping, written / "vocab_mapping.pt")
