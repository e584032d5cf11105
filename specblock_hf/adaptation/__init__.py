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
"""A drafter that learns while it serves; see [`OnlineAdaptationCallback`]."""

from .bandit import AdaptationBandit, Decision
from .callback import AdaptationEvent, FallMonitor, OnlineAdaptationCallback
from .updater import DrafterUpdater, UpdateSettings


__all__ = [
    "AdaptationBandit",
    "AdaptationEvent",
    "Decision",
    "DrafterUpdater",
    "FallMonitor",
    "OnlineAdaptationCallback",
    "UpdateSettings",
]
