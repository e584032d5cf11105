# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a target makes of states that its decoder has come to already."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .inputs import without_training_flags


@dataclass
class _Outputs(BaseModelOutputWithPast):
    """States alone; other outputs, each of which only some targets ask for, are `None`."""

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands where the decoder was, and has its attributes."""

    states: torch.Tensor

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.__dict__["decoder"] = decoder  # not as a part, whose parts would be this one's

    def forward(self, *args: Any, **kwargs: Any) -> _Outputs:
        return _Outputs(last_hidden_state=self.states)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["decoder"], name)


def logits_of_states(target: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    From the decoder's last states `[n, d]` to logits `[n, vocab]`, by the target's own forward: some scale them after
    the head (Granite, Cohere, Falcon-H1) or cap them (Gemma 2).

    Args:
        target ([`~transformers.PreTrainedModel`]): The model, which is left as it is.
    """
    decoder = target.get_decoder()
    given = _Given(decoder)

    def copied(part: nn.Module) -> nn.Module:
        if part is decoder:
            return given
        if decoder not in part.modules():
            return part
        twin = copy(part)
        vars(twin).pop("forward", None)  # accelerate's, of the part itself
        twin._modules = {name: child if child is None else copied(child) for name, child in part._modules.items()}
        return twin

    twin = copied(target)
    flags = without_training_flags(target)

    def logits(states: torch.Tensor) -> torch.Tensor:
        given.states = states.unsqueeze(0)
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return twin(input_ids=ids, use_cache=False, return_dict=True, **flags).logits[0]

    return logits
