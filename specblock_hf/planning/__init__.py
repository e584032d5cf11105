# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""How much is worth drafting, found out while decoding. Plain numbers: no torch, no clock, no randomness."""
