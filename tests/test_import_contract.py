# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The floors of the package: a room imports from floors below its own, `TYPE_CHECKING` or not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import specblock_hf


ROOT = Path(specblock_hf.__file__).parent
# From the top down. Rooms that share a floor do not know each other.
FLOORS = (
    {"", "__main__", "custom_generate"},
    {"old_names"},
    {"cli"},
    {"evaluation", "adaptation"},
    {"training", "calibration"},
    {"generation"},
    {"target", "drafters"},
    {"drafting"},
    {"trees", "regeneration", "planning", "rounds_model"},
    {"data", "checkpoints", "prepacking", "grouped_attention"},
    {"compat", "devices", "foreign_hooks", "locks", "twins", "version"},
)
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
# Within drafters: a kind knows itself and what all kinds share. ParallelSpec is EAGLE-3's network, read otherwise.
SHARED = "common"
KINDS = {path.name for path in (ROOT / "drafters").iterdir() if path.is_dir()} - {SHARED, "__pycache__"}
LENT = {("drafters.parallelspec.modeling", "drafters.eagle3.modeling")}
# Who may name transformers' caches and private parts.
INSIDERS = ("compat", "target.", "generation.", "regeneration.slot_cache")
INSIDE = ("transformers.cache_utils", "transformers.generation.utils", "transformers.masking_utils")


def imports_of(path: Path, root: Path = ROOT) -> Iterator[str]:
    """What a file imports: modules of the package as `room.module`, others by their full names."""
    package = list(path.relative_to(root).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            if node.module:
                yield ".".join(["", *base, node.module])
            else:
                yield from (".".join(["", *base, alias.name]) for alias in node.names)


def is_allowed(importer: str, imported: str) -> bool:
    """Whether one module of the package may import another."""
    room, other = importer.split(".")[0], imported.split(".")[0]
    if room != other:
        return LEVEL[room] < LEVEL[other]
    if room != "drafters" or (importer, imported) in LENT:
        return True
    kind, other_kind = importer.split(".")[1:2], imported.split(".")[1:2]
    if kind and kind[0] in KINDS:
        return other_kind[0] in (kind[0], SHARED)
    return kind != [SHARED] or other_kind == [SHARED]


def offences(root: Path = ROOT) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        for imported in imports_of(path, root):
            if imported.startswith("."):
                if not is_allowed(name, imported[1:]):
                    found.append(f"{name} imports {imported[1:]}")
            elif imported.startswith(INSIDE) and not name.startswith(INSIDERS):
                found.append(f"{name} imports {imported}")
    return found


def test_every_room_imports_from_below():
    assert offences() == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("trees/tree.py", "from ..drafting.plan import Limits"),
        ("target/model.py", "if TYPE_CHECKING:\n    from ..generation.compilation import CompiledRounds"),
        ("target/model.py", "from ..drafters.auto import AutoDrafter"),
        ("drafters/medusa/loss.py", "from ..falcon.loss import falcon_loss"),
        ("drafters/common/head.py", "from ..specblock.modeling import SpecBlockModel"),
        ("training/trainer.py", "from transformers.cache_utils import DynamicCache"),
    ],
)
def test_an_import_that_runs_back_up_is_found(tmp_path, importer, line):
    (tmp_path / importer).parent.mkdir(parents=True)
    (tmp_path / importer).write_text(line + "\n")
    assert len(offences(tmp_path)) >= 1


def test_every_room_has_a_floor():
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} <= LEVEL.keys()
