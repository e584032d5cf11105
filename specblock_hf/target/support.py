# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which targets, and which calls of them, a draft tree can be verified for exactly. What makes the token of a node depend
on other nodes of the same forward is refused, or warned about where it cannot be known.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import is_peft_available, logging

from ..compat import CACHE, layer_types
from ..foreign_hooks import users_hooks
from .features import decoder_layers
from .masks import TreeMasks
from .recurrent import RECURRENT_LAYERS, check_recurrent, is_recurrent


logger = logging.get_logger(__name__)


def check_target(target: PreTrainedModel) -> None:
    """
    Refuse targets whose trees cannot be verified exactly.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    name = type(target).__name__
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder and draft trees need a decoder-only target; drop assistant_model."
        )
    check_recurrent(target)
    decoder = target.get_decoder()
    config = target.config.get_text_config(decoder=True)
    needed = {"attention_mask", CACHE, "position_ids"}
    if not needed <= _taken(target) or len(decoder_layers(decoder)) != config.num_hidden_layers:
        raise ValueError(
            f"{name} takes no position_ids or no cache or does not list its layers as get_decoder().layers or "
            ".h, which a draft tree needs; drop assistant_model."
        )
    if config.model_type == "gpt_neo" or (config.model_type == "falcon" and config.alibi):
        raise ValueError(
            f"{name} counts distances in columns of the cache, where siblings of a draft tree lie next to each other; "
            "drop assistant_model."
        )
    unknown = set(layer_types(target)) - {"full_attention", "sliding_attention", "dummy"} - RECURRENT_LAYERS
    if unknown:
        raise ValueError(
            f"{name} has layers of type {', '.join(sorted(unknown))}, which cannot score a draft tree exactly; drop "
            "assistant_model."
        )
    _check_training(target)
    _check_adapter(target)
    _warn(target)


def check_attentions(target: PreTrainedModel) -> None:
    """
    Refuse calls that ask for attentions where a target then takes its masks for something else.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    config = target.config.get_text_config(decoder=True)
    if config.model_type == "falcon" and target.get_decoder().config._attn_implementation == "sdpa":
        raise ValueError(
            f"{type(target).__name__} adds its Boolean masks to the attention scores, where they hide nothing, if "
            'attentions are asked of it that sdpa does not give; call target.set_attn_implementation("eager"), or '
            "leave output_attentions out."
        )


def _taken(target: PreTrainedModel) -> set[str]:
    """
    The names that the target's forward takes. One that was replaced by `forward(*args, **kwargs)` does not tell; then
    the model's own does, or that of the decoder, which gets them all.
    """
    for forward in (target.forward, type(target).forward, target.get_decoder().forward):
        parameters = inspect.signature(forward).parameters.values()
        names = {one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        if names - {"self"}:
            return names
    return set()


def _check_training(target: PreTrainedModel) -> None:
    name, config = type(target).__name__, target.config.get_text_config(decoder=True)
    # Some layers drop out with a module, others with a function and a number of the configuration.
    drops = {
        key
        for key, value in config.to_dict().items()
        if re.search("drop|jitter", key) and not re.match("classifier|summary", key) and isinstance(value, float)
        if value > 0 and target.training
    }
    if not drops and any(type(part) is nn.Dropout and part.training and part.p > 0 for part in target.modules()):
        drops = {"dropout"}
    if drops:
        raise ValueError(
            f"{name} is in training mode and leaves out values at random ({', '.join(sorted(drops))}), so that no two "
            "forwards agree about a token; call target.eval()."
        )
    if target.training and any(vars(part).get("gradient_checkpointing") for part in target.modules()):
        raise ValueError(
            f"{name} is in training mode with gradient checkpointing, which turns off the cache that draft trees are "
            "verified against; call target.eval()."
        )


def _check_adapter(target: PreTrainedModel) -> None:
    name = type(target).__name__
    # peft notes the adapters whose weights it has put into a model on it. One of prompts stays outside, and lends the
    # model its own method.
    weights: Mapping[str, Any] = vars(target).get("peft_config", {})
    if any(adapter.to_dict().get("alora_invocation_tokens") for adapter in weights.values()):
        raise ValueError(
            f"an adapter of {name} is activated by tokens (aLoRA) and counts the rows of a forward to know which come "
            "after them, which says nothing about the nodes of a draft tree; drop assistant_model."
        )
    prepare = target.prepare_inputs_for_generation
    if is_peft_available() and inspect.ismethod(prepare):
        from peft import PeftModel

        owner = prepare.__self__
        if isinstance(owner, PeftModel) and owner.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"the adapter of this {name} ({owner.active_peft_config.peft_type.value.lower()}) puts columns of its "
                "own before the prompt, which shift every position of a draft tree; drop assistant_model, or use an "
                "adapter of weights such as LoRA."
            )


def check_rows(target: PreTrainedModel, batch_size: int) -> None:
    """
    Refuse batches of which each row has an adapter of its own: rows that have ended are not read any more.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    if batch_size == 1 or not vars(target).get("peft_config"):
        return
    hooks = (hook for part in target.modules() for hook in vars(part)["_forward_pre_hooks"].values())
    if any(isinstance(hook, partial) and "adapter_names" in hook.keywords for hook in hooks):
        raise ValueError(
            f"this call names an adapter for each row of {type(target).__name__}'s batch, and rows of a drafted batch "
            "end at different rounds; call generate() for each prompt, or drop assistant_model."
        )


def _warn(target: PreTrainedModel) -> None:
    decoder = target.get_decoder()
    if TreeMasks(target).chains_only and not is_recurrent(target):
        logger.warning_once(
            f"attn_implementation={decoder.config._attn_implementation!r} takes no mask that could show it a draft "
            "tree, so only the likeliest path of every draft is verified and fewer tokens are accepted; "
            'target.set_attn_implementation("sdpa") before generate() has whole trees verified.'
        )
    settings = vars(target.config).get("quantization_config") or {}
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    text = str(settings).lower()
    if settings.get("load_in_8bit") or ("dynamic" in text and re.search(r"per_?tensor|'strategy': 'tensor'", text)):
        logger.warning_once(
            f"the quantisation of this {type(target).__name__} may scale the activations of a whole forward together, "
            "so that what it says to a token depends a little on the drafts beside it, and a near-tie may fall "
            "otherwise than in plain decoding; scales of their own for each token avoid that."
        )
    for hook in users_hooks(target)[:1]:
        logger.warning_once(
            f"a forward hook of this {type(target).__name__} ({hook!r}) sees all nodes of a draft tree at once: if it "
            "changes a token by its place in a forward, such as the last, the text is not that of plain decoding."
        )


@dataclass(frozen=True)
class RopeLimit:
    """
    A length from which on the rotary frequencies of a forward depend on its largest position. A tree that crosses it
    would turn its nearer nodes by frequencies that plain decoding does not use for them yet.

    Args:
        length (`int`): Tokens up to which all have the same frequencies.
        changes_once (`bool`): Whether all have the same beyond it ("longrope") or others with every token ("dynamic").
    """

    length: int
    changes_once: bool

    def depth(self, root: int) -> int | None:
        """How deep a tree below a root at this position may be; `None` for as deep as one likes."""
        if root < self.length:
            return self.length - 1 - root
        return None if self.changes_once else 0


def rope_limits(target: PreTrainedModel) -> list[RopeLimit]:
    """Those of a target; a few have several kinds of layers, each with frequencies of its own."""
    config = target.config.get_text_config(decoder=True)
    parameters: Any = vars(config).get("rope_parameters") or {}
    kinds = [parameters] if "rope_type" in parameters else parameters.values()
    limits = []
    for kind in kinds:
        if kind["rope_type"] == "longrope":
            limits.append(RopeLimit(kind["original_max_position_embeddings"], changes_once=True))
        elif "dynamic" in kind["rope_type"]:
            limits.append(RopeLimit(config.max_position_embeddings, changes_once=False))
    return limits


def check_length(target: PreTrainedModel, last: torch.LongTensor, remaining: int) -> None:
    """
    Refuse batches that cross a [`RopeLimit`], and say where drafts end.

    Args:
        target ([`~transformers.PreTrainedModel`]): The call's.
        last (`torch.LongTensor` of shape `[B]`): Position of each prompt's last token.
        remaining (`int`): Most tokens that a row may emit.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    name = type(target).__name__
    for limit in rope_limits(target):
        if int(last.max()) + remaining - 1 < limit.length:
            continue
        if len(last) > 1 and not (limit.changes_once and int(last.min()) >= limit.length):
            raise ValueError(
                f"the rotary positions of {name} change for a whole batch when its longest text is over "
                f"{limit.length} tokens, which the rows of a drafted batch are not at the same time; call generate() "
                "for each prompt, or keep prompts and max_new_tokens within that length."
            )
        if not limit.changes_once:
            logger.warning_once(
                f"the rotary positions of {name} change with every token beyond {limit.length}, so that texts are "
                "decoded without drafts from there on."
            )


def starting_over(target: PreTrainedModel) -> int | None:
    """
    The length over which plain decoding gives its cache up, whose keys were turned by the frequencies of short texts,
    and reads the whole text again; `None` for most targets.
    """
    for limit in rope_limits(target):
        ids = torch.zeros(1, limit.length + 1, dtype=torch.long, device=target.device)
        inputs = target.prepare_inputs_for_generation(ids, **{CACHE: DynamicCache(config=target.config)})
        if inputs.get(CACHE) is None:
            return limit.length
    return None
