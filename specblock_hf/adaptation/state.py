# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the state of an adaptation must be like to be gone on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..checkpoints.loading import unsound


def differences(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> set[str]:
    """Names that only one has, of other shapes, or of other whole numbers: those are the draft vocabulary."""
    return {
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours
        or name not in theirs
        or ours[name].shape != theirs[name].shape
        or (not ours[name].is_floating_point() and not torch.equal(ours[name].cpu(), theirs[name].cpu()))
    }


def refuse_unsound_state(state: Any) -> None:
    """
    Raises:
        ValueError: A tensor anywhere in this state has values that are not finite, or absurdly large.
    """
    broken = unsound(dict(_tensors_in(state, "")))
    if broken:
        raise ValueError(
            f"this state is not finite, or absurdly large, in {', '.join(broken)}; load one that was saved before, or "
            "begin anew."
        )


def _tensors_in(state: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _tensors_in(value, f"{name}.{key}" if name else str(key))
