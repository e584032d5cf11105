# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compiled rounds: the target's forward over a tree and the drafter's forward over its rows, with `torch.compile`. Shapes
must repeat for that to pay, so trees and rows are padded to a few sizes and keys and values live in memory of a fixed
size that is used again by every call.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache, cache_utils

from ..compat import CACHE
from ..devices import without_cudnn_attention
from ..drafters.common.block import BlockDrafter, BlockState
from ..drafters.common.cache import BlockCache
from ..drafters.eagle3.drafting import Eagle3Drafter
from ..drafters.joined import JoinedState
from ..drafters.specblock.drafting import SpecBlockDrafter
from ..drafting.drafter import DraftState, TreeDrafter
from ..drafting.plan import DraftingPlan
from ..target.features import decoder_layers, tap
from ..target.inputs import without_training_flags
from ..target.masks import TreeMasks
from ..target.support import check_target, rope_limits


ROWS = (2, 4, 8, 16, 32)
"""Rows that a compiled forward of a drafter may have; a prompt's many pairs run uncompiled."""


class CompiledTarget:
    """
    A target's forward over the nodes of a tree as one compiled function (ids, positions, mask, cache) -> (logits,
    features). The target stays as it is: the function runs a twin that shares all weights and has hooks of its own,
    which are there before anything is compiled.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        layers (sequence of `int`): What the drafter reads; see [`FeatureTaps`].
        batch_size (`int`): Rows of the batch.
        max_length (`int`): Most tokens of a row.
        sizes (sequence of `int`): Nodes, the root counted, that a compiled forward may have.
        options (`dict`): Of `torch.compile`.

    Attributes:
        cache ([`~transformers.StaticCache`]): The only one that the function is compiled for.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        layers: Sequence[int],
        batch_size: int,
        max_length: int,
        sizes: Sequence[int],
        options: dict[str, Any],
    ):
        self.target = target
        self.sizes = sorted(set(sizes))
        self.cache = _filled_cache(target, batch_size, max_length + self.sizes[-1])
        twin, layers, flags = _twin(target), tuple(layers), without_training_flags(target)
        states: dict[int, torch.Tensor] = {}
        for index in set(layers):
            tap(twin.get_decoder(), index, _kept(states, index))

        def score(
            ids: torch.LongTensor, positions: torch.LongTensor, mask: torch.Tensor, cache: StaticCache
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            outputs = twin(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                return_dict=True,
                **{CACHE: cache},
                **flags,
            )
            features = tuple(states[index] for index in layers)
            states.clear()
            return outputs.logits, features

        self._score = _compiled(score, options)

    def size_for(self, nodes: int) -> int | None:
        """The size that so many nodes are padded to; `None` if none is large enough."""
        place = bisect_left(self.sizes, nodes)
        return self.sizes[place] if place < len(self.sizes) else None

    def __call__(
        self, ids: torch.LongTensor, positions: torch.LongTensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """
        Args:
            ids (`torch.LongTensor` of shape `[B, N]`): Of the nodes, N one of `sizes`.
            positions (`torch.LongTensor` of shape `[B, N]`): Of the nodes.
            mask (`torch.Tensor` of shape `[B, 1, N, columns of the cache]`): What each node sees.

        Returns:
            Logits `[B, N, V]`, and a feature `[B, N, d]` for each of the layers.
        """
        logits, features = self._score(ids, positions, mask, self.cache)
        return _own(logits), tuple(_own(feature) for feature in features)


class CompiledNetwork:
    """
    The forward of a drafter that attends to all committed pairs, compiled for a few numbers of rows.

    Args:
        drafter ([`BlockDrafter`]): Whose forward it is.
        batch_size (`int`): Rows of the batch.
        max_length (`int`): Most pairs of a row.
        options (`dict`): Of `torch.compile`.
    """

    def __init__(self, drafter: BlockDrafter, batch_size: int, max_length: int, options: dict[str, Any]):
        self._drafter = drafter
        # Behind the pairs there is room for the rows of a few later forwards; a round with more runs uncompiled.
        columns = max_length * drafter.columns_per_pair + 4 * ROWS[-1] * drafter.config.block_size
        self._cache = BlockCache(drafter.config, batch_size, columns, drafter.dtype, drafter.device)
        for store in (*self._cache.keys, *self._cache.values):
            torch._dynamo.mark_static_address(store)

        def forward(
            embeds: torch.Tensor,
            conditions: torch.Tensor,
            positions: torch.LongTensor,
            mask: torch.BoolTensor,
            keys: list[torch.Tensor],
            values: list[torch.Tensor],
            columns: torch.LongTensor,
        ) -> torch.Tensor:
            return drafter(embeds, conditions, positions, mask, _Columns(keys, values, columns))

        self._forward = _compiled(forward, options)

    def cache(self) -> BlockCache:
        """An empty cache for one call, in the memory that the forward is compiled for."""
        for store in (*self._cache.keys, *self._cache.values):
            store.zero_()
        return copy(self._cache)

    def __call__(
        self,
        embeds: torch.Tensor,
        conditions: torch.Tensor,
        positions: torch.LongTensor,
        mask: torch.BoolTensor | None,
        cache: BlockCache,
    ) -> torch.Tensor:
        """The arguments and the result are those of the drafter's own forward, which runs where nothing fits."""
        batch, rows, _ = embeds.shape
        place = bisect_left(ROWS, rows)
        slots = self._drafter.config.block_size
        own = cache.keys[0] is self._cache.keys[0]  # not if it has grown or lost rows
        if mask is None or place == len(ROWS) or not own:
            return self._drafter(embeds, conditions, positions, mask, cache)
        added = ROWS[place] - rows
        unseen = cache.keys[0].shape[2] - mask.shape[3]
        if added * slots > unseen:
            return self._drafter(embeds, conditions, positions, mask, cache)
        # Rows of padding see what is there, so that no softmax is empty, and write where later rows will write.
        padding = mask.new_ones(batch, 1, added * slots, mask.shape[3])
        mask = torch.cat((mask.expand(batch, -1, -1, -1), padding), dim=2)
        first = cache.offsets if isinstance(cache.offsets, int) else cache.offsets.unsqueeze(1)
        columns = torch.arange(ROWS[place] * slots, device=embeds.device).expand(batch, -1)
        hidden = self._forward(
            nn.functional.pad(embeds, (0, 0, 0, added)),
            nn.functional.pad(conditions, (0, 0, 0, added)),
            nn.functional.pad(positions, (0, added)),
            nn.functional.pad(mask, (0, unseen)),
            cache.keys,
            cache.values,
            columns + first,
        )
        return _own(hidden)[:, :rows]


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
            store.scatter_(2, self.columns[:, None, :, None].expand_as(new), new)
        return self.keys[layer_idx], self.values[layer_idx]


class CompiledRounds:
    """
    What [`compile_rounds`] has made. It serves one call at a time. A copied or pickled drafter has none.

    Args:
        target ([`CompiledTarget`]): Scores trees.
        network ([`CompiledNetwork`], *optional*): Runs the drafter's forwards; `None` for a drafter without any that
            could be compiled.
        batch_size (`int`): Rows of a call.
        max_length (`int`): Most tokens of a row, prompt included.
    """

    def __init__(self, target: CompiledTarget, network: CompiledNetwork | None, batch_size: int, max_length: int):
        self.target = target
        self.network = network
        self.batch_size = batch_size
        self.max_length = max_length
        self._free = threading.Lock()

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return (type(None), ())

    def attach(self, state: DraftState) -> None:
        """Let a call's fresh memory of the drafter use the compiled forward."""
        while isinstance(state, JoinedState):
            state = state.parts[0]
        if isinstance(state, BlockState) and self.network is not None:
            state.network, state.cache = self.network, self.network.cache()

    @contextmanager
    def lend(
        self, target: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict[str, Any], remaining: int
    ) -> Iterator[CompiledRounds | None]:
        """
        For one call, whose cache is replaced; gives `None` to a call that nothing was compiled for, and while another
        call has it.

        Args:
            target ([`~transformers.PreTrainedModel`]): The call's target.
            input_ids (`torch.LongTensor` of shape `[B, P]`): The prompts; empty if they come as `inputs_embeds`.
            model_kwargs (`dict`): What `generate()` prepared for the target.
            remaining (`int`): Most tokens that a row may emit.
        """
        embeds = model_kwargs.get("inputs_embeds")
        prompt = input_ids.shape[1] if embeds is None else embeds.shape[1]
        fits = target is self.target.target and len(input_ids) == self.batch_size
        if not fits or prompt + remaining > self.max_length or not self._free.acquire(blocking=False):
            yield None
            return
        try:
            self.target.cache.reset()
            model_kwargs[CACHE] = self.target.cache
            yield self
        finally:
            self._free.release()


def compile_rounds(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    *,
    batch_size: int = 1,
    max_length: int = 1024,
    tree_sizes: Sequence[int] | None = None,
    **options: Any,
) -> CompiledRounds:
    """
    Let `target.generate(assistant_model=drafter)` run compiled forwards from now on; the text stays the same. The
    target itself is not compiled, nor changed for anybody else. A call runs uncompiled if it has another batch size or
    may get longer, passes or returns a cache, or overlaps with another call; `last_statistics.compiled_rounds` counts
    the rounds that were compiled. Prompts are read uncompiled. Compilation happens in the first rounds that need it
    and can take minutes. To go back, set `drafter.compiled_rounds = None`.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target, where and as it will run, adapters included; all its layers attend to the whole prefix.
        drafter ([`TreeDrafter`]): Its drafter; [`calibrate`] it before.
        batch_size (`int`, *optional*, defaults to 1): Rows of a call, all sequences of all prompts counted.
        max_length (`int`, *optional*, defaults to 1024):
            Most tokens of a row, prompt included. Memory for them is held as long as the drafter is compiled, and
            every forward attends over all of it.
        tree_sizes (sequence of `int`, *optional*):
            Numbers of nodes, the root counted, that trees are padded to; a larger tree is verified uncompiled.
            Defaults to the drafting plan's budget with the root, and half of that; a plan that finds itself chooses
            from these and plain steps.
        options (*optional*):
            Of `torch.compile`. `mode` defaults to `"reduce-overhead"` (CUDA graphs) on CUDA.

    Returns:
        [`CompiledRounds`]: Also kept as `drafter.compiled_rounds`.

    Raises:
        `ValueError`: The target's attention or cache cannot be compiled for trees, or the drafter is for another
            target.
    """
    check_target(target)
    drafter.check_target(target)
    plan = drafter.drafting_plan
    fixed = plan if isinstance(plan, DraftingPlan) else drafter.default_plan(target.device)
    whole = fixed.tree_budget + 1
    # A plan that finds itself takes plain steps too.
    sizes = tree_sizes or ((1,) if plan == "auto" else ()) + ((whole + 1) // 2, whole)
    if target.device.type == "cuda":
        options = {"mode": "reduce-overhead"} | options
    network = None
    # Calls outside of inference mode could not write to memory that was made within.
    with torch.inference_mode(False), torch.no_grad():
        scorer = CompiledTarget(target, drafter.feature_layers_for(target), batch_size, max_length, sizes, options)
        if isinstance(drafter.network, SpecBlockDrafter | Eagle3Drafter):
            network = CompiledNetwork(drafter.network, batch_size, max_length, options)
    drafter.compiled_rounds = CompiledRounds(scorer, network, batch_size, max_length)
    return drafter.compiled_rounds


@without_cudnn_attention
def _filled_cache(target: PreTrainedModel, batch_size: int, columns: int) -> StaticCache:
    """A static cache whose memory is there already: calls use it again, whichever comes first."""
    name, cache = type(target).__name__, StaticCache(config=target.config, max_cache_len=columns)
    if any(type(layer) is not cache_utils.StaticLayer for layer in cache.layers):
        raise ValueError(
            f"{name} has layers that slide, whose keys have no fixed place that trees could be compiled for; use the "
            "drafter uncompiled."
        )
    if TreeMasks(target).chains_only:
        raise ValueError(
            f"the attention of this {name} takes no mask of a tree, which its forward would be compiled for; call "
            'target.set_attn_implementation("sdpa") before.'
        )
    if rope_limits(target):
        raise ValueError(
            f"the rotary positions of {name} change at a length, which a compiled forward would not ask for; use the "
            "drafter uncompiled."
        )
    target(input_ids=torch.zeros(batch_size, 1, dtype=torch.long, device=target.device), **{CACHE: cache})
    return cache


def _kept(states: dict[int, torch.Tensor], index: int) -> Callable[[torch.Tensor], None]:
    """What writes a state down; a plain function, because torch 2.11 cannot trace a partial of a method of `dict`."""

    def keep(state: torch.Tensor) -> None:
        states[index] = state

    return keep


def _twin(module: nn.Module) -> nn.Module:
    """A model of the same modules, of which those that are tapped are copies with hooks of their own."""
    decoder = module.get_decoder()
    tapped = {decoder, *decoder_layers(decoder)}

    def copied(part: nn.Module) -> nn.Module:
        if tapped.isdisjoint(part.modules()):
            return part
        if "forward" in vars(part):
            raise ValueError(
                f"the forward of this {type(part).__name__} was replaced by another, as accelerate does to spread a "
                "model over devices, which cannot be compiled; load the target onto one device."
            )
        twin = copy(part)
        twin._modules = {name: child if child is None else copied(child) for name, child in part._modules.items()}
        for hooks in _HOOKS:
            setattr(twin, hooks, OrderedDict(vars(part)[hooks]))
        return twin

    return copied(module)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # torch counts graphs by code object, up to a limit, and another batch size must not use up this one's.
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, **{"fullgraph": True, "dynamic": False} | options)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """What the next replay of a CUDA graph does not overwrite."""
    return tensor.clone() if tensor.is_cuda else tensor
