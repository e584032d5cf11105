# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Drafters on the Hub: fetching what a repository holds, and publishing a drafter with its card and provenance."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import Template
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    ModelCard,
    ModelCardData,
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
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from .provenance import provenance
from .saving import save_folder_whole


LOCATION_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
TEMPLATES = Path(__file__).parent / "templates"
CONFIG = "config.json"
CARD, PROVENANCE, CUSTOM_GENERATE = "README.md", "provenance.json", "custom_generate/generate.py"
WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
"""Patterns of the files that weights are written to, one of which would be read in place of the others."""


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
        """With those of the arguments of a `from_pretrained` that say where files are."""
        options = {key: kwargs[key] for key in LOCATION_OPTIONS if kwargs.get(key) is not None}
        return cls(os.fspath(name), options)

    @cached_property
    def config(self) -> dict[str, Any]:
        """
        What `config.json` says.

        Raises:
            OSError: There is none, or it cannot be had.
            ValueError: It is not JSON.
        """
        path = self.path(CONFIG)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"config.json of {self.name} is not valid JSON ({error}); download it again.") from error

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
            if is_offline_mode() or options.get("local_files_only"):
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

    def weights(self) -> list[Path]:
        """
        The files with the weights: one or several of safetensors, otherwise PyTorch's.

        Raises:
            OSError: There are none, one is missing, or one was damaged on the way.
        """
        for single in ("model.safetensors", "pytorch_model.bin"):
            if (path := self.optional(single)) is not None:
                return [path]
            if (index := self.optional(f"{single}.index.json")) is not None:
                return [
                    self.path(shard) for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))
                ]
        raise OSError(
            f"{self.name} has neither model.safetensors nor pytorch_model.bin, so there are no weights to load; check "
            "the name, revision and subfolder."
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        All weights by name.

        Raises:
            ValueError: A file holds something else than tensors, or cannot be read.
        """
        return {name: tensor for path in self.weights() for name, tensor in read_tensors(path).items()}

    def _in_cache(self, filename: str) -> str | None:
        found = try_to_load_from_cache(
            os.fspath(self.name),
            os.path.join(self.options.get("subfolder", ""), filename),
            cache_dir=self.options.get("cache_dir"),
            revision=self.options.get("revision"),
        )
        return found if isinstance(found, str) else None

    def _check_hash(self, path: Path, filename: str) -> None:
        # The client compares sizes only. The cache names a file after what the Hub says its hash is: the sha256 of a
        # large file, git's sha1 of a small one.
        stored = path.resolve()
        size = stored.stat().st_size
        digest = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % size)}.get(len(stored.name))
        if digest is None:
            return
        with stored.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != stored.name:
            stored.unlink()
            path.unlink(missing_ok=True)
            raise OSError(
                f"{filename} of {self.name} arrived damaged: its hash is not the one that the Hub states; the copy "
                "was deleted, so load it again."
            )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors or PyTorch file.

    Raises:
        ValueError: It holds something else than tensors, or cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every format fails in its own way
        raise ValueError(
            f"{path} is damaged or holds more than tensors, so it is not loaded ({type(error).__name__}); download it "
            "again, or convert it to safetensors where you trust it."
        ) from error


@dataclass(frozen=True)
class CardFacts:
    """
    What a model card says that a drafter's configuration does not.

    Args:
        license (`str`, *optional*): Of the weights; the target's usually binds them.
        language (`tuple[str, ...]`, *optional*): Codes of the languages of the training data.
        datasets (`tuple[str, ...]`, *optional*): Hub ids or names of the training data.
        training (`dict`, *optional*): Hyperparameters by name, such as `specblock train` leaves in `arguments.json`.
        results (`dict`, *optional*):
            What was measured: `hardware`, `dtype`, `versions` (a dict) and `rows`, each with `suite`, `prompts`,
            `temperature`, `tau` and `speedup`.

    Raises:
        ValueError: `results` lacks one of these, so that a number would stand without its conditions.
    """

    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    training: Mapping[str, Any] | None = None
    results: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.results is None:
            return
        lacking = [key for key in ("hardware", "dtype", "versions", "rows") if not self.results.get(key)]
        for row in self.results.get("rows") or []:
            lacking += [key for key in ("suite", "prompts", "temperature", "tau", "speedup") if key not in row]
        if lacking:
            raise ValueError(
                f"The results lack {', '.join(dict.fromkeys(lacking))}, and a card shows no number without its "
                "conditions; measure again with a tool that records them."
            )


def model_card(config: PreTrainedConfig, name: str, facts: CardFacts, parameters: int | None = None) -> ModelCard:
    """
    Args:
        config ([`SpecBlockConfig`] or [`Eagle3Config`]): The drafter's.
        name (`str`): Hub id, for the title and the example.
        facts (`CardFacts`): What the configuration does not say.
        parameters (`int`, *optional*): How many weights the drafter has; without, the card says that there are none.

    Returns:
        [`~huggingface_hub.ModelCard`]: From the package's template. Its numbers come from `facts.results` alone.
    """
    data = ModelCardData(
        library_name="specblock_hf",
        pipeline_tag="text-generation",
        base_model=config.target_name_or_path,
        base_model_relation="adapter" if config.target_name_or_path else None,
        tags=["speculative-decoding", config.model_type, "drafter"],
        license=facts.license,
        datasets=list(facts.datasets) or None,
        language=list(facts.language) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "drafter_card.md"),
        name=name,
        config=config,
        facts=facts,
        parameters=parameters,
    )


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    card: ModelCard | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload drafter",
) -> CommitInfo:
    """
    Upload a saved drafter in one commit, and with it the file that `custom_generate="repo"` needs.

    Args:
        folder (`str` or `os.PathLike`): What `save_pretrained` wrote.
        repo_id (`str`): Made if it is not there.
        card ([`~huggingface_hub.ModelCard`], *optional*):
            Goes in place of the folder's card. Without one, a card that the repository has already is left alone.
        private (`bool`, *optional*): Of a new repository.
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.HfApi`].
        revision (`str`, *optional*): Branch; made if it is not there.
        create_pr (`bool`, *optional*, defaults to `False`): Ask for the change instead of making it.
        commit_message (`str`, *optional*, defaults to `"Upload drafter"`).
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    root = Path(folder)
    files: dict[str, Path | bytes] = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    if card is not None:
        files[CARD] = str(card).encode()
    elif CARD in files and api.file_exists(repo_id, CARD, revision=revision):
        del files[CARD]
    template = Template((TEMPLATES / "custom_generate.py.txt").read_text(encoding="utf-8"))
    files[CUSTOM_GENERATE] = template.substitute(repo_id=repo_id).encode()
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )


class HubModel(PreTrainedModel):
    """A [`~transformers.PreTrainedModel`] that writes its card and provenance where it is saved, and uploads both."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args,
        push_to_hub: bool = False,
        facts: CardFacts | None = None,
        **kwargs,
    ) -> None:
        """
        As [`~transformers.PreTrainedModel.save_pretrained`], with a model card and `provenance.json`. A card that lies
        in the folder already is kept unless `facts` are given, and so is every other file that holds no weights. What
        fails in the middle leaves the folder as it was.

        Args:
            facts (`CardFacts`, *optional*): What the card says beside the configuration.
        """
        folder = Path(save_directory)
        names = ("repo_id", "private", "revision", "create_pr", "commit_message")
        upload = {name: kwargs.pop(name) for name in names if name in kwargs}
        repo_id = upload.pop("repo_id", folder.name)
        if not is_main_process:  # its part of a collective operation; it writes nothing
            super().save_pretrained(save_directory, False, *args, **kwargs)
            return
        with save_folder_whole(folder, obsolete=WEIGHTS) as written:
            super().save_pretrained(written, True, *args, **kwargs)
            (written / PROVENANCE).write_text(json.dumps(provenance(), indent=2) + "\n", encoding="utf-8")
            if facts is not None or not (folder / CARD).exists():
                self.model_card(repo_id, facts).save(written / CARD)
        if push_to_hub:
            publish(folder, repo_id, token=kwargs.get("token"), **upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        facts: CardFacts | None = None,
        max_shard_size: int | str = "5GB",
        **kwargs,
    ) -> CommitInfo:
        """
        Upload the drafter with its card and provenance.

        Args:
            repo_id (`str`): Made if it is not there.
            facts (`CardFacts`, *optional*): What the card says beside the configuration.
            max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Largest file of weights.
            **kwargs: `private`, `token`, `revision`, `create_pr` and `commit_message`; see [`publish`].
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, repo_id=repo_id)
            card = self.model_card(repo_id, facts) if facts is not None else None
            return publish(folder, repo_id, card=card, **kwargs)

    def model_card(self, name: str, facts: CardFacts | None = None) -> ModelCard:
        """The card under that name; see [`model_card`]."""
        parameters = sum(weight.numel() for weight in self.parameters())
        return model_card(self.config, name, facts or CardFacts(), parameters)
