# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock push`: a saved drafter to the Hub, with a card that is made from facts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..checkpoints.card import TRAINING, TRAINING_FACTS, CardFacts
from ..checkpoints.files import DrafterFiles
from ..checkpoints.hub import CARD, files_to_publish, publish, saved_folder
from ..checkpoints.provenance import published_setting
from ..drafters.auto import AutoDrafter
from ..drafters.layouts import layout_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("folder", help="what save_pretrained or `specblock convert` wrote")
    parser.add_argument("repo", help="Hub id; made if it is not there")
    parser.add_argument("--card", help="file to use as the card instead of making one")
    parser.add_argument("--license", help="of the weights")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--language", **several, help="codes of the training data's languages")
    parser.add_argument("--dataset", **several, help="Hub ids or names of the training data")
    parser.add_argument(
        "--training",
        help="JSON file of hyperparameters, such as a training run's arguments.json (default: what `specblock train` "
        f"left in the folder's {TRAINING})",
    )
    parser.add_argument("--results", help="JSON file of measurements; without one the card shows no numbers")
    parser.add_argument("--private", action="store_true", default=None, help="for a new repository")
    parser.add_argument("--revision", help="branch; made if it is not there")
    parser.add_argument("--create-pr", action="store_true", help="ask for the change instead of making it")
    parser.add_argument("--message", default="Upload drafter", help="of the commit (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show the card and the files, and upload nothing")


def run(args: argparse.Namespace) -> None:
    """Check that the folder holds a whole drafter, upload it, and say where it is."""
    layout = layout_of(DrafterFiles(saved_folder(args.folder)).config, args.folder)
    if layout is not None:
        raise ValueError(f"{args.folder} is in the layout {layout.name}; run `specblock convert` first.")
    drafter = AutoDrafter.from_pretrained(args.folder)
    if args.card:
        card = ModelCard(Path(args.card).read_text(encoding="utf-8"))
    else:
        recorded = _read(Path(args.folder) / TRAINING) if (Path(args.folder) / TRAINING).is_file() else {}
        if args.training:
            # As a card may show hyperparameters: of paths the last component.
            read = _read(args.training).items()
            recorded["training"] = {name: published_setting(said) for name, said in read}
        facts = CardFacts(
            license=args.license,
            language=tuple(args.language),
            datasets=tuple(args.dataset),
            results=_read(args.results) if args.results else None,
            **{name: recorded[name] for name in TRAINING_FACTS if recorded.get(name)},
        )
        card = drafter.model_card(args.repo, facts)
    if args.dry_run:
        print("\n".join(preview(files_to_publish(args.folder, args.repo, card), args.repo)))
        return
    commit = publish(
        args.folder,
        args.repo,
        card=card,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    print(commit.pr_url or commit.commit_url)


def preview(files: Mapping[str, Path | bytes], repo: str) -> list[str]:
    """The card and the files of an upload, in lines to print."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    card = files[CARD]
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    width = max(map(len, sizes))
    listing = [f"{name:{width}}  {size:>13,} bytes" for name, size in sorted(sizes.items())]
    return [text, "", f"Nothing was uploaded. {repo} would get:", *listing]


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); name a file that a measurement or training wrote."
        ) from error
