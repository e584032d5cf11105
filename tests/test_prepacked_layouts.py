# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Copies of weights where a processor has no products of 16 bits: in which layout, what they hold and multiply to."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from conftest import KINDS, VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from specblock_hf import DraftingPlan, prepacking
from specblock_hf.prepacking import (
    FEW_ROWS,
    FEW_ROWS_IN_32,
    PrepackedLinear,
    PrepackedWeights,
    fitting,
    packs_halves,
    prepacked_twin,
)


GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 24, "eos_token_id": None}


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(prepacking, "LEAST_BYTES", 0)
    if not fitting(tiny_target("llama")):
        pytest.skip("prepacked weights are for x86 CPUs")


def copied_layer(layer: nn.Linear, weights: PrepackedWeights | None = None) -> PrepackedLinear:
    layers = nn.Sequential(layer)
    (copied,) = prepacked_twin(layers, fitting(layers), weights or PrepackedWeights())
    assert isinstance(copied, PrepackedLinear)
    return copied


def multiplies_as_its_own(copied: nn.Module, own: nn.Linear, few_rows: int) -> None:
    dtype = own.weight.dtype
    assert torch.equal(copied(torch.ones(own.in_features, dtype=dtype)), own(torch.ones(own.in_features, dtype=dtype)))
    for rows in (1, 4, 5, 64):
        input = torch.randn(1, rows, own.in_features).to(dtype)
        whole = nn.functional.linear(
            input.double(), own.weight.double(), None if own.bias is None else own.bias.double()
        )
        if rows <= few_rows:
            assert torch.equal(copied(input), own(input))
        else:
            torch.testing.assert_close(copied(input), whole.to(dtype), atol=1e-5, rtol=2**-7 if few_rows else 1e-5)


@pytest.fixture
def without_products_of_16_bits(monkeypatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


@pytest.fixture(params=["fbgemm", "onednn"])
def engine(request) -> Iterator[str]:
    if request.param not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch or this CPU has no {request.param}")
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, request.param
    yield request.param
    torch.backends.quantized.engine = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_16_bits_that_a_processor_does_not_multiply(dtype, bias, engine, without_products_of_16_bits):
    torch.manual_seed(0)
    own, weights = nn.Linear(64, 48, bias, dtype=dtype), PrepackedWeights()
    halves = engine == "fbgemm"
    layer, few_rows = copied_layer(own, weights), FEW_ROWS if halves else FEW_ROWS_IN_32
    assert layer.packed.kind == (torch.float16 if halves else torch.float32)
    multiplies_as_its_own(layer, own, few_rows)
    size = 48 * 64 * layer.packed.kind.itemsize
    assert [PrepackedWeights(most).has_room([own]) for most in (size, size - 1)] == [True, False]
    assert weights.knows([own])
    kept = weights._packed[own.weight]
    assert copied_layer(own, weights).packed is kept  # they are lent again and not made again
    own.weight.data = own.weight.data.to(torch.float32)
    assert copied_layer(own, weights).packed is not kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(exponents=st.lists(st.integers(-133, 127), min_size=1, max_size=8), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_copies_of_few_bits_are_the_weights(dtype, exponents, seed, without_products_of_16_bits):
    if not packs_halves():
        pytest.skip("this torch or this CPU has no FBGEMM")
    generator, kinds = torch.Generator().manual_seed(seed), (torch.bfloat16, torch.float16)
    kind = kinds[seed % 2] if dtype == torch.float32 else dtype
    numbers = torch.randn(len(exponents), 8, generator=generator, dtype=torch.float64)
    numbers = (numbers * 2.0 ** torch.tensor(exponents, dtype=torch.float64).unsqueeze(1)).to(kind)
    own = nn.Linear(8, len(exponents), bias=False)
    own.weight = nn.Parameter(numbers.to(dtype))
    packed, peak = copied_layer(own).packed, numbers.float().abs().max()
    assert (packed.scale is not None) == (2.0**-40 < peak < 2.0**40)
    if packed.scale is not None:
        (copy, _) = torch.ops.quantized.linear_unpack_fp16(packed.weight)
        assert ((copy * packed.scale - numbers.float()).abs() <= 2.0**-38 * peak).all()


def test_float32_out_of_a_file_of_16_bits_is_copied_so_and_any_other_in_float32(without_products_of_16_bits):
    if not packs_halves():
        pytest.skip("this torch or this CPU has no FBGEMM")
    torch.manual_seed(0)
    own = nn.Linear(64, 48)
    for weight, kind in (
        (own.weight.data.bfloat16().float(), torch.float16),
        (own.weight.data.half().float(), torch.float16),
        (own.weight.data.clone(), torch.float32),
        (torch.zeros(48, 64), torch.float32),
        (torch.full((48, 64), torch.inf), torch.float32),
    ):
        own.weight.data = weight
        layer = copied_layer(own)
        assert layer.packed.kind == kind
        if weight.isfinite().all():
            multiplies_as_its_own(layer, own, 0)
    own.weight.data = nn.Linear(64, 48).weight.data.bfloat16().float()
    own.weight.data[-1, -1] += 2.0**-20  # one that is not, in the last row
    assert copied_layer(own).packed.kind == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_by_copies_of_few_bits_is_plain_decodings(kind, call, without_products_of_16_bits):
    target, prompt, drafter = deepcopy(tiny_target(kind)).bfloat16().float(), prompt_of(6), GarbageDrafter(VOCAB)
    drafter.drafting_plan = DraftingPlan(3, 1)
    for _ in range(2):
        torch.manual_seed(0)
        text = target.generate(prompt, assistant_model=drafter, **call)
        torch.manual_seed(0)
        assert torch.equal(text, target.generate(prompt, **call))
    copies = [drafter.prepacked_weights._packed[layer.weight] for layer in fitting(target)]
    assert copies and all((copy.scale is not None) == packs_halves() for copy in copies)
