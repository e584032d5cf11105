# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Of the package, for itself and for setup.cfg."""

__version__ = "0.1.0"
