# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Private names of models, of torch and of accelerate that the package relies on, as `test_private_apis.py` has those of
`generate()` and of caches.
"""

from __future__ import annotations

from copy import deepcopy
from types import FunctionType

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import has_offloaded_params
from conftest import SIZES, VOCAB, prompt_of, tiny_target
from test_private_apis import parameters
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation import utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils import logging

from specblock_hf.compat import CACHE
from specblock_hf.twins import _HOOKS


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_weights_in_onednns_layout(dtype):
    """`torch.ops.mkldnn._reorder_linear_weight` and `_linear_pointwise`, as torch.compile uses them on CPUs."""
    if not torch.backends.mkldnn.is_available() or (
        dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        pytest.skip("this torch or this CPU has no such products")
    weight, bias, rows = (torch.randn(*shape).to(dtype) for shape in ((6, 8), (6,), (2, 3, 8)))
    copy = torch.ops.mkldnn._reorder_linear_weight(weight)
    for given in (bias, None):
        found = torch.ops.mkldnn._linear_pointwise(rows, copy, given, "none", [], "")
        assert torch.allclose(found, torch.nn.functional.linear(rows, weight, given), atol=1e-5, rtol=2e-2)


def test_products_with_weights_in_fbgemms_layout():
    """`torch.ops.quantized.linear_prepack_fp16` and `linear_dynamic_fp16`, dynamic float16's."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("this torch or this CPU has no such products")
    weight, rows = torch.randn(6, 8).half().float(), torch.randn(2, 3, 8)
    copy = torch.ops.quantized.linear_prepack_fp16(weight, None)
    found = torch.ops.quantized.linear_dynamic_fp16(rows, copy)
    assert torch.allclose(found, torch.nn.functional.linear(rows, weight), atol=1e-5)


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
