# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Kinds of faults that users of this and of other libraries have met, one test for each, which tells what happens now:
`pytest tests -k cases -s`. Each kind has more members, in the tests of the part that it concerns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps


def case(number: int, fault: str) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """
    Makes a test of a function that checks what happens now and returns it as the end of the printed line.

    Args:
        number (`int`): Of the case.
        fault (`str`): What once went wrong.
    """

    def decorate(check: Callable[..., str]) -> Callable[..., None]:
        @wraps(check)
        def test(*args, **kwargs) -> None:
            print(f"\n{number:2d}. {fault}: {check(*args, **kwargs)}", end="")

        return test

    return decorate


# Targets: 1 to 8.


# Drafters: 9 to 11, 14, 15, 17.


# Adaptation: 12, 13, 16, 18.


# Checkpoints: 19 to 23.
