# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Every private or undocumented name of transformers, torch and accelerate that the package relies on, one test each, so
that a release which changes one says which. What the package asks of it stands beside it.
"""

from __future__ import annotations

import ast
import inspect
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import FunctionType

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import has_offloaded_params
from conftest import SIZES, VOCAB, prompt_of, tiny_target
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EosTokenCriteria,
    GenerationMixin,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MaxLengthCriteria,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    cache_utils,
)
from transformers.generation import logits_process, utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils import logging

import specblock_hf
from specblock_hf.compat import CACHE
from specblock_hf.generation.compilation import _HOOKS
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


# Models


def test_is_stateful():
    """`PreTrainedModel._is_stateful`: a recurrent state, which cannot go back to an earlier node."""
    assert PreTrainedModel._is_stateful is False


def test_attn_implementation():
    """`PreTrainedConfig._attn_implementation`: which kind of mask the layers read."""
    assert [tiny_target("llama", kind).config._attn_implementation for kind in ("sdpa", "eager")] == ["sdpa", "eager"]


def test_name_or_path():
    """`PreTrainedConfig._name_or_path`: where a drafter was loaded from."""
    config = PreTrainedConfig()
    config._name_or_path = "somewhere"
    assert config.name_or_path == "somewhere"


def test_layers_of_a_decoder():
    """`get_decoder().layers` or `.h`, whose outputs are the drafter's features."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(**sizes)).get_decoder()
    assert (len(tiny_target("llama").get_decoder().layers), len(gpt2.h)) == (4, 2)


def test_hidden_states():
    """`hidden_states[i]` is what leaves layer i - 1; the last one is normed."""
    target, kept = tiny_target("llama"), {}
    decoder = target.get_decoder()
    hooks = [
        decoder.layers[1].register_forward_hook(lambda _, args, output: kept.update(inner=output)),
        decoder.register_forward_hook(lambda _, args, output: kept.update(last=output[0])),
    ]
    states = target(prompt_of(4), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert kept["inner"] is states[2] and kept["last"] is states[4]


def test_what_a_model_says_of_itself():
    """What the loader, FSDP and the choice of an attention backend read from a drafter's network."""
    names = ("_no_split_modules", "_supports_sdpa", "_supports_flash_attn", "_init_weights")
    assert [name for name in names if not hasattr(PreTrainedModel, name)] == []


def test_initialize_missing_keys(tmp_path):
    """Called once a checkpoint is read, when every weight that it filled carries `_is_hf_initialized`."""
    marks = []

    class Marked(LlamaForCausalLM):
        def _initialize_missing_keys(self, *args, **kwargs):
            marks.extend("_is_hf_initialized" in vars(weight) for weight in self.parameters())
            super()._initialize_missing_keys(*args, **kwargs)

    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    Marked.from_pretrained(tmp_path)
    assert len(marks) > 20 and all(marks)


def test_llama_layer():
    """The parts of a layer that EAGLE-3, Falcon and SpecBlock put together in another way."""
    layer = modeling_llama.LlamaDecoderLayer(LlamaConfig(**SIZES), 1)
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling", "attention_dropout"}
    assert [name for name in parts if not hasattr(layer, name)] == []
    assert [name for name in attention if not hasattr(layer.self_attn, name)] == []


def test_rope():
    """`LlamaRotaryEmbedding(x, positions)` gives cosines and sines `[B, T, head_dim]`; `rotate_half` turns by them."""
    cos, sin = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**SIZES))(torch.zeros(1), torch.arange(3)[None])
    query, key = torch.randn(2, 1, 4, 3, 8)
    turned, _ = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.equal(turned, query * cos[:, None] + modeling_llama.rotate_half(query) * sin[:, None])


def test_qwen3_parts():
    """What DFlash and its kin are built of; `rotate_half` is Llama's."""
    parts = ("Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm", "Qwen3RotaryEmbedding")
    assert [name for name in parts if not hasattr(modeling_qwen3, name)] == []
    vector = torch.randn(1, 8)
    assert torch.equal(modeling_qwen3.rotate_half(vector), modeling_llama.rotate_half(vector))


def test_get_interface():
    """`ALL_ATTENTION_FUNCTIONS.get_interface`: an attention by its name; eager attention is not registered."""
    eager = modeling_llama.eager_attention_forward
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager) is eager
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager) is not eager


def test_warning_once():
    """transformers' loggers say a thing once in a process."""
    assert "warning_once" in dir(logging.get_logger("specblock_hf"))


# torch and accelerate


def test_modules_and_hooks():
    """`nn.Module._modules` and the hooks' dictionaries: a compiled twin shares weights and has hooks of its own."""
    assert {"_modules", *_HOOKS} <= vars(nn.Module()).keys()
    assert {name for name in vars(nn.Module()) if "_forward" in name and "hooks" in name} == set(_HOOKS)


def test_forward_of_an_instance():
    """accelerate replaces the `forward` of a module that it moves about, which cannot be compiled."""
    layer = nn.Linear(2, 2)
    add_hook_to_module(layer, ModelHook())
    assert "forward" in vars(layer)


def test_hf_hook():
    """`_hf_hook.execution_device`: where a module computes whose weights accelerate keeps elsewhere."""
    layer = cpu_offload(nn.Sequential(nn.Linear(2, 2)), execution_device=torch.device("cpu"))[0]
    assert (has_offloaded_params(layer), layer._hf_hook.execution_device) == (True, torch.device("cpu"))


def test_weights_count_their_changes():
    """`Tensor._version`: whether a target has learned since the last call."""
    weight = nn.Parameter(torch.zeros(2))
    with torch.no_grad():
        weight.add_(1)
    assert weight._version == 1
    with torch.inference_mode(), pytest.raises(RuntimeError, match="do not track version"):
        assert torch.zeros(2)._version


def test_what_a_prompt_alone_brings():
    """`MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL`: what `generate()` passes to the first forward and to no other."""
    names = {"pixel_values"} | ({"mm_encoder_outputs"} if CACHE == "cache" else set())  # new since 5.23
    assert names <= set(utils.MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)


def test_adapters_of_weights_are_noted_on_the_model():
    """`peft_config` on a model that peft has put weights into, and peft's own method where it adds to the prompt."""
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert set(vars(peft.get_peft_model(deepcopy(tiny_target("llama")), lora).get_base_model())["peft_config"]) == {
        "default"
    }
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(deepcopy(tiny_target("llama")), prompts)
    owners = []
    wrapped.base_model.generate = lambda: owners.append(wrapped.base_model.prepare_inputs_for_generation.__self__)
    wrapped.generate()
    assert owners == [wrapped] and wrapped.active_peft_config.is_prompt_learning


def test_mark_static_address():
    """`torch._dynamo.mark_static_address`: memory that a CUDA graph may read in place."""
    assert parameters(torch._dynamo.mark_static_address) == ["t", "guard"]


def test_graphs_are_counted_by_code_object():
    """Copies of a function's code have limits of their own, so that one batch size does not use up another's."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for size in (2, 3):
            own = FunctionType(double.__code__.replace(), double.__globals__)
            assert torch.compile(own, backend="eager", dynamic=False)(torch.ones(size)).sum() == 2 * size
        torch._dynamo.reset()


# Every other name


def test_no_other_private_name_is_used():
    """Attributes with an underscore that the package does not define itself are those above."""
    listed = {
        "_validate_generation_mode",
        "_assisted_decoding",
        "_mask_length",
        "_pad_token_tensor",
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
