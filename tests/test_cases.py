# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
