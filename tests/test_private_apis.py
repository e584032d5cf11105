# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Every private or undocumented name of transformers, torch and accelerate that the package relies on, one test each, so
that a release which changes one says which. What the package asks of it stands beside it. Those of `generate()` and of
caches are here, those of models, torch and accelerate in `test_private_apis_of_models.py`.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import prompt_of, tiny_target
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessor,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
    cache_utils,
)
from transformers.generation import logits_process
from transformers.models.llama import modeling_llama

import specblock_hf
from specblock_hf.compat import CACHE
from specblock_hf.generation.token_selector import _ROW_WISE


def parameters(method: object) -> list[str]:
    return list(inspect.signature(method).parameters)


@cache
def handed_on() -> dict:
    """What `generate()` gives a decoding method for a prompt of 6 tokens without padding."""
    given = {}

    def decode(model, input_ids, **kwargs):
        given.update(kwargs)
        return input_ids

    tiny_target("llama").generate(prompt_of(6), max_new_tokens=2, pad_token_id=3, custom_generate=decode)
    return given


def rows(count: int, start: int = 0) -> torch.Tensor:
    """Keys `[1, 1, count, 1]` that say which they are."""
    return torch.arange(start, start + count, dtype=torch.float)[None, None, :, None]


# generate()


def test_validate_generation_mode():
    """Wrapped, so that what cannot be decoded exactly is refused before any work; called by position."""
    method = GenerationMixin._validate_generation_mode
    assert parameters(method) == ["self", "generation_mode", "generation_config", "generation_mode_kwargs"]


def test_assisted_decoding():
    """Wrapped, so that a drafter decodes. What is not named here is taken for an input of the target."""
    assert parameters(GenerationMixin._assisted_decoding) == [
        "self",
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
        "inputs_tensor",
        "assistant_model",
        "assistant_tokenizer",
        "tokenizer",
        "model_kwargs",
    ]


def test_mask_length():
    """`GenerationConfig._mask_length`: how long the mask was that `generate()` dropped because it was all ones."""
    mask = handed_on().get("attention_mask")
    assert handed_on()["generation_config"]._mask_length == 6 if mask is None else mask.shape == (1, 6)


def test_pad_token_tensor():
    """`GenerationConfig._pad_token_tensor`: what rows are padded with behind their end."""
    assert int(handed_on()["generation_config"]._pad_token_tensor) == 3


def test_model_kwargs():
    """What the target is given in a call with nothing but a prompt; the drafting loop knows no more."""
    given = {name for name, value in handed_on().items() if value is not None}
    known = {CACHE, "use_cache", "position_ids", "attention_mask", "logits_to_keep"}
    own = {"logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"}
    assert {CACHE, "use_cache", "position_ids"} <= given - own <= known


def test_is_user_defined():
    """`Cache._is_user_defined`: the caller goes on with the cache. One that `generate()` made has no such mark."""
    mine, target = DynamicCache(config=tiny_target("llama").config), tiny_target("llama")
    target.generate(prompt_of(3), max_new_tokens=1, **{CACHE: mine})
    assert (vars(mine)["_is_user_defined"], "_is_user_defined" in vars(handed_on()[CACHE])) == (True, False)


def test_prepare_inputs_for_generation():
    """With `is_first_iteration` it slices ids no further than it is told to, and positions to what the ids are."""
    target = tiny_target("llama")
    held = target(prompt_of(4))[CACHE]
    made = target.prepare_inputs_for_generation(
        prompt_of(3), is_first_iteration=True, position_ids=torch.arange(7)[None], **{CACHE: held}
    )
    assert (made["input_ids"].shape, made["position_ids"].tolist()) == ((1, 3), [[4, 5, 6]])


def test_processors():
    """A batch is processed row by row by those that `token_selector.py` knows; a new one may look at a whole batch."""
    whole_batch = {
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "DiaEOSDelayPatternLogitsProcessor",
        "SuppressTokensInIndexRangeLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
        "WhisperNoSpeechDetection",
    }
    there = {kind.__name__ for kind in vars(logits_process).values() if _is_processor(kind)}
    assert there - whole_batch == {kind.__name__ for kind in _ROW_WISE}


def _is_processor(kind: object) -> bool:
    if not isinstance(kind, type) or not issubclass(kind, LogitsProcessor) or kind is LogitsProcessor:
        return False
    return not kind.__module__.startswith("specblock_hf")


PROCESSORS = {
    "EncoderNoRepeatNGram": (
        lambda: logits_process.EncoderNoRepeatNGramLogitsProcessor(2, prompt_of(5).expand(3, -1)),
        {"generated_ngrams", "batch_size"},
    ),
    "EncoderRepetitionPenalty": (
        lambda: logits_process.EncoderRepetitionPenaltyLogitsProcessor(2.0, prompt_of(5)),
        {"encoder_input_ids"},
    ),
    "RepetitionPenalty": (lambda: logits_process.RepetitionPenaltyLogitsProcessor(2.0), {"prompt_ignore_length"}),
    "PrefixConstrained": (
        lambda: logits_process.PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 2),
        {"_prefix_allowed_tokens_fn", "_num_beams"},
    ),
    "UnbatchedClassifierFreeGuidance": (
        lambda: logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, tiny_target("llama")),
        {"unconditional_context"},
    ),
    "MaxLength": (lambda: MaxLengthCriteria(9, max_position_embeddings=8), {"max_length", "max_position_embeddings"}),
    "EosToken": (lambda: EosTokenCriteria(5), {"eos_token_id"}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_processors_and_criteria_hold(name):
    """Row by row, so that a copy can hold one row's part; criteria, so that the host decides without a tensor."""
    make, held = PROCESSORS[name]
    assert held <= vars(make()).keys()


def test_max_length_of_criteria():
    """`StoppingCriteriaList.max_length`: how far a row may go."""
    assert StoppingCriteriaList([EosTokenCriteria(5), MaxLengthCriteria(9)]).max_length == 9


# Caches


def test_layers():
    """`Cache.layers` and their exact classes: others may store their rows differently and are refused."""
    kinds = [
        {type(layer) for layer in kind(config=tiny_target(target).config, **options).layers}
        for kind, options in ((DynamicCache, {}), (StaticCache, {"max_cache_len": 9}))
        for target in ("llama", "mistral")
    ]
    assert kinds == [
        {cache_utils.DynamicLayer},
        {cache_utils.DynamicSlidingWindowLayer},
        {cache_utils.StaticLayer},
        {cache_utils.StaticSlidingWindowLayer},
    ]


def test_dynamic_layer():
    """`RoomyLayer` and `SlotLayer` derive from it; rows are read and written in `keys` and `values`."""
    layer = cache_utils.DynamicLayer()
    states = [(layer.keys, layer.values, layer.is_initialized)]
    layer.lazy_initialization(rows(2), rows(2))
    layer.update(rows(4), rows(4))
    layer.batch_select_indices(torch.tensor([0, 0]))
    layer.crop(-1)
    states.append((layer.keys.shape, layer.values.shape, layer.is_initialized, layer.get_seq_length()))
    assert states == [(None, None, False), ((2, 1, 3, 1), (2, 1, 3, 1), True, 3)]


def test_record_past():
    """
    `DynamicSlidingWindowLayer.record_past`: rows leave the window only when `crop` says which of them stay. There is a
    method that turns it on and none that turns it off. `cumulative_length` counts what came, as a number.
    """
    layer = cache_utils.DynamicSlidingWindowLayer(sliding_window=4)
    layer.record_past = True
    layer.update(rows(3), rows(3))
    layer.update(rows(4, start=3), rows(4, start=3))
    seen = layer.keys.flatten().tolist()
    layer.crop(-2)
    after = (layer.keys.flatten().tolist(), layer.cumulative_length)
    assert (seen, after) == ([0, 1, 2, 3, 4, 5, 6], ([2, 3, 4], 5))


def test_recurrent_layers():
    """
    `LinearAttentionLayer`: all that it remembers is in these dictionaries. While it records its past, a window is
    replaced by a longer one; a recurrent state is written in place.
    """
    layer = cache_utils.LinearAttentionLayer()
    layer.update_conv_state(torch.arange(3.0).view(1, 1, 3), conv_kernel_size=2)
    layer.update_recurrent_state(torch.ones(1))
    window, state = layer.conv_states[0], layer.recurrent_states[0]
    layer.record_past = True
    layer.update_conv_state(torch.ones(1, 1, 3))
    layer.update_recurrent_state(torch.zeros(1))
    assert (window.flatten().tolist(), layer.conv_states[0].shape, layer.conv_kernel_size) == (
        [1, 2],
        (1, 1, 5),
        {0: 2},
    )
    assert layer.recurrent_states[0] is state and state == 0
    flags = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")
    assert [vars(layer)[name] for name in flags] == [{0: True}] * 3
    assert not isinstance(layer, cache_utils.CacheLayerMixin)
    both = {cache_utils.LinearAttentionAndFullAttentionLayer, cache_utils.LinearAttentionAndStaticFullAttentionLayer}
    assert all(issubclass(one, (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionLayer)) for one in both)


def test_cumulative_length():
    """`StaticLayer.cumulative_length`: a tensor that says where the next rows go."""
    layer = cache_utils.StaticLayer(max_cache_len=5)
    layer.update(rows(3), rows(3))
    layer.cumulative_length.sub_(2)
    layer.update(rows(1, start=8), rows(1, start=8))
    assert layer.keys.flatten().tolist() == [0, 8, 2, 0, 0]


def test_reset():
    """`StaticCache.reset`: a compiled round finds its memory where it was, forgotten."""
    target, held = tiny_target("llama"), StaticCache(config=tiny_target("llama").config, max_cache_len=9)
    with torch.no_grad():
        target(prompt_of(4), **{CACHE: held})
    before = held.layers[0].keys.data_ptr()
    held.reset()
    assert (held.layers[0].keys.data_ptr(), int(held.get_seq_length()), held.get_max_length()) == (before, 0, 9)


def test_offloading():
    """`Cache.offloading`: rows that are not where they are looked for."""
    config = tiny_target("llama").config
    assert vars(DynamicCache(config=config))["offloading"] is vars(StaticCache(config, 9))["offloading"] is False


def test_update():
    """The one call of a cache that an attention layer makes; `BlockCache`, `GraphCache` and others stand in for it."""
    calls = []

    class StandIn:
        def update(self, keys, values, layer_idx, *args, **kwargs):
            calls.append((keys.shape, values.shape, layer_idx))
            return keys, values

    layer = modeling_llama.LlamaDecoderLayer(tiny_target("llama").config, 2)
    turns = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    layer(torch.randn(1, 3, 32), position_embeddings=turns, **{CACHE: StandIn()})
    assert calls == [((1, 2, 3, 8), (1, 2, 3, 8), 2)]


def test_get_layer_types_and_kwargs():
    """What kinds of layers a configuration has, also where it does not say so itself."""
    found = [cache_utils.get_layer_types_and_kwargs(tiny_target(kind).config)[0] for kind in ("llama", "mistral")]
    assert found == [["full_attention"] * 4, ["sliding_attention"] * 4]


# Every other name


def test_what_generate_works_out_for_a_method_of_decoding():
    names = ["self", "custom_generate", "kwargs", "synced_gpus", "assistant_model", "streamer"]
    assert list(inspect.signature(GenerationMixin._extract_generation_mode_kwargs).parameters) == names
    found = tiny_target("llama")._extract_generation_mode_kwargs(None, {}, None, None, None)
    assert found == {"synced_gpus": False}


def test_no_other_private_name_is_used():
    """Attributes with an underscore that the package does not define itself are those above."""
    listed = {
        "_validate_generation_mode",
        "_assisted_decoding",
        "_mask_length",
        "_pad_token_tensor",
        "_extract_generation_mode_kwargs",
        "_prefix_allowed_tokens_fn",
        "_num_beams",
        "_is_stateful",
        "_attn_implementation",
        "_name_or_path",
        "_no_split_modules",
        "_init_weights",
        "_initialize_missing_keys",
        "_modules",
        "_dynamo",
        "_is_mkldnn_bf16_supported",
        "_reorder_linear_weight",
        "_linear_pointwise",
        "_hf_hook",
        "_version",
        "_ArgumentGroup",  # argparse's, in annotations
        "_ActionsContainer",  # likewise
        "_specblock_hook",  # ours, on what it wraps
    }
    used, own = set(), set()
    for path in Path(specblock_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                ours = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (own if ours and isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    assert used - own - listed == set()
