# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which weights learn by which optimiser, and the steps that Muon takes."""

from __future__ import annotations

import math

import pytest
import torch
from baselines_for_tests import baseline
from block_drafters_for_tests import block_drafter
from training_for_tests import tiny_drafter

from specblock_hf.training.arguments import DrafterTrainingArguments
from specblock_hf.training.optimizers import make_optimizers


def optimizers_of(drafter, optimizer="muon", rate=0.01):
    return make_optimizers(drafter, DrafterTrainingArguments("unused", optimizer=optimizer, learning_rate=rate))


def names_of(drafter, optimizer) -> set[str]:
    names = {weight: name for name, weight in drafter.named_parameters()}
    return {names[weight] for group in optimizer.param_groups for weight in group["params"]}


def test_muon_takes_the_matrices_of_the_layers_and_adamw_heads_norms_and_queries():
    drafter = tiny_drafter(markov_rank=3)
    adamw, muon = optimizers_of(drafter)
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    matrices = {f"layers.{index}.{name}.weight" for index in range(2) for name in layer}
    matrices |= {"shift_proj.0.weight", "input_layer.condition_proj.weight", "input_layer.fuse.weight"}
    assert names_of(drafter, muon) == matrices
    assert names_of(drafter, adamw) == {name for name, _ in drafter.named_parameters()} - matrices


@pytest.mark.parametrize("name", ["specblock", "eagle3", "parallelspec", "falcon_drafter", "medusa", "dflash"])
def test_every_weight_of_every_kind_has_one_optimizer(name):
    own = {"specblock": tiny_drafter, "dflash": block_drafter}
    drafter = own[name]() if name in own else baseline(name)
    adamw, muon = (names_of(drafter, optimizer) for optimizer in optimizers_of(drafter))
    assert adamw and muon and not adamw & muon
    assert adamw | muon == {name for name, _ in drafter.named_parameters()}
    (alone,) = optimizers_of(drafter, "adamw")
    assert names_of(drafter, alone) == adamw | muon


def test_the_first_step_of_muon_is_an_orthogonal_matrix_as_large_as_a_step_of_adamw():
    """U V^T of the gradient's U S V^T, and its iterations leave S between 0.7 and 1.2."""
    drafter, rate = tiny_drafter(), 0.01
    _, muon = optimizers_of(drafter, rate=rate)
    weight = drafter.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient
    muon.step()
    taken = (before - weight.detach()) / (rate * 0.2 * math.sqrt(max(weight.shape)))
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    strengths = torch.diagonal(u.T @ taken @ v.T)
    assert 0.6 < strengths.min() and strengths.max() < 1.3
    assert (taken - u @ torch.diag(strengths) @ v).abs().max() < 0.02


def test_a_torch_without_muon_is_refused(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="no Muon; install torch 2.9 or newer, or train with AdamW"):
        optimizers_of(tiny_drafter())
    assert len(optimizers_of(tiny_drafter(), "adamw")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, 'known are "adamw" and "muon"'),
        ({"optimizer": "muon", "mixed_precision": "fp16"}, "train in bf16 or with AdamW"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DrafterTrainingArguments("unused", **settings)
