# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m specblock_hf`, which is also how `accelerate launch -m` starts the command."""

import sys

from .cli import main


sys.exit(main())
