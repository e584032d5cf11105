# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A CPU that passes for host and device, so that what would be moved between the two can be counted without a GPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

import specblock_hf


HOST, DEVICE = torch.device("cpu"), torch.device("cuda")

_READS = {"tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__format__"}
# Their results have a shape, or are an answer, that depends on the numbers.
_READS |= {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose"}
_FROM_LISTS = {"tensor", "as_tensor", "new_tensor"}
_FILLED = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"}
_MOVES = {"to", "cpu", "cuda", "copy_", "type_as"}
# They take the lengths or batch sizes of packed texts, which they want on the host.
_PACKED = {"_pack_padded_sequence", "_pad_packed_sequence", "lstm"}
_PACKAGE = str(Path(specblock_hf.__file__).parent)


@dataclass(frozen=True)
class Transfer:
    """
    Numbers on their way between host and device.

    Args:
        kind (`str`): "download"; "upload", which waits as a download does until the device has done all that it was
            told, because the host's memory is not pinned; or "quiet upload", which does not.
        call (`str`): The function that moves them.
        line (`str`): File and line of the package that called it.
    """

    kind: str
    call: str
    line: str


class TwoDevices(TorchFunctionMode):
    """
    Tensors that were there before, and what is made of them, claim to be on a device; those that are made on the host
    do not. All of them really are on the CPU. Computing with both at once fails, as it would with a device.

    Attributes:
        transfers (`list[Transfer]`): What was moved, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []
        self._on_host = WeakIdKeyDictionary()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if getattr(function, "__self__", None) is torch.Tensor.device:
            return self._device(args[0])
        tensors = _tensors((*args, *kwargs.values()))
        if name in ("__getitem__", "__setitem__"):
            self._watch_index(args[0], args[1])
        source, destination = self._way(name, args, kwargs, tensors)
        if (source, destination) == (HOST, DEVICE):
            self._note("quiet upload" if kwargs.get("non_blocking") else "upload", name)
        elif source != destination:
            self._note("download", name)
        if _named_device(args, kwargs) is not None:
            args, kwargs = tree_map(_real, (args, kwargs))
        result = function(*args, **kwargs)
        if source != destination and any(result is tensor for tensor in tensors):
            result = result.detach()  # one of its own, which knows where it is
        for tensor in _tensors(result[1:] if name in _PACKED - {"lstm"} else (result,) if destination == HOST else ()):
            self._on_host[tensor] = True
        return result

    def _device(self, tensor: torch.Tensor) -> torch.device:
        return HOST if tensor in self._on_host else DEVICE

    def _way(
        self, name: str, args: tuple, kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> tuple[torch.device, torch.device]:
        """Where the numbers are that a call works on, and where they are wanted."""
        named = _named_device(args, kwargs)
        if name in _FILLED or name in _FROM_LISTS:
            wanted = named or (self._device(tensors[0]) if tensors else HOST)
            return (HOST if name in _FROM_LISTS else wanted), wanted
        here = self._device(tensors[0]) if tensors else HOST
        if name in _MOVES:
            return here, HOST if name == "cpu" else named or self._device(tensors[-1])
        if name not in ("__getitem__", "__setitem__"):
            places = {self._device(tensor) for tensor in tensors if tensor.dim()}
            assert len(places) < 2 or name in _PACKED, f"{name} computes on host and device at once, at {_line()}"
            here = DEVICE if DEVICE in map(self._device, tensors) else HOST
        counted = name == "where" and len(args) == 1
        counted |= name == "repeat_interleave" and len(tensors) > 1 and kwargs.get("output_size") is None
        return here, HOST if name in _READS or counted else named or here

    def _watch_index(self, tensor: torch.Tensor, index: Any) -> None:
        """Lists and tensors of the host are moved to where they pick from; what is true is counted on the host."""
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
                if self._device(part) == DEVICE:
                    self._note("download", "index by what is true")
            elif isinstance(part, list) or (isinstance(part, torch.Tensor) and part.dim()):
                if self._device(tensor) == DEVICE and (isinstance(part, list) or self._device(part) == HOST):
                    self._note("upload", "index from the host")

    def _note(self, kind: str, call: str) -> None:
        self.transfers.append(Transfer(kind, call, _line()))


def _tensors(values: tuple | list) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _named_device(args: tuple, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names; whatever is not the host is the device."""
    named = [value for value in (*args, kwargs.get("device")) if isinstance(value, torch.device)]
    return (HOST if named[0] == HOST else DEVICE) if named else None


def _real(leaf: Any) -> Any:
    return HOST if isinstance(leaf, torch.device) else leaf


def _line() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "not the package"
