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
What differs between the supported releases of transformers. Nothing else in the package asks for a version, and every
entry says which oldest supported release makes it unnecessary.
"""

from __future__ import annotations

import re
import warnings

# Nothing more of transformers, and nothing of this package: an old release must get as far as the check.
import transformers


OLDEST, NEWEST = (5, 17), (5, 24)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_transformers(version: str = transformers.__version__) -> None:
    """
    Refuse a transformers release that is too old, warn about one that nobody has tried.

    Args:
        version (`str`, *optional*, defaults to the installed release).

    Raises:
        ImportError: Below 5.17.
    """
    if _release(version) < OLDEST:
        raise ImportError(
            f"specblock_hf needs transformers 5.17 or newer because it relies on that release's caches, and {version} "
            "is installed; run pip install -U transformers."
        )
    if _release(version) > NEWEST:
        warnings.warn(
            f"specblock_hf was tested with transformers 5.17 to 5.24 and {version} is installed, whose caches may "
            "differ; install transformers==5.24.* if a call fails.",
            stacklevel=2,
        )


CACHE = "cache" if _release(transformers.__version__) >= (5, 24) else "past_key_values"
"""
What a cache is called in forwards, in `model_kwargs` and in outputs, which 5.24 renamed; the old name warns there.
Unnecessary once 5.24 is the oldest.
"""


__all__ = ["CACHE", "NEWEST", "OLDEST", "check_transformers"]
