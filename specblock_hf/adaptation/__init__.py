# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A drafter that learns while it serves; see [`OnlineAdaptationCallback`]."""

from .bandit import AdaptationBandit, Decision
from .callback import AdaptationEvent, OnlineAdaptationCallback
from .monitor import FallMonitor
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
