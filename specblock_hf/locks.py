# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A lock for what is copied, pickled and forked."""

from __future__ import annotations

import os
import threading


class DrafterLock:
    """
    A re-entrant lock that copies as a fresh one, so that what has it stays deep-copyable and picklable. A forked
    process has one of its own: a thread that held it at that moment is not there to let it go.
    """

    def __init__(self) -> None:
        self._by_process: dict[int, threading.RLock] = {}

    def __enter__(self) -> None:
        process = os.getpid()
        # `setdefault` is atomic: threads that come first together get the same lock.
        lock = self._by_process.get(process) or self._by_process.setdefault(process, threading.RLock())
        lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._by_process[os.getpid()].release()

    def __deepcopy__(self, memo: dict) -> DrafterLock:
        return DrafterLock()

    def __reduce__(self) -> tuple:
        return (DrafterLock, ())
