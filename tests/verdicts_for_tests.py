# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What can become of a random call, and how it is compared with plain decoding."""

from __future__ import annotations

import re
import signal
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import specblock_hf


FAULTS = ("mismatch", "raw error", "needless refusal", "late refusal", "touched target", "unheard")
FAULTS = (*FAULTS, "over bound", "spoilt drafter", "slow")
SLOW = 30  # seconds of the process, which others on the machine do not slow down
_PACKAGE = Path(specblock_hf.__file__).parent
_CLOSE = 1e-3  # of keys, values and scores


@dataclass
class Verdict:
    """
    What became of a case.

    Args:
        outcome (`str`):
            "same" tokens, same "distribution" (where a seed's tokens cannot be compared), "refused" in a sentence of
            ours, "plain raises" (and so do we, or we write), "other past" (an exception left less in the cache, on
            which the next tokens of this target depend), "left alone" by an attached drafter, or one of
            `FAULTS`.
        detail (`str`): The sentence, or what is wrong.
        seconds (`float`): Of the process for the whole case, plain decoding included.
        kept (`int`): Drafted tokens that were kept.
    """

    outcome: str
    detail: str = ""
    seconds: float = 0.0
    kept: int = 0


class Fault(AssertionError):
    """A promise was broken; `args` are one of `FAULTS` and what is wrong."""


class TooSlow(BaseException):
    """A case takes longer than it may."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*args: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def is_refusal(error: BaseException) -> bool:
    """One sentence of this package: what, why; what to do."""
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    said = str(error)
    return _PACKAGE in raised_in.parents and "; " in said and said.endswith(".") and "\n" not in said


def sentence(error: BaseException) -> str:
    """What an error says, without the name of the folder where a drafter was saved."""
    return re.sub(rf"{tempfile.gettempdir()}/\w+", "FOLDER", str(error))


def short(error: BaseException | None) -> str:
    """An error without the numbers in it, which may be others for the same reason."""
    return re.sub(r"\d+", "#", f"{type(error).__name__}: {error}".splitlines()[0][:300]) if error else "no error"


def place(error: BaseException) -> str:
    """The last places in this package and at all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (frames[-1], *ours[:-4:-1])]
    return " < ".join(dict.fromkeys(places))


def cache_difference(ours: Any, theirs: Any, visible: torch.BoolTensor) -> str:
    """How a cache differs from plain decoding's in columns that are not padding; empty if it does not."""
    columns, expected = int(ours.get_seq_length()), int(theirs.get_seq_length())
    if columns != expected:
        return f"{columns} columns instead of {expected}"
    visible = (
        visible[:, :columns]
        if visible.shape[1] >= columns
        else nn.functional.pad(visible, (columns - visible.shape[1], 0), value=True)
    )
    for number, (mine, plain) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        if plain.keys is None:
            continue
        if mine.keys.shape != plain.keys.shape:
            return f"layer {number} is {tuple(mine.keys.shape)} instead of {tuple(plain.keys.shape)}"
        for name in ("keys", "values"):
            stored = min(columns, plain.keys.shape[2])
            difference = (getattr(mine, name) - getattr(plain, name))[:, :, :stored].abs().amax((1, 3))
            if bool((difference[visible[:, columns - stored :]] > _CLOSE).any()):
                return f"{name} of layer {number}"
    return ""


def all_close(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=_CLOSE, equal_nan=True)
    return len(ours) == len(theirs) and all(map(all_close, ours, theirs))
