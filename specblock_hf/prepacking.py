# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Weights in the layout that a library multiplies by. On x86 every `nn.Linear` of a PyTorch CPU model brings its weights
into oneDNN's layout anew in each forward, which takes a round of a few tokens longer than the multiplication itself
does: 4 rows by 576 x 16384 weights in float32 took 5.4 ms on two AVX-512 cores, and 1.2 ms with weights brought there
once.

Processors without products of 16 bits, as many desktops' are, take for 12 rows of such weights five times as long as
for 1. FBGEMM's layout for them holds float16 and multiplies in float32. Weights that float16 holds, divided by a power
of 2, are copied there: all of bfloat16 and float16, and those in float32 that came out of a file of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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

FEW_ROWS, FEW_ROWS_IN_32 = 1, 4
"""Rows by which weights of 16 bits are multiplied sooner than copies in FBGEMM's layout, or in 32 bits."""

LONG_PROMPT = 64
"""Tokens for which copies are worth making at once where 16 bits are not multiplied: without them it takes longer."""

PATIENCE = 4
"""Rounds, of all calls, before weights are copied for them, which takes as long as some five plain steps."""


@dataclass
class Packed:
    """
    A weight's copy.

    Args:
        weight (`Any`): In a library's layout, opaque to everything but its products.
        dtype (`torch.dtype`): Of the original.
        sums (`torch.LongTensor` of shape `[out]`):
            Of each row of the original read as integers of 64 bits, which tell whether it is still the same.
        version (`int`): Of the original, which grows with its changes in place.
        few_rows (`int`): As many are multiplied by the original.
        kind (`torch.dtype`): Of the copy.
        scale (`torch.FloatTensor` of shape `[1]`, *optional*):
            The copy is in FBGEMM's layout, divided by this power of 2; otherwise in oneDNN's.
    """

    weight: Any
    dtype: torch.dtype
    sums: torch.LongTensor
    version: int
    few_rows: int
    kind: torch.dtype
    scale: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: nn.Parameter, sums: torch.LongTensor) -> Packed:
        """A copy of a weight `[out, in]`, in the layout of which products are known to be fastest here."""
        known, weight = (weight.dtype, sums, version_of([weight])), weight.detach()
        peak = weight.abs().max().float()
        if packs_halves() and 2.0**-40 < peak < 2.0**40 and _has_few_bits(weight):
            # What rounds to nothing then is less than float32 loses in the sum of a row.
            scale = torch.exp2(torch.frexp(peak).exponent - 15.0).reshape(1)
            copy = torch.ops.quantized.linear_prepack_fp16(weight * scale.reciprocal(), None)
            return cls(copy, *known, 0 if weight.dtype == torch.float32 else FEW_ROWS, torch.float16, scale)
        kind = weight.dtype if multiplies(weight.dtype) else torch.float32
        copy = torch.ops.mkldnn._reorder_linear_weight(weight.to(kind))
        return cls(copy, *known, 0 if kind == weight.dtype else FEW_ROWS_IN_32, kind)

    def multiply(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., in]` to `[..., out]` in the input's dtype; sums are in float32, as those of 16 bits are too."""
        if self.scale is None:
            bias = None if bias is None else bias.to(self.kind)
            output = torch.ops.mkldnn._linear_pointwise(input.to(self.kind), self.weight, bias, "none", [], "")
        else:
            output = torch.ops.quantized.linear_dynamic_fp16(input * self.scale, self.weight)
            output = output if bias is None else output.add_(bias)
        return output.to(input.dtype)


class PrepackedLinear(nn.Linear):
    """A linear layer that multiplies by a copy of its weights: `[..., in]` to `[..., out]`, as `nn.Linear` does."""

    packed: Packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        packed, few = self.packed, self.packed.few_rows * input.shape[-1]
        if input.dtype != packed.dtype or input.dim() == 1 or input.numel() <= few:
            return super().forward(input)
        return packed.multiply(input, self.bias)


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
            wanted = [each for each, old in zip(zip(layers, sums, strict=True), stale, strict=True) if old or unseen]
            wanted.sort(key=lambda each: each[0].weight.numel(), reverse=True)
            with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # FBGEMM copies with one
                copies = threads.map(lambda each: Packed.of(each[0].weight, each[1]), wanted)
                for (layer, _), copy in zip(wanted, copies, strict=True):
                    self._packed[layer.weight] = copy
            for layer in layers:
                layer.__class__ = PrepackedLinear
                layer.packed = self._packed[layer.weight]

    def has_room(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether there is something to copy, and not too much."""
        weights = {id(layer.weight): layer.weight for layer in layers}.values()
        return 0 < sum(weight.numel() * _copied_in(weight.dtype).itemsize for weight in weights) <= self.most_bytes


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
        kinds = [dtype for dtype in kinds if _copied_in(dtype) != torch.float32]
    return [module for module in model.modules() if type(module) is nn.Linear and _fits(module, kinds)]


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of such weights are made as they are, rows together."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packs_halves() -> bool:
    """Whether weights that float16 holds are copied in FBGEMM's layout, which torch has for some of its engines."""
    return not multiplies(torch.bfloat16) and torch.backends.quantized.engine in ("x86", "fbgemm")


def are_slow(layers: Iterable[nn.Linear]) -> bool:
    """Whether some of these layers have weights that the processor multiplies row by row."""
    return not all(multiplies(layer.weight.dtype) for layer in layers)


def float32_is_whole() -> bool:
    """Whether products of float32 are not to be made of fewer bits, in which the copies would not follow."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # once one library alone was told, as `TrainingArguments(tf32=True)` does
        return False


def _has_few_bits(weight: torch.Tensor) -> bool:
    """Whether all numbers have the 11 significant bits of float16, or fewer."""
    if weight.dtype != torch.float32:
        return True
    parts = (weight[:1], weight)  # most have not, which the first row shows
    return not any(bool((part.view(torch.int32) & 0x1FFF).any()) for part in parts)


def _copied_in(dtype: torch.dtype) -> torch.dtype:
    """Copies of weights of this dtype have this one, or a smaller one."""
    if multiplies(dtype):
        return dtype
    return torch.float16 if packs_halves() else torch.float32


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
