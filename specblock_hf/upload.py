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
"""Small numbers on their way from the host to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def upload(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    A small tensor of the host on a device. `numbers.to(device)` would wait until a GPU has done all that it was told
    before; this does not, as CUDA takes a copy of what it is yet to move. Others may not (MPS reads memory that has
    been freed, https://github.com/pytorch/pytorch/issues/189690): with them it waits.
    """
    return numbers.to(device, non_blocking=device.type == "cuda")


def on_device(numbers: Sequence[Any], device: torch.device) -> torch.Tensor:
    """The same from lists, nested as the tensor's dimensions."""
    return upload(torch.tensor(numbers), device)
