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
Loading without surprises: every weight of a checkpoint must be asked for, and every weight asked for must be
there.
"""

from __future__ import annotations

from transformers import PreTrainedModel


class StrictPreTrainedModel(PreTrainedModel):
    """A [`~transformers.PreTrainedModel`] that refuses a checkpoint which does not fit it tensor by tensor."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but strict.

        Raises:
            `ValueError`: A tensor is missing, unexpected or misshapen; the message names it.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        problems = [
            f"{what} {', '.join(sorted(map(str, names)))}"
            for what, names in (
                ("missing", info["missing_keys"]),
                ("unexpected", info["unexpected_keys"]),
                ("misshapen", info["mismatched_keys"]),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a complete {cls.__name__} checkpoint: {'; '.join(problems)}. "
                "Download it again, or convert it with `specblock convert` if it has another layout."
            )
        return (model, info) if output_loading_info else model
