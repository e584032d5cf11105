# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which device, what goes to it, and what forwards may use of it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from typing import Any, TypeVar

import torch
from torch.backends import cuda


Result = TypeVar("Result")


def upload(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    A small tensor of the host on a device. `numbers.to(device)` would wait until a GPU has done all that it was told
    before; this does not, as CUDA takes a copy of what it is yet to move. Others may not (MPS reads memory that has
    been freed, https://github.com/pytorch/pytorch/issues/189690): with them it waits.
    """
    return numbers.to(device, non_blocking=device.type == "cuda")


def on_device(numbers: Sequence[Any], device: torch.device) -> torch.Tensor:
    """The same from lists, nested as the tensor's dimensions."""
    return upload(torch.tensor(numbers, device="cpu"), device)  # whatever the default device is


undisturbed = threading.Lock()
"""
Held while a CUDA graph is captured and while somebody waits for a whole device, which is forbidden meanwhile, in other
threads as well.
"""


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type != "cpu":
        with undisturbed:
            torch.accelerator.synchronize(device)


def timed(device: torch.device, call: Callable[[], Result]) -> tuple[Result, float]:
    """What a call returns, and the seconds until a device has done all that it was told by it."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


class PhaseClock:
    """
    Splits time into phases. On CUDA it is the device's own: marks are events on the stream, and nobody waits for them
    before `totals` is asked for.

    Args:
        device (`torch.device`): Whose time it is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.laps: list[tuple[str, Any, Any]] = []
        self._last: Any = None

    def start(self) -> None:
        """Begin the next phase now, whenever the last one ended."""
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Charge `phase` with the time since the last call."""
        before, self._last = self._last, self._now()
        self.laps.append((phase, before, self._last))

    def totals(self) -> defaultdict[str, float]:
        """Seconds of every phase."""
        synchronize(self.device)
        seconds: defaultdict[str, float] = defaultdict(float)
        for phase, first, last in self.laps:
            seconds[phase] += self._between(first, last)
        return seconds

    def shares(self) -> dict[str, float]:
        """Share of every phase since the last call of this method."""
        seconds, self.laps = self.totals(), []
        total = sum(seconds.values())
        return {phase: round(lasted / total, 3) for phase, lasted in seconds.items()}

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1000 if self.device.type == "cuda" else last - first

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def best_device() -> torch.device:
    """This machine's accelerator if it has one, otherwise the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


class _WithoutCudnnAttention(ContextDecorator):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._left_out = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                others = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
                self._left_out = cuda.cudnn_sdp_enabled() and any(enabled() for enabled in others)
                if self._left_out:
                    cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def __exit__(self, *exc_info: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._left_out:
                cuda.enable_cudnn_sdp(True)


without_cudnn_attention = _WithoutCudnnAttention()
"""
A context, or a decorator, for every forward over shapes that change from round to round or from batch to batch. For
masked attention torch prefers cuDNN on Hopper, which plans each new shape for 14 ms forward and 42 backward (H100,
torch 2.11). What else the user has allowed stays allowed, and nothing changes for a user who has allowed cuDNN alone.
The backward pass takes the backend of its forward.

torch keeps this setting for the whole process, so that it is taken back when the last of several threads has left.
`torch.nn.attention.sdpa_kernel` would restore what it found, which may be what another thread has set for a moment.
"""
