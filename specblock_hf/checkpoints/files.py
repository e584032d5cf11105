# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of a drafter, in a folder or on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import load_file


LOCATION_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
"""Patterns of the files that weights are written to, one of which would be read in place of the others."""
NO_VARIANTS = "a drafter's folder holds its weights once, so leave variant out and use a folder for each."


@dataclass(frozen=True)
class DrafterFiles:
    """
    The files of a checkpoint, in a folder or on the Hub; downloaded when asked for.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id.
        options (`dict`, *optional*):
            `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only` and `force_download`, as in
            `from_pretrained`.
    """

    name: str | os.PathLike
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str | os.PathLike, kwargs: Mapping[str, Any]) -> DrafterFiles:
        """
        With those of the arguments of a `from_pretrained` that say where files are.

        Raises:
            ValueError: There is a `variant` among them.
        """
        if kwargs.get("variant") is not None:
            raise ValueError(f"{name} cannot be read as a variant, {kwargs['variant']!r}; {NO_VARIANTS}")
        options = {key: kwargs[key] for key in LOCATION_OPTIONS if kwargs.get(key) is not None}
        return cls(os.fspath(name), options)

    @cached_property
    def config(self) -> dict[str, Any]:
        """
        What `config.json` says.

        Raises:
            OSError: There is none, or it cannot be had.
            ValueError: It is not JSON, or not an object.
        """
        return self._read_json(CONFIG, self.path(CONFIG))

    def path(self, filename: str) -> Path:
        """
        A file that must be there.

        Raises:
            OSError: It is not, cannot be had, or was damaged on the way.
        """
        found = self.optional(filename)
        if found is None:
            raise OSError(
                f"{self.name} has no {filename}, or not in the cache if the Hub may not be asked; check the name, "
                "revision and subfolder."
            )
        return found

    def optional(self, filename: str) -> Path | None:
        """A file that may be there, or `None`; raises as [`~DrafterFiles.path`] if that cannot be told."""
        options = dict(self.options)
        subfolder = options.pop("subfolder", None)
        if Path(self.name).is_dir():
            path = Path(self.name, subfolder or "", filename)
            return path if path.is_file() else None
        try:
            before = self._in_cache(filename)
            if before is None and filename == CONFIG:
                self._refuse_unreachable()
            found = hf_hub_download(os.fspath(self.name), filename, subfolder=subfolder, **options)
        except LocalEntryNotFoundError as error:
            if is_offline_mode() or options.get("local_files_only") or self._is_known_to_lack(filename):
                return None
            raise OSError(
                f"{filename} of {self.name} is not in the cache and the Hub cannot be asked for it "
                f"({error.__cause__ or error}); try again."
            ) from error
        except EntryNotFoundError:
            return None
        except (HTTPError, HFValidationError) as error:
            raise OSError(self._explain(error)) from error
        if found != before or options.get("force_download"):
            self._check_hash(Path(found), filename)
        return Path(found)

    def _refuse_unreachable(self) -> None:
        """Ask once before the Hub's client does, which tries six times for half a minute until it gives up."""
        if is_offline_mode() or self.options.get("local_files_only"):
            return
        try:
            get_hf_file_metadata(hf_hub_url(os.fspath(self.name), CONFIG), token=self.options.get("token"))
        except HfHubHTTPError:
            pass  # It answers.
        except HTTPError as error:
            raise OSError(
                f"There is no folder {self.name} here, and the Hub cannot be asked for a repository of that name "
                f"({error}); check the path or the connection."
            ) from None

    def _explain(self, error: Exception) -> str:
        if isinstance(error, GatedRepoError):
            return f"{self.name} is gated; accept its terms on the Hub, and pass token= or log in."
        if isinstance(error, RevisionNotFoundError):
            return (
                f"{self.name} has no revision {self.options['revision']}; name one of its branches, tags or commits."
            )
        if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            return (
                f"{self.name} is neither a folder nor a Hub repository that can be seen; check the name, and pass "
                "token= or log in if the repository is private."
            )
        return f"The Hub does not give {self.name} ({error}); try again later."

    def _read_json(self, filename: str, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{filename} of {self.name} is not valid JSON ({error}); download it again.") from error
        if not isinstance(found, dict):
            raise ValueError(
                f"{filename} of {self.name} is a JSON {type(found).__name__} and no object with names; download it "
                "again."
            )
        return found

    def weights(self) -> list[Path]:
        """
        The files with the weights: one or several of safetensors, otherwise PyTorch's.

        Raises:
            OSError: There are none, one is missing, or one was damaged on the way.
            ValueError: The list of several files is damaged, or names one elsewhere.
        """
        for single in ("model.safetensors", "pytorch_model.bin"):
            if (path := self.optional(single)) is not None:
                return [path]
            if (index := self.optional(f"{single}.index.json")) is not None:
                return self._shards(index)
        raise OSError(
            f"{self.name} has neither model.safetensors nor pytorch_model.bin, or not in the cache if the Hub may not "
            "be asked, so there are no weights to load; check the name, revision and subfolder."
        )

    def _shards(self, index: Path) -> list[Path]:
        weight_map = self._read_json(index.name, index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"{index.name} of {self.name} has no weight_map with the file of every tensor; download it again."
            )
        # Both kinds of separators, whatever this system's are.
        outside = [name for name in names if PureWindowsPath(name).name != name]
        paths = [] if outside else [self.path(name) for name in sorted(set(names))]
        # In the Hub's cache all files are links into one folder.
        outside += [path.name for path in paths if _stored(path).parent != _stored(index).parent]
        if outside:
            raise ValueError(
                f"{index.name} of {self.name} names {outside[0]!r}, which does not lie beside it, and files elsewhere "
                "are not read; put all of them into one folder if you trust them."
            )
        return paths

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """
        The shapes of all weights by name, from the heads of safetensors files: nothing large is read.

        Raises:
            ValueError: The weights are PyTorch's, or damaged.
        """
        found: dict[str, tuple[int, ...]] = {}
        for path in self.weights():
            if path.suffix != ".safetensors":
                raise ValueError(
                    f"{self.name} has its weights in {path.name}, and drafters in this library's layout keep them in "
                    "model.safetensors; save it again with save_pretrained, where you trust it."
                )
            with _explained(path, self.name), safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        All weights by name.

        Raises:
            ValueError: A file holds something else than tensors, or cannot be read.
        """
        return {key: value for path in self.weights() for key, value in read_tensors(path, self.name).items()}

    def _in_cache(self, filename: str) -> str | None:
        found = self._cached(filename)
        return found if isinstance(found, str) else None

    def _is_known_to_lack(self, filename: str) -> bool:
        """Whether the cache remembers that there is no such file in the revision that it has."""
        found = self._cached(filename)
        return found is not None and not isinstance(found, str)

    def _cached(self, filename: str) -> Any:
        """A path, a mark of the client's for files that are not in the repository, or `None` if nothing is known."""
        return try_to_load_from_cache(
            os.fspath(self.name),
            os.path.join(self.options.get("subfolder", ""), filename),
            cache_dir=self.options.get("cache_dir"),
            revision=self.options.get("revision"),
        )

    def _check_hash(self, path: Path, filename: str) -> None:
        # The client compares sizes only. The cache names a file after what the Hub says its hash is: the sha256 of a
        # large file, git's sha1 of a small one.
        stored = _stored(path)
        size = stored.stat().st_size
        digest = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % size)}.get(len(stored.name))
        if digest is None:
            return
        with stored.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != stored.name:
            for copy in (path.resolve(), stored, path):
                copy.unlink(missing_ok=True)
            raise OSError(
                f"{filename} of {self.name} arrived damaged: its hash is not the one that the Hub states; the copy "
                "was deleted, so load it again."
            )


def id_in_cache(path: str | os.PathLike) -> str | None:
    """The name of the repository that a folder or file of the Hub's cache is of; `None` for any other."""
    found = re.search(r"/models--(.+?)--(.+?)/snapshots/", PureWindowsPath(path).as_posix())
    return "/".join(found.groups()) if found else None


def _stored(path: Path) -> Path:
    """
    Where the Hub's cache keeps a file of a repository: one link further. What lies there may be a link in turn, into a
    store that all repositories share and that names files in its own way.
    """
    return Path(os.path.normpath(path.parent.resolve() / (os.readlink(path) if path.is_symlink() else path.name)))


def read_tensors(path: Path, name: object) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors or PyTorch file.

    Args:
        path (`Path`): The file.
        name (`str` or `os.PathLike`): The checkpoint, for messages.

    Raises:
        ValueError: It holds something else than tensors, or cannot be read.
    """
    with _explained(path, name):
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, so that a small file cannot unpack to a large one.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found, dict):
            raise TypeError
        return {name: _own_memory(tensor) for name, tensor in found.items()}


@contextmanager
def _explained(path: Path, name: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every format fails in its own way, and some name ways around the check
        if path.suffix == ".safetensors":
            raise ValueError(f"The weights of {name} are damaged ({error}); download them again.") from error
        raise ValueError(
            f"{path} is damaged or holds more than tensors, so it is not loaded ({type(error).__name__}); download it "
            "again, or convert it to safetensors where you trust it."
        ) from None


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise TypeError
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # a few numbers that pass for many
        raise ValueError
    return tensor.clone()
