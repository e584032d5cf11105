# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Forward hooks that others have put on a model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Hooks that read states for one call at a time, and those of transformers' own `output_hidden_states`.
_OUR_HOOKS = ("specblock_hf.", "transformers.")
# These move and wrap tensors, and treat all tokens alike.
_HARMLESS = ("accelerate.", "peft.", "torch.")


def foreign_hooks(module: nn.Module) -> list[Any]:
    """Forward hooks of a module that somebody else has put there; a replay would not call them."""
    hooks = [hook for name in _HOOKS for hook in vars(module)[name].values()]
    return [hook for hook in hooks if not _home(hook).startswith(_OUR_HOOKS)]


def users_hooks(model: nn.Module) -> list[Any]:
    """Those of its modules that no library is known to have put there."""
    hooks = [hook for module in model.modules() for hook in foreign_hooks(module)]
    return [hook for hook in hooks if not _home(hook).startswith(_HARMLESS)]


def _home(hook: Any) -> str:
    # Bound methods of C have no module that they are from.
    return getattr(hook.func if isinstance(hook, partial) else hook, "__module__", None) or ""
