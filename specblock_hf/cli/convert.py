# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock convert`: a drafter in another layout."""

from __future__ import annotations

import argparse
import sys

from transformers import AutoConfig

from ..drafters.auto import AutoDrafter
from ..drafters.common.registry import published_layouts
from ..drafters.layouts import OURS, write_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("drafter", help="folder or Hub id, in any layout that can be read")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--to",
        choices=[OURS, *(name for name, (_, layout) in published_layouts().items() if layout.is_writable)],
        default=OURS,
        help="layout: ours, or one that the drafter's kind is published in (default: %(default)s)",
    )
    parser.add_argument("--target", help="folder or Hub id; fills in what the layout read from does not record")
    parser.add_argument("--revision", help="branch, tag or commit of the drafter")


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    target = AutoConfig.from_pretrained(args.target) if args.target else None
    drafter = AutoDrafter.from_pretrained(args.drafter, target=target, revision=args.revision)
    write_checkpoint(drafter, args.output, args.to)
    if args.to != OURS and drafter.config.to_dict().get("acceptance"):
        print(
            f"the layout {args.to} has no place for what the drafter's plans accept, which calibrate() chooses by; "
            "keep the folder that this was converted from",
            file=sys.stderr,
        )
    print(f"{type(drafter).__name__} written to {args.output} in the layout {args.to}")
