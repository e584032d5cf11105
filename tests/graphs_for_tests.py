# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Pretended CUDA graphs: a captured function's operators, run again on the very tensors that they were captured with.
Python does not run again, as with a real graph, and what could not be captured is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


# They wait for the device, move numbers from the host, or make something whose size depends on numbers.
_REFUSED = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "lift_fresh_copy",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}


def name_of(function: Any) -> str:
    return function._schema.name.split("::")[1]


class Recording(TorchDispatchMode):
    """Notes every operator, and what was in the tensors from outside that it has written to."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, tuple, dict, Any]] = []
        self.made: dict[int, torch.UntypedStorage] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert name_of(function) not in _REFUSED, f"{name_of(function)} cannot be captured"
        if name_of(function) in ("index", "index_put_"):
            assert not any(part.dtype == torch.bool for part in tensors_of(args[1])), "counts on the device"
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                values = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(values):
                    self._note(tensor.untyped_storage())
        result = function(*args, **kwargs)
        if not returns_alias(function):
            for tensor in tensors_of(result):
                self.made[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        self.operators.append((function, args, kwargs, result))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
            self.before[storage.data_ptr()] = (storage, storage.clone())


def returns_alias(function: Any) -> bool:
    return any(result.alias_info is not None for result in function._schema.returns)


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class PretendedGraphs:
    """
    A [`Recorder`] without a GPU. What it has captured shares memory as graphs of one pool do: the replay of a function
    may overwrite whatever those that were captured after it have made.

    Attributes:
        captured (`int`): Functions.
        replays (`int`): Of all of them.
    """

    def __init__(self) -> None:
        self.captured = self.replays = 0
        self._made: list[dict[int, torch.UntypedStorage]] = []

    def warm(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        with Recording() as recording:
            result = function()
        # A capture computes nothing: what was there stays, and what was made holds nothing yet.
        for storage, before in recording.before.values():
            storage.copy_(before)
        for storage in recording.made.values():
            storage.fill_(0)
        self._made.append(recording.made)
        later = len(self._made)

        def replay() -> None:
            self.replays += 1
            for counter in OperatorCount.counting:
                counter.count += 1
            # What was captured is below autocast, which has had its say.
            plainly = torch.autocast("cpu", enabled=False)
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad(), plainly:
                for storage in [storage for made in self._made[later:] for storage in made.values()]:
                    storage.fill_(85)
                for operator, args, kwargs, made in recording.operators:
                    again = operator(*args, **kwargs)
                    if not returns_alias(operator):
                        for old, new in zip(tensors_of(made), tensors_of(again), strict=True):
                            assert old.shape == new.shape
                            old.copy_(new)

        return replay, result


def recorders(made: list[PretendedGraphs]) -> Callable[[torch.device], Callable[[], PretendedGraphs]]:
    """In place of `recorder_for`; what is made is appended to the list."""

    def make() -> PretendedGraphs:
        made.append(PretendedGraphs())
        return made[-1]

    return lambda device: make


class OperatorCount(TorchDispatchMode):
    """Counts what the host dispatches; a replayed graph is one."""

    counting: list[OperatorCount] = []

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def operators_of() -> Iterator[OperatorCount]:
    """Counts the operators dispatched meanwhile."""
    with OperatorCount() as counter:
        OperatorCount.counting.append(counter)
        try:
            yield counter
        finally:
            OperatorCount.counting.pop()
