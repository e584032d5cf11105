# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Weights in the layout that oneDNN multiplies by. On x86 every `nn.Linear` of a PyTorch CPU model brings its weights
into that layout anew in each forward, which takes a round of a few tokens longer than the multiplication itself does:
4 rows by 576 x 16384 weights in float32 took 5.4 ms on two AVX-512 cores, and 1.2 ms with weights brought there once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .locks import DrafterLock
from .twins import Model, copied


MOST_BYTES = 2 << 30
"""Of the copies; a larger target is left as it is unless somebody asks."""

LEAST_BYTES = 1 << 17
"""Of a weight: smaller ones take no time."""

FEW_ROWS = 4
"""Rows by which weights of 16 bits are multiplied sooner than copies of 32, of which there is twice as much."""

LONG_PROMPT = 64
"""Tokens for which copies in 32 bits are worth making at once: reading as many takes longer without them."""

PATIENCE = 4
"""Rounds, of all calls, before weights are copied for them, which takes as long as some five plain steps."""


@dataclass
class Packed:
    """
    A weight's copy.

    Args:
        weight (`torch.Tensor`): In oneDNN's layout, opaque to everything but its products.
        dtype (`torch.dtype`): Of the original.
        sums (`torch.LongTensor` of shape `[out]`):
            Of each row of the original read as integers of 64 bits, which tell whether it is still the same.
        version (`int`): Of the original, which grows with its changes in place.
    """

    weight: torch.Tensor
    dtype: torch.dtype
    sums: torch.LongTensor
    version: int


class PrepackedLinear(nn.Linear):
    """
    A linear layer that multiplies by a copy of its weights: `[..., in]` to `[..., out]`, as `nn.Linear` does. Where
    the copy is in float32 and the weights are not, products are summed in float32, as theirs are, and then rounded.
    """

    packed: torch.Tensor
    own_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        own, kind = self.own_dtype, self.packed.dtype
        if input.dtype != own or (kind != own and input.numel() <= FEW_ROWS * input.shape[-1]):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(kind)
        return torch.ops.mkldnn._linear_pointwise(input.to(kind), self.packed, bias, "none", [], "").to(input.dtype)


class PrepackedWeights:
    """
    Copies of a drafter's weights and its targets' for the rounds of calls on an x86 CPU, and for prompts once they are
    there. The models themselves have no part in it: a call runs second models of the same modules, hooks included, in
    which linear layers use the copies. Whether those are still the models' weights is asked by sums of all bits
    whenever they are lent, and in every round by the versions of the weights. A copied drafter begins without any.

    Args:
        most_bytes (`int`, *optional*, defaults to 2 GiB): Models with larger linear layers are left as they are.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self._packed: Any = WeakTensorKeyDictionary()
        self._waited: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._lock = DrafterLock()

    def __reduce__(self) -> tuple:
        return type(self), (self.most_bytes,)

    def knows(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether there are copies of the weights of all layers, none older than their last change in place."""
        known = (self._packed.get(layer.weight) for layer in layers)
        return all(
            copy is not None and copy.version == version_of([layer.weight])
            for copy, layer in zip(known, layers, strict=True)
        )

    def waits(self, model: nn.Module) -> bool:
        """Whether it is too soon for copies of a model's weights; counts a round that does without."""
        waited = self._waited.get(model, 0)
        self._waited[model] = (waited + 1) % (PATIENCE + 1)
        return waited < PATIENCE

    def lend(self, layers: Iterable[nn.Linear]) -> None:
        """
        Let linear layers multiply by copies.

        Args:
            layers (iterable of `nn.Linear`): Of a second model of the weights, and its own.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            layers = list(layers)
            sums = [layer.weight.detach().view(torch.int64).sum(1) for layer in layers]
            stale, unseen = [], False
            for layer, own in zip(layers, sums, strict=True):
                known = self._packed.get(layer.weight)
                counted = known is not None and known.version != version_of([layer.weight])
                same = known is not None and known.dtype == layer.weight.dtype and torch.equal(known.sums, own)
                stale.append(counted or not same)
                unseen |= not counted and not same
            # Another order of columns changes no sums, and through `.data` no version either. It comes with one of
            # rows elsewhere, and all are copied anew.
            for layer, own, is_stale in zip(layers, sums, stale, strict=True):
                if is_stale or unseen:
                    weight = layer.weight.detach()
                    copy = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype_of_copy(weight.dtype)))
                    self._packed[layer.weight] = Packed(copy, weight.dtype, own, version_of([layer.weight]))
            for layer in layers:
                layer.__class__ = PrepackedLinear
                layer.packed, layer.own_dtype = self._packed[layer.weight].weight, layer.weight.dtype

    def has_room(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether there is something to copy, and not too much."""
        weights = {id(layer.weight): layer.weight for layer in layers}.values()
        return 0 < sum(weight.numel() * dtype_of_copy(weight.dtype).itemsize for weight in weights) <= self.most_bytes


def version_of(weights: Iterable[nn.Parameter]) -> int:
    """Grows with every change of weights in place, as optimisers make them."""
    # What was made in inference mode counts nothing.
    return sum(weight._version for weight in weights if not weight.is_inference())


def fitting(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of a model that would be faster with prepacked weights; none where that is not known."""
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return []
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return []
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    if not float32_is_whole():
        kinds = [dtype for dtype in kinds if dtype_of_copy(dtype) != torch.float32]
    return [module for module in model.modules() if type(module) is nn.Linear and _fits(module, kinds)]


def dtype_of_copy(dtype: torch.dtype) -> torch.dtype:
    """
    Of a copy of weights of this dtype. Processors without products of 16 bits, as many desktops' are, take for 12 rows
    of them five times as long as for 1; in float32 it is hardly longer.
    """
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    return torch.float32


def are_widened(layers: Iterable[nn.Linear]) -> bool:
    """Whether copies of the weights of some of these layers have more bits than they."""
    return any(dtype_of_copy(layer.weight.dtype) != layer.weight.dtype for layer in layers)


def float32_is_whole() -> bool:
    """Whether products of float32 are not to be made of fewer bits, in which the copies would not follow."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # once one library alone was told, as `TrainingArguments(tf32=True)` does
        return False


def _fits(layer: nn.Linear, kinds: list[torch.dtype]) -> bool:
    weight = vars(layer)["_parameters"].get("weight")
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is torch.Tensor
        and weight.device.type == "cpu"
        and weight.dtype in kinds
        and weight.nbytes >= LEAST_BYTES
        and weight.is_contiguous()
        and weight.shape[1] * weight.element_size() % 8 == 0
        and weight.storage_offset() * weight.element_size() % 8 == 0
    )


def prepacked_twin(model: Model, layers: Sequence[nn.Linear], weights: PrepackedWeights) -> Model | None:
    """
    A model that computes what another does, sooner; `None` where the forward of a part was replaced or compiled.

    Args:
        model (`nn.Module`): Not changed; its present hooks are the twin's as well.
        layers (sequence of `nn.Linear`): Those of it that multiply by copies.
        weights ([`PrepackedWeights`]): The copies, of it and others.
    """
    if any(vars(module).get("_compiled_call_impl") for module in model.modules()):
        return None
    try:
        twin = copied(model, {*layers}, "which leaves its weights where they are")
    except ValueError:
        return None
    kept = {*model.modules()}
    weights.lend(module for module in twin.modules() if type(module) is nn.Linear and module not in kept)
    return twin
