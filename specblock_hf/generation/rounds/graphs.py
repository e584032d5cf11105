# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Functions of fixed buffers, captured as CUDA graphs once they have been used often enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from typing import Any, Protocol

import torch

from ...devices import undisturbed


PATIENCE = 8
"""Rounds that a step runs uncaptured first: capturing takes about a second, which a short answer would never earn."""


class Recorder(Protocol):
    """Captures functions that read and write tensors which stay where they are."""

    def warm(self, function: Callable[[], Any]) -> Any:
        """Run the function for its result, in such a way that it can be captured next."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """
        Capture the function without running it: what replays it, and the tensors that every replay writes its result
        to.
        """


class CudaGraphs:
    """
    Captures CUDA graphs that share one pool of memory, which no other recorder's graphs touch: the replay of one may
    overwrite what later ones have made, but nothing that is still to be read in a round.

    Args:
        device (`torch.device`): Where all tensors are.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # Whatever ran uncaptured on a stream has left a workspace there that others may free. Nothing does where
        # graphs are captured, so that theirs lies in their own pool: torch hands out the same 32 streams again and
        # again, but others of another priority.
        self._warming, self._capturing = torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1)
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self._warming.wait_stream(current)
        with torch.cuda.stream(self._warming):
            result = function()
        current.wait_stream(self._warming)
        return result

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        # The stream is left here, because a capture that fails does not leave it.
        with undisturbed, torch.cuda.stream(self._capturing):
            try:
                return self._capture(function, self._pool)
            except RuntimeError:
                # Random numbers count as captured from then on, for everybody, until a capture has ended well.
                with suppress(RuntimeError):
                    self._capture(lambda: torch.zeros((), device=self.device), torch.cuda.graph_pool_handle())
                raise

    def _capture(self, function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do on the device.
        with torch.cuda.graph(graph, pool=pool, stream=self._capturing, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


class Step:
    """
    A part of a round: a function without arguments. All it works on is in buffers, or was returned by a step before
    it. Where there is a recorder, it is captured in a later use, whose own result is that of an uncaptured run.

    Args:
        function (`Callable`): Computes a tensor, or tuples or dataclasses of them; must not mind being called twice
            where the second time only records.
        recorder (`Callable`):
            The [`Recorder`] at the moment, or `None` if nothing is captured (any more). What was captured before is
            replayed all the same.
        failed (`Callable`): Told the error if it could not be captured, after which no recorder may be there.
        patience (`int`, *optional*, defaults to 0): Uses before the one that captures.

    Attributes:
        captured (`bool`): The last use was a replay.
        settled (`bool`): The last use cost what later ones will, which is so unless it will be captured yet.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        recorder: Callable[[], Recorder | None],
        failed: Callable[[Exception], None],
        patience: int = 0,
    ):
        self._function, self._recorder, self._failed, self._patience = function, recorder, failed, patience
        self._replay: Callable[[], None] | None = None
        self._result: Any = None
        self.captured, self.settled = False, recorder() is None

    def __call__(self) -> Any:
        if self._replay is not None:
            self.captured = self.settled = True
            self._replay()
            return self._result
        recorder = self._recorder()
        self.settled = recorder is None
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if recorder is None or self._patience > 0:
                self._patience -= 1
                return self._function()
            with _casting_anew():
                result = recorder.warm(self._function)
                try:
                    self._replay, self._result = recorder.record(self._function)
                except RuntimeError as error:
                    self._failed(error)
                    return result
            # What is captured next shall read what replays of this write.
            for place, value in zip(_tensors_of(self._result), _tensors_of(result), strict=True):
                place.copy_(value)
        return self._result


@contextmanager
def _casting_anew() -> Iterator[None]:
    """Autocast takes no copies of weights that it has made before: a graph would read them when they are gone."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors in what a step returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    if is_dataclass(result):
        result = list(vars(result).values())
    return [tensor for part in result for tensor in _tensors_of(part)] if isinstance(result, list | tuple) else []
