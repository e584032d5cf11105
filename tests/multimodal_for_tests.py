# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny multimodal targets, and prompts with one image each as their processors would write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from conftest import SIZES, prompt_of
from hybrids_for_tests import DELTA
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)


MULTIMODAL_VOCAB = 40
TEXT_VOCAB = 36  # ids of words; those after it mark images
END, START, VIDEO, IMAGE = range(TEXT_VOCAB, MULTIMODAL_VOCAB)
PATCHES = 4  # of an image, each in the place of a token

_TEXT = SIZES | {"vocab_size": MULTIMODAL_VOCAB, "num_hidden_layers": 2}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 8,
}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_TEXT = _TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_LATER_VISION = _QWEN_VISION | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}


def _llava() -> tuple[type[PreTrainedModel], Any]:
    return LlavaForConditionalGeneration, LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )


def _gemma3() -> tuple[type[PreTrainedModel], Any]:
    text = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "tie_word_embeddings": False}
    return Gemma3ForConditionalGeneration, Gemma3Config(
        vision_config=SiglipVisionConfig(**_VISION),
        text_config=Gemma3TextConfig(**_TEXT, **text, layer_types=["sliding_attention", "full_attention"]),
        mm_tokens_per_image=PATCHES,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )


def _qwen2_vl() -> tuple[type[PreTrainedModel], Any]:
    vision = _QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration, Qwen2VLConfig(vision_config=vision, text_config=_QWEN_TEXT, **_QWEN_IDS)


def _qwen25_vl() -> tuple[type[PreTrainedModel], Any]:
    vision = _QWEN_LATER_VISION | {"window_size": 16, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(
        vision_config=vision, text_config=_QWEN_TEXT, **_QWEN_IDS
    )


def _qwen3_vl() -> tuple[type[PreTrainedModel], Any]:
    vision = _QWEN_LATER_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return Qwen3VLForConditionalGeneration, Qwen3VLConfig(
        vision_config=vision, text_config=_QWEN_TEXT | {"head_dim": 8}, **_QWEN_IDS
    )


def _qwen35() -> tuple[type[PreTrainedModel], Any]:
    vision = _QWEN_LATER_VISION | {"num_position_embeddings": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    layers = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    text = _TEXT | DELTA | {"linear_conv_kernel_dim": 4, "rope_parameters": rope} | layers
    return Qwen3_5ForConditionalGeneration, Qwen3_5Config(vision_config=vision, text_config=text, **_QWEN_IDS)


_KINDS = {
    "llava": _llava,
    "gemma3 with images": _gemma3,
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen25_vl,
    "qwen3-vl": _qwen3_vl,
    "qwen3.5": _qwen35,
}


def multimodal_target(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    """A random target that writes words only, so that its own text can be read again."""
    model_class, config = _KINDS[kind]()
    config._attn_implementation = attention
    target = model_class(config).eval()
    with torch.no_grad():
        target.get_output_embeddings().weight[TEXT_VOCAB:] = 0
        for name, weight in target.named_parameters():
            if "mm_input_projection" in name:  # which starts from zero, so that no picture would be seen
                torch.nn.init.normal_(weight)
    return target


MULTIMODAL: dict[str, Callable[[str], PreTrainedModel]] = {
    kind: lambda attention, kind=kind: multimodal_target(kind, attention) for kind in _KINDS
}


def prompts_with_images(
    kind: str, lengths: Sequence[int], seed: int = 0, images: int = 1, image_seed: int | None = None
) -> dict[str, torch.Tensor]:
    """
    Prompts of a batch, padded on the left, each with images after its first word.

    Args:
        kind (`str`): One of `MULTIMODAL`.
        lengths (sequence of `int`): Words of each prompt.
        seed (`int`, *optional*, defaults to 0): Of words and images.
        images (`int`, *optional*, defaults to 1): Of each prompt, one behind the other.
        image_seed (`int`, *optional*): Of the images, if it is another.
    """
    random = torch.Generator().manual_seed(seed if image_seed is None else image_seed)
    rows, is_qwen = len(lengths), kind.startswith("qwen")
    image = torch.tensor([[START, *[IMAGE] * PATCHES, END]] if is_qwen else [[IMAGE] * PATCHES])
    image, count = image.repeat(1, images), rows * images
    widest = max(lengths) + image.shape[1]
    ids, mask = torch.zeros(2, rows, widest, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = prompt_of(length, seed + row)
        prompt = torch.cat((words[:, :1], image, words[:, 1:]), dim=1)[0]
        ids[row, widest - len(prompt) :], mask[row, widest - len(prompt) :] = prompt, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if is_qwen:
        # Four patches of two frames are one token.
        batch["pixel_values"] = torch.randn(count * 4 * PATCHES, 3 * 2 * 4 * 4, generator=random)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    else:
        batch["pixel_values"] = torch.randn(count, 3, 8, 8, generator=random)
    if kind.startswith("gemma3"):
        batch["token_type_ids"] = (ids == IMAGE).long()
    return batch
