# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` for the forwards of rounds of fixed shapes: fewer kernels, in graphs or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ...drafters.common.cache import BlockCache


class FusedNetwork:
    """
    The forward of a drafter that attends to all committed pairs, compiled. The arguments and the result are those of
    the forward itself.

    Args:
        network (`Callable`): The forward.
        options (`dict`): Of `torch.compile`.
    """

    def __init__(self, network: Callable[..., torch.Tensor], options: dict[str, Any]):
        def forward(
            embeds: torch.Tensor,
            conditions: torch.Tensor,
            positions: torch.LongTensor,
            mask: torch.BoolTensor,
            keys: list[torch.Tensor],
            values: list[torch.Tensor],
            columns: torch.LongTensor,
        ) -> torch.Tensor:
            return network(embeds, conditions, positions, mask, _Columns(keys, values, columns))

        self._forward = compiled(forward, options)

    def __call__(
        self,
        embeds: torch.Tensor,
        conditions: torch.Tensor,
        positions: torch.LongTensor,
        mask: torch.BoolTensor,
        cache: BlockCache,
    ) -> torch.Tensor:
        unseen = cache.keys[0].shape[2] - mask.shape[3]
        columns = cache.columns_of(mask.shape[2]).expand(len(embeds), -1)
        mask = nn.functional.pad(mask, (0, unseen))
        return self._forward(embeds, conditions, positions, mask, cache.keys, cache.values, columns)


class _Columns:
    """
    Keys and values of fixed size as an attention layer calls them: it sees all columns, the mask says which.

    Args:
        keys (`list[torch.Tensor]` of shape `[B, heads, columns, head_dim]`): Of every layer.
        values (`list[torch.Tensor]`): Of the same shapes.
        columns (`torch.LongTensor` of shape `[B, Q]`): Where the forward's own go.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], columns: torch.LongTensor):
        self.keys, self.values, self.columns = keys, values, columns

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        for store, new in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            store.scatter_(2, self.columns[:, None, :, None].expand_as(new), new.to(store.dtype))
        return self.keys[layer_idx], self.values[layer_idx]


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """A function compiled for its shapes only, whatever else has been compiled from the same source."""
    # torch counts graphs by code object, up to a limit, and another batch size must not use up this one's.
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, **{"fullgraph": True, "dynamic": False} | options)


def captures_itself(options: Mapping[str, Any]) -> bool:
    """Whether `torch.compile` with these options captures graphs, which cannot be done within those of rounds."""
    mode, more = options.get("mode"), options.get("options") or {}
    captures = options.get("backend") == "cudagraphs" or mode in ("reduce-overhead", "max-autotune")
    return captures or bool(more.get("triton.cudagraphs"))
