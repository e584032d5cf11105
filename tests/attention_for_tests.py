# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which backends attention may take, call by call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.backends import cuda
from torch.nn import functional


ALL = {"cudnn", "flash", "mem_efficient", "math"}
OURS = ALL - {"cudnn"}


def allowed() -> set[str]:
    """What torch may choose from at this moment."""
    return {name for name in ALL if getattr(cuda, f"{name}_sdp_enabled")()}


@contextmanager
def watched_attention() -> Iterator[list[set[str]]]:
    """What each call of `scaled_dot_product_attention` may choose from; in the end all is as it was."""
    calls, attend = [], functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(allowed())
        return attend(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        assert allowed() == ALL
        yield calls
        assert allowed() == ALL


def only_ours(calls: list[set[str]]) -> bool:
    """There was attention, and cuDNN was left out of all of it."""
    return bool(calls) and all(backends == OURS for backends in calls)
