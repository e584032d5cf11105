# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Every kind of drafter in a room of its own; importing this registers them."""

from . import dflash, eagle3, falcon, medusa, parallelspec, specblock


__all__ = ["dflash", "eagle3", "falcon", "medusa", "parallelspec", "specblock"]
