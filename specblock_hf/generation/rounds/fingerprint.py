# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a captured forward depends on beside its inputs and the values of its weights."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.backends import cuda
from transformers import PreTrainedConfig, PreTrainedModel

from ...drafting.drafter import TreeDrafter
from ...foreign_hooks import foreign_hooks
from ...prepacking import float32_is_whole


def fingerprint(*modules: nn.Module) -> Hashable:
    """
    Something that differs once a graph that was captured of these modules may give another result than they do, or
    reads memory that is theirs no more: where weights and buffers are and of which kind, switches and numbers on
    modules (`training`, adapters that are active, disabled or merged, and their scaling), replaced forwards, hooks,
    attention backends, autocast, which kernels torch may take. Values of weights may change in place.
    """
    parts: list[Hashable] = [torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")]
    parts += [torch.get_autocast_dtype(kind) for kind in ("cuda", "cpu")]
    parts += [
        float32_is_whole(),
        *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
    ]
    for root in modules:
        for module in root.modules():
            # Of a drafter what its copy would have, without those who listen to it.
            own = module.__getstate__() if isinstance(module, TreeDrafter) else vars(module)
            parts.append((id(module), type(module), id(own.get("forward"))))
            # On models generate() makes notes of its own, which are private.
            notes = "_" if isinstance(module, PreTrainedModel) else "__"
            parts += [
                (name, _plain(value))
                for name, value in own.items()
                if "hooks" not in name and not name.startswith(notes) and _is_plain(value)
            ]
            parts += [_place(tensor) for tensor in own["_parameters"].values()]
            parts += [_place(tensor) for tensor in own["_buffers"].values()]
            parts += [id(hook) for hook in foreign_hooks(module)]
            if isinstance(own.get("config"), PreTrainedConfig):
                parts.append(own["config"]._attn_implementation)
    return tuple(parts)


def _place(tensor: torch.Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, type(tensor)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple | set):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _plain(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(map(_plain, value))
    return value
