# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a target's forwards are given of what `generate()` has prepared, first for the prompt and then for trees."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.masking_utils import create_masks_for_generate

from ..compat import CACHE
from .cache import check_cache
from .recurrent import is_recurrent
from .support import starting_over


_HANDLED = {
    CACHE,
    "attention_mask",
    "inputs_embeds",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "use_cache",
}
# Read with the prompt and never again. transformers lists what it drops itself; the grids of pictures and videos are
# looked at together with these only.
_OF_PROMPT = {
    *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL,
    "image_grid_thw",
    "second_per_grid_ts",
    "video_grid_thw",
}
# One number for each token: the prompt's last one goes on, but what is written is never a picture.
OF_TOKENS = {"mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"}
# What training leaves in a configuration and no forward here wants: some cannot have it together with a tree's mask.
_OF_TRAINING = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass
class Rereading:
    """
    A text that is read again when it is over a length.

    Args:
        length (`int`): The last one that goes on with what was read before.
        ids (`torch.LongTensor` of shape `[1, P]`): The prompt.
        first (`torch.LongTensor` of shape `[1, 1]`): Its first position.
        beside (`dict`): What the target's forward gets beside ids and positions.
        emitted (`list` of `torch.LongTensor` of shape `[1, E]`): The tokens after it, round by round.
    """

    length: int
    ids: torch.LongTensor
    first: torch.LongTensor
    beside: dict[str, Any]
    emitted: list[torch.LongTensor] = field(default_factory=list)

    def depth(self, root: int) -> int | None:
        """How deep a tree below a root in this column may be; `None` for as deep as one likes."""
        return None if root > self.length else max(self.length - 1 - root, 0)

    def inputs(self) -> dict[str, Any]:
        """Of the forward that reads the whole text."""
        ids = torch.cat((self.ids.to(self.first.device), *self.emitted), dim=1)
        positions = self.first + torch.arange(ids.shape[1], device=ids.device)
        return {"input_ids": ids, "position_ids": positions, "use_cache": True} | self.beside


def without_training_flags(target: PreTrainedModel) -> dict[str, bool]:
    """What turns off in a forward what its configuration turns on for training."""
    config = target.config.get_text_config(decoder=True)
    return {name: False for name in _OF_TRAINING if getattr(config, name, False)}


def _sees_whole_pictures(target: PreTrainedModel) -> bool:
    """Whether masks depend on which tokens are a picture's, as Gemma's do: its tokens see those behind them."""
    # Where a model has none of its own, generate() takes this one.
    makes_masks = getattr(target, "create_masks_for_generate", create_masks_for_generate)
    return not OF_TOKENS.isdisjoint(inspect.signature(makes_masks).parameters)


class TargetInputs:
    """
    The inputs of a target during one call.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        input_ids (`torch.LongTensor` of shape `[B, P]`): The prompts; empty if they come as `inputs_embeds`.
        model_kwargs (`dict`): What `generate()` prepared for the target.
        mask_length (`int`, *optional*): Length of an attention mask of ones that `generate()` dropped.
        returns_cache (`bool`): Somebody goes on with the cache.

    Attributes:
        cached (`int`): Columns that the cache holds already.
        new (`int`): Prompt tokens that it does not; `generate()` may be given all ids or only these.
        has_pictures (`bool`): The prompt brings more than text, which belongs to all its tokens together.

    Raises:
        ValueError: An unsupported cache or input, padding on the right, or nothing left to prefill.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        mask_length: int | None,
        returns_cache: bool,
    ):
        self._target, self.ids, self._kwargs = target, input_ids, model_kwargs
        check_cache(model_kwargs.get(CACHE), len(input_ids), returns_cache)
        self.cache = model_kwargs[CACHE]
        self.cached = int(self.cache.get_seq_length())
        self.mask = model_kwargs.get("attention_mask")
        self.embeds = model_kwargs.get("inputs_embeds")
        self._check()
        self.new = self._count_new(mask_length if self.mask is None else self.mask.shape[1])
        # `generate()` adds an empty dictionary to every call of a model that could have had pictures.
        self.has_pictures = any(
            model_kwargs.get(name) is not None and (name != "mm_encoder_outputs" or bool(model_kwargs[name]))
            for name in _OF_PROMPT
        )
        self._off = {name: off for name, off in without_training_flags(target).items() if not model_kwargs.get(name)}

    def last_positions(self, device: torch.device) -> torch.LongTensor:
        """
        Of the prompts' last tokens `[..., B, 1]`. Without `position_ids`, which `generate()` does not make for a
        forward that does not name them, the target counts columns.
        """
        positions = self._kwargs.get("position_ids")
        if positions is None:
            return torch.full((len(self.ids), 1), self.cached + self.new - 1, device=device)
        return positions[..., -1:].to(device)

    def chunk_size(self, asked: int | None, padded: bool) -> int:
        """
        Prompt tokens of one forward.

        Args:
            asked (`int`, *optional*): By the call. Pictures are read at once, whatever it says.
            padded (`bool`): Some prompts of the batch are shorter than others.

        Raises:
            ValueError: In one sentence: what, why and what to do.
        """
        if asked is None or self.has_pictures and asked >= self.new:
            return self.new
        name = type(self._target).__name__
        if self.has_pictures and _sees_whole_pictures(self._target):
            raise ValueError(
                f"prefill_chunk_size={asked} cuts a prompt in which {name} has the tokens of a picture see each "
                "other, and a prompt with pictures is read at once beside a drafter; leave prefill_chunk_size out."
            )
        if self.has_pictures and asked == 1 and padded and is_recurrent(self._target):
            raise ValueError(
                f"prefill_chunk_size=1 has {name} read padding alone, which its recurrent layers take for a token, "
                "and a prompt with pictures is read at once beside a drafter; leave prefill_chunk_size out."
            )
        return self.new if self.has_pictures else asked

    def of_prompt(self, start: int, end: int) -> dict[str, Any]:
        """For new prompt tokens `start` to `end`."""
        skipped, left = self.ids.shape[1] - self.new, self.new - end
        ids, embeds = self.ids, self.embeds
        if embeds is None:
            ids = ids[:, skipped + start : skipped + end]
        else:
            embeds = embeds[:, embeds.shape[1] - self.new :][:, start:end]
        cut = {
            name: values[..., : values.shape[-1] - left]
            for name, values in self._kwargs.items()
            if values is not None and name in {"attention_mask", "position_ids", *OF_TOKENS}
        }
        inputs = self._target.prepare_inputs_for_generation(
            ids, is_first_iteration=True, **self._kwargs | cut | {"inputs_embeds": embeds}
        )
        if inputs.get(CACHE) is None and not self.cached:
            # A target that would begin with a cache of its own may begin with this one, in which nothing is either.
            inputs[CACHE] = self.cache
        if end == self.new:
            self._check_positions(inputs.get("position_ids"))
        config = self._target.config.get_text_config(decoder=True)
        if vars(config).get("num_kv_shared_layers") and isinstance(inputs.get("logits_to_keep"), int):
            # Told by a number, Gemma 4 drops the other states before its last layers, where drafters read them. A
            # tensor would have to be where the head is, which may be any device.
            inputs["logits_to_keep"] = slice(-1, None)
        return inputs | self._off

    def _check_positions(self, prepared: torch.LongTensor | None) -> None:
        """Refuse targets that give the prompt other positions than they were given, from which a tree's go on."""
        if self._kwargs.get("position_ids") is None:
            return
        last = self._kwargs["position_ids"][..., -1:]
        # Without any a forward counts columns.
        own = torch.full_like(last, self.cached + self.new - 1) if prepared is None else prepared[..., -1:]
        if bool((own.to(last.device) != last).any()):
            raise ValueError(
                f"{type(self._target).__name__} puts this prompt at other positions than generate() does, where a "
                "draft tree could not follow it; drop assistant_model."
            )

    def of_tree(self, nodes: int, rows: list[int]) -> dict[str, Any]:
        """For a tree of so many nodes in these rows of the batch, beside its ids, positions, mask and cache."""
        kept = {}
        for name in OF_TOKENS:
            if self._kwargs.get(name) is not None:
                last = self._kwargs[name][rows, -1:].expand(-1, nodes).to(self._target.device)
                kept[name] = torch.zeros_like(last) if name == "mm_token_type_ids" else last
        return self._off | kept

    def last_logits(self, count: int) -> dict[str, int]:
        """What has a forward give the logits of its last tokens only, for a target that can."""
        return {"logits_to_keep": count} if "logits_to_keep" in self._kwargs else {}

    def rereading(self, all_visible: bool, device: torch.device) -> Rereading | None:
        """
        What this call reads again and where, if it does. A prompt that has a part only in the cache, or none as ids,
        is nothing that plain decoding could read again; behind padding it does so too early for it to matter.
        """
        length, width = starting_over(self._target), self.cached + self.new
        if length is None or len(self.ids) > 1 or self.ids.shape[1] < width or not all_visible:
            return None
        if width > length and 0 < self.cached <= length:
            raise ValueError(
                f"{type(self._target).__name__} reads a text again from its beginning when it is over {length} "
                f"tokens, and of this prompt the cache holds {self.cached} already; pass it without a cache."
            )
        more = {name: self._kwargs[name] for name in ("logits_to_keep",) if name in self._kwargs}
        first = self.last_positions(device) - (width - 1)
        return Rereading(length, self.ids, first, {CACHE: self.cache} | self._off | more)

    def _check(self) -> None:
        known = _HANDLED | _OF_PROMPT | OF_TOKENS
        unknown = sorted(name for name, value in self._kwargs.items() if value is not None and name not in known)
        if unknown:
            raise ValueError(
                f"generate() got {', '.join(unknown)}, which tree drafting does not pass on to the target; leave it "
                "out, or drop assistant_model."
            )
        if self.mask is not None and not bool((self.mask[:, -1:] != 0).all()):
            raise ValueError(
                "attention_mask hides the last token of a prompt, which the next one is chosen from; pad prompts on "
                'the left, with padding_side="left".'
            )

    def _count_new(self, mask_length: int | None) -> int:
        width = self.ids.shape[1] if self.embeds is None else self.embeds.shape[1]
        if not width:
            raise ValueError(
                "the prompt is empty and the first token is chosen from its last one; pass one token or more, such as "
                "bos_token_id."
            )
        all_given = self.embeds is not None or width == mask_length
        new = width - self.cached if all_given else width
        if new < 1:
            raise ValueError(
                f"the cache already holds {self.cached} tokens, which leaves nothing of the prompt to read; crop it "
                "by one token or more, or pass a longer prompt."
            )
        return new
