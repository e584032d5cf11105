# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What differs between the supported releases of transformers and of what it pulls. Nothing else in the package asks for
a version, and every entry says when it can go.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

# As modules, and nothing of this package: an old release must get as far as the check.
import huggingface_hub
import torch
import transformers


if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


OLDEST, NEWEST = (5, 17), (5, 24)
"""Releases that every change is tested with."""

RELEASE = _release(transformers.__version__)
"""The release that is installed."""


def check_transformers(version: str = transformers.__version__) -> None:
    """
    Refuse a transformers release that is too old, warn about one that nobody has tried.

    Args:
        version (`str`, *optional*, defaults to the installed release).

    Raises:
        ImportError: Below the oldest.
    """
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    if _release(version) < OLDEST:
        raise ImportError(
            f"specblock_hf needs transformers {oldest} or newer because it relies on that release's caches, and "
            f"{version} is installed; run pip install -U transformers."
        )
    if _release(version) > NEWEST:
        warnings.warn(
            f"specblock_hf was tested with transformers {oldest} to {newest} and {version} is installed, whose caches "
            f"may differ; install transformers=={newest}.* if a call fails.",
            stacklevel=2,
        )


SHARED_KEYS_ON_CPUS = _release(torch.__version__) >= (2, 13)
"""
Whether torch's fused attention on CPUs reads keys that several heads share where they are, mask or not. Older releases
were not tried. Goes with torch 2.12.
"""

CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"
"""
What a cache is called in forwards, in `model_kwargs` and in outputs. 5.24 renamed it and warns of the old name.
Can go once 5.24 is the oldest.
"""

HTTP = "httpx2" if _release(huggingface_hub.__version__) >= (2, 0) else "httpx"
"""
The package that huggingface_hub's client is built on, whose errors it lets through. Can go once the oldest release
asks for huggingface_hub 2.0.
"""


def crop(cache: Cache, columns: int) -> None:
    """
    Drop the last columns of keys and values; what recurrent layers keep stays. For caches without such layers this is
    `cache.crop(-columns)`, which static ones lack before 5.24.

    Args:
        cache ([`~transformers.DynamicCache`] or [`~transformers.StaticCache`]): All its layers hold as much.
        columns (`int`): May be 0, with which layers that slide return to their window.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, transformers.cache_utils.CacheLayerMixin)]
    if isinstance(cache, transformers.StaticCache):
        for layer in layers:
            layer.cumulative_length.sub_(columns)
    elif any(isinstance(layer, transformers.cache_utils.LinearAttentionCacheLayerMixin) for layer in cache.layers):
        for layer in layers:
            transformers.cache_utils.DynamicLayer.crop(layer, -columns)
    else:
        cache.crop(-columns)


def layer_types(target: PreTrainedModel) -> list[str]:
    """
    One of transformers' layer types for each layer of the decoder, "dummy" for one without a part of the cache. Before
    5.23 transformers leaves those out or says what they are; once that is the oldest, this is its own list.
    """
    config = target.config.get_text_config(decoder=True)
    types = transformers.cache_utils.get_layer_types_and_kwargs(config)[0]
    types = ["dummy" if kind in ("mlp", "moe") else kind for kind in types]
    return types + ["dummy"] * (config.num_hidden_layers - len(types))


def take_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """
    Give a tokenizer the EOS and padding tokens of its model. 5.17 reads others from a GGUF file and 5.23 the right
    ones; can go once that is the oldest.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Changed in place.
        model ([`~transformers.PreTrainedModel`]): Its configuration names both.
    """
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
