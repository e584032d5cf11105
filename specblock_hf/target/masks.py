# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a target must be told so that every node of a draft tree sees its own path and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compat import layer_types
from ..trees.tree import DraftTree
from .cache import TargetCache


# What each attention backend does with a mask of four dimensions. All others, such as FlashAttention's kernels or a
# function that a user has registered, get no mask, and so score a single path.
_FORMS: dict[str, Literal["boolean", "additive"]] = {
    "sdpa": "boolean",
    "eager": "additive",
    "flex_attention": "additive",
}


def likeliest_chain(tree: DraftTree) -> DraftTree:
    """The likeliest child of the root, its likeliest child and so on; of a drawn tree what was drawn first."""
    if tree.distributions is None:
        tree = tree.prune(tree.tokens.shape[1])
    before = torch.arange(tree.tokens.shape[1], device=tree.tokens.device) - 1
    on_path = (tree.parents == before).long().cumprod(1).bool()
    count = int(on_path.sum(1).max())
    return replace(
        tree,
        tokens=tree.tokens[:, :count],
        parents=torch.where(on_path, tree.parents, -2)[:, :count],
        log_probs=tree.log_probs.masked_fill(~on_path, -torch.inf)[:, :count],
        origin=tree.origin[:, :count],
        height=count - 1,
    )


def layer_windows(target: PreTrainedModel) -> list[int | None]:
    """The sliding window of every layer of the decoder, `None` for one that sees all."""
    config, types = target.config.get_text_config(decoder=True), layer_types(target)
    if "dummy" in types:
        types = config.layer_types  # those that borrow another layer's part of the cache are in it as well
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]


class TreeMasks:
    """
    Attention masks of draft trees, in the form that the target's attention backend reads: Boolean for SDPA; additive
    for eager attention, which adds what it is given, and for FlexAttention, which would need a compiled block mask for
    every shape otherwise. No other backend can be told of a tree, and gets a chain and transformers' own mask.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model that scores the trees.
    """

    def __init__(self, target: PreTrainedModel):
        config, types = target.config.get_text_config(decoder=True), layer_types(target)
        # Kind of mask -> (first layer that wants it, its window).
        self._kinds = {
            kind: (types.index(kind), config.sliding_window if kind == "sliding_attention" else None)
            for kind in dict.fromkeys(types)
            if kind != "dummy"
        }
        self._dtype = target.dtype
        self._form = _FORMS.get(target.get_decoder().config._attn_implementation)

    @property
    def chains_only(self) -> bool:
        return self._form is None

    def mask(
        self, tree: DraftTree, depths: torch.LongTensor, committed: TargetCache, always: bool = False
    ) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """
        The mask of a tree, one for each kind of layer; for a lone root or a chain, plain decoding's own.

        Args:
            tree ([`DraftTree`]): N nodes wide.
            depths (`torch.LongTensor` of shape `[B, N]`): Its depths, where the target is.
            committed ([`TargetCache`]): What the tree grows on.
            always (`bool`, *optional*, defaults to `False`): Make the mask of a lone root too.
        """
        count = depths.shape[1]
        if (count == 1 and not always) or self.chains_only:
            visible = committed.visible
            return None if visible is None else nn.functional.pad(visible, (0, count), value=True).long()
        seen = tree.ancestors().to(depths.device)
        masks = {
            kind: self._kind_mask(layer, window, seen, depths, committed)
            for kind, (layer, window) in self._kinds.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _kind_mask(
        self,
        layer: int,
        window: int | None,
        seen: torch.BoolTensor,
        depths: torch.LongTensor,
        committed: TargetCache,
    ) -> torch.Tensor:
        """
        Args:
            layer (`int`):
                Its stored columns are the mask's first ones; a sliding layer stores less than the whole prefix.
            window (`int`, *optional*):
                A node sees rows less than `window` rows before it, as plain decoding would count them.
            seen (`torch.BoolTensor` of shape `[B, N, N]`): The tree's ancestors.
            depths (`torch.LongTensor` of shape `[B, N]`): The tree's depths.
            committed ([`TargetCache`]): What the tree grows on.

        Returns:
            `torch.Tensor` of shape `[B, 1, N, T]`, T the columns that the layer shows.
        """
        batch_size, count = depths.shape
        stored = committed.stored(layer)
        columns = torch.arange(committed.width - stored, committed.width, device=depths.device)
        if committed.visible is None:
            prefix = seen.new_ones(batch_size, 1, stored)
        else:
            prefix = committed.visible[:, None, committed.width - stored :]
        prefix = prefix.expand(-1, count, -1)
        if window is not None:
            prefix = prefix & ((committed.width + depths)[:, :, None] - columns < window)
            seen = seen & (depths[:, :, None] - depths[:, None, :] < window)
        unused = seen.new_zeros(batch_size, count, committed.unused(layer, count))
        mask = torch.cat((prefix, seen, unused), dim=2).unsqueeze(1)
        if self._form == "boolean":
            return mask
        dtype = self._dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
