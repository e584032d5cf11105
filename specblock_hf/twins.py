# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A second model of the same modules, of which some are its own: it may have hooks and settings nobody else sees."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import Any, TypeVar

from torch import nn


Model = TypeVar("Model", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def copied(model: Model, parts: set[nn.Module], why: str) -> Model:
    """
    A model of the same modules, of which these, and those that hold them, are copies with hooks of their own.

    Args:
        model (`nn.Module`): Not changed.
        parts (`set[nn.Module]`): The parts that are copied.
        why (`str`): What a replaced forward hinders, to end a sentence.

    Raises:
        `ValueError`: The forward of a part was replaced.
    """

    def own(part: nn.Module) -> nn.Module:
        if parts.isdisjoint(part.modules()):
            return part
        if "forward" in vars(part):
            raise ValueError(
                f"the forward of this {type(part).__name__} was replaced by another, as accelerate does to spread a "
                f"model over devices, {why}; load the target onto one device."
            )
        twin = copy(part)
        twin._modules = {name: child if child is None else own(child) for name, child in part._modules.items()}
        for hooks in _HOOKS:
            setattr(twin, hooks, OrderedDict(vars(part)[hooks]))
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            mine = vars(twin)[hooks]
            mine |= {number: _hears_of(hook, part) for number, hook in mine.items()}
        return twin

    return own(model)


def _hears_of(hook: Callable, part: nn.Module) -> Callable:
    """A hook knows the part that it was put on, and may write to that."""

    @wraps(hook)
    def hears(twin: nn.Module, *more: Any) -> Any:
        return hook(part, *more)

    return hears
