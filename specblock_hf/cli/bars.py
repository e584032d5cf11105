# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Whose progress bars a command shows: its own, and the Hub's, because downloads take long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging


@contextmanager
def without_bars(quiet: bool = False) -> Iterator[None]:
    """
    Silence transformers' progress bars, which then are as they were.

    Args:
        quiet (`bool`, *optional*, defaults to `False`): Silence the Hub's, which show downloads, too.
    """
    bars, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # and the Hub's with them
    _show_downloads(downloads and not quiet)
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        _show_downloads(downloads)


def _show_downloads(shown: bool) -> None:
    if shown:
        enable_progress_bars()
    else:
        disable_progress_bars()
