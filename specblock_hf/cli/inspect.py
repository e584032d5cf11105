# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock inspect`: what a drafter is, for which target, whether it fits one, and what it drafts for it."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoConfig

from ..checkpoints.files import DrafterFiles
from ..checkpoints.loading import StrictPreTrainedModel, auto_class
from ..drafters.auto import AutoDrafter
from ..drafters.common.configuration import UNRECORDED_LAYER
from ..drafters.layouts import OURS, layout_of
from . import inspect_trace as trace
from .options import given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("drafter", help="folder or Hub id")
    parser.add_argument("--target", help="folder or Hub id of a target to check against; its weights are not loaded")
    parser.add_argument("--revision", help="branch, tag or commit of the drafter")
    parser.add_argument(
        "--trace", action="store_true", help="run the target (default: the default one) and show a draft tree instead"
    )
    trace.add_arguments(parser.add_argument_group("of a trace; any of them asks for one"))


def run(args: argparse.Namespace) -> int:
    """
    Print what is known.

    Returns:
        `int`: 1 if it does not fit `--target`, otherwise 0.
    """
    if args.trace or given(args, trace.add_arguments):
        return trace.run(args)
    drafter = AutoDrafter.from_pretrained(args.drafter, revision=args.revision)
    files = DrafterFiles.of(args.drafter, {"revision": args.revision})
    layout = layout_of(files.config, args.drafter)
    print("\n".join(describe(drafter, OURS if layout is None else layout.name)))
    if args.target is None:
        return 0
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(args.target)
        target = auto_class(config).from_config(config)
    try:
        drafter.check_target(target)
    except ValueError as error:
        print(f"compatible with {args.target}: no. {error}")
        return 1
    print(f"compatible with {args.target}: yes")
    return 0


def describe(drafter: StrictPreTrainedModel, layout: str) -> list[str]:
    """
    Args:
        drafter ([`SpecBlockDrafter`] or [`Eagle3Drafter`]): Loaded.
        layout (`str`): Of the checkpoint that it came from.

    Returns:
        `list[str]`: The lines to print.
    """
    config = drafter.config
    parameters = sum(weight.numel() for weight in drafter.parameters())
    size = sum(weight.nbytes for weight in drafter.parameters())
    layers = ", ".join(map(str, config.feature_layers))
    if UNRECORDED_LAYER in config.feature_layers:
        layers = "not recorded: 2, N // 2 and N - 3 of the target's N layers"
    depth = config.target_num_layers or "an unrecorded number of"
    return [
        f"class: {type(drafter).__name__}",
        f"layout: {layout}",
        f"target: {config.target_name_or_path or 'not recorded'} (width {config.target_hidden_size}, {depth} layers)",
        f"parameters: {parameters:,} in {str(drafter.dtype).removeprefix('torch.')}, {size / 1e6:.1f} MB",
        f"layers, width, tokens a forward: {config.num_hidden_layers}, {config.hidden_size}, {config.block_size}",
        f"draft vocabulary: {config.draft_vocab_size} of {config.vocab_size} tokens "
        f"({config.draft_vocab_size / config.vocab_size:.1%})",
        f"reads hidden states: {layers}",
        f"RoPE: {config.rope_parameters['rope_type']}, theta {config.rope_parameters['rope_theta']:g}",
        f"eos, pad, bos: {config.eos_token_id}, {config.pad_token_id}, {config.bos_token_id}",
    ]
