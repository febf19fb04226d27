"""OpenAI's releases: where GPT-2's weights are published, and how they are fetched and kept.

fetch(size)          a size name -> the local folder that holds it, downloaded if need be
open_release(size)   the same, opened, and fetched again if the cached copy is damaged
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from micrograd_gpt.support.cli import say
from micrograd_gpt.support.download import cache_folder, download, reason
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import sha256
from micrograd_gpt.weights.config import CONFIG, is_gpt2, published_shape, size_name
from micrograd_gpt.weights.formats import MODEL, Weights, open_weights
from micrograd_gpt.weights.tf_checkpoint import TFCheckpoint


@dataclass(frozen=True)
class Release:
    """One size as published: its Hugging Face repository, and what is known of its files.

    A safetensors file's length must agree with its own header, and a TensorFlow checkpoint's with
    its index, so the length is checked for every size; for 124M it is known beforehand too.
    """

    repository: str
    safetensors_sha256: str | None = None  # of model.safetensors
    openai_data_bytes: int | None = None  # length of model.ckpt.data-00000-of-00001


RELEASES = {
    "124M": Release(
        "openai-community/gpt2",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        497_759_232,
    ),
    "355M": Release("openai-community/gpt2-medium"),
    "774M": Release("openai-community/gpt2-large"),
    "1558M": Release("openai-community/gpt2-xl"),
}
OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
# Small files first: if the server answers with something else, they show it before the large one.
OPENAI_FILES = ("checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001")


@dataclass(frozen=True)
class HuggingFace:
    """Weights as safetensors from the Hugging Face Hub, through huggingface_hub.

    That library resumes downloads, shows their progress, keeps them in its cache, and obeys its
    environment: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HTTPS_PROXY and the rest.
    `endpoint` and `cache_folder` override that environment if given.
    """

    endpoint: str | None = None
    cache_folder: Path | None = None

    label = "Hugging Face"

    def cached(self, size: str) -> Path | None:
        """The folder of huggingface_hub's cache that holds the weights, without the network."""
        try:
            self._file(size, CONFIG, local_files_only=True)
            return self._file(size, MODEL, local_files_only=True).parent
        # Nor has it one without a home (RuntimeError), or with a token that cannot be read
        except (OSError, ValueError, RuntimeError):
            return None

    def download(self, size: str) -> Path:
        """Fetch the weights into huggingface_hub's cache; UserError if that can't be done."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        repository = RELEASES[size].repository
        try:
            # Asked first because it fails at once: without a network, the download itself keeps
            # trying for half a minute before it says so.
            get_hf_file_metadata(hf_hub_url(repository, MODEL, endpoint=self.endpoint))
            self._file(size, CONFIG)
            folder = self._file(size, MODEL).parent
        except Exception as error:  # its own, and those of the HTTP library that its version uses
            raise UserError(f"cannot fetch {repository}: {reason(error)}") from error
        try:
            _open_published(folder, size)
            self.verify(folder, size)
        except UserError as error:
            self.remove(size)
            raise _thrown_away(repository, error) from error
        return folder

    def verify(self, folder: Path, size: str) -> None:
        """Compare the file's checksum with the published one, if known; UserError if it differs."""
        if RELEASES[size].safetensors_sha256 not in (None, sha256(folder / MODEL)):
            raise UserError(f"{folder / MODEL} is not the published file (its sha256 differs)")

    def remove(self, size: str) -> None:
        """Remove the weights from huggingface_hub's cache; UserError if that can't be done."""
        if folder := self.cached(size):
            for name in (CONFIG, MODEL):
                _remove((folder / name).resolve())  # the cache's blob, which the name links to
                _remove(folder / name)

    def _file(self, size: str, name: str, local_files_only: bool = False) -> Path:
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(
            RELEASES[size].repository,
            name,
            endpoint=self.endpoint,
            cache_dir=self.cache_folder,
            local_files_only=local_files_only,
        )
        return Path(file)


@dataclass(frozen=True)
class OpenAI:
    """The TensorFlow checkpoints of 2019 from OpenAI's blob store, or from a mirror of it at `url`.

    They are kept in `folder`, by default `micrograd-gpt/openai` in the user's cache
    ($XDG_CACHE_HOME, or ~/.cache), one folder for each size. The folder is called SIZE.part until
    it is complete and every tensor's checksum has been verified.
    """

    url: str = OPENAI_URL
    folder: Path | None = None

    label = "OpenAI"

    def cached(self, size: str) -> Path | None:
        """The folder that holds the weights, if they were fetched before."""
        with suppress(UserError):  # no folder
            folder = self._folder(size)
            return folder if folder.exists() else None
        return None

    def download(self, size: str) -> Path:
        """Fetch the weights, continuing an earlier try; UserError if that can't be done."""
        folder = self._folder(size)
        incoming = folder.with_name(f"{size}.part")
        for name in OPENAI_FILES:
            is_data = name.endswith("00000-of-00001")
            expected = RELEASES[size].openai_data_bytes if is_data else None
            download(f"{self.url}/{size}/{name}", incoming / name, expected)
        try:
            _open_published(incoming, size)
            self.verify(incoming, size)
        except UserError as error:
            _remove(incoming)
            raise _thrown_away(self.url, error) from error
        try:
            os.replace(incoming, folder)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        return folder

    def verify(self, folder: Path, size: str) -> None:
        """Compare every tensor's checksum; UserError names the first that differs."""
        TFCheckpoint(folder).verify()

    def remove(self, size: str) -> None:
        """Remove the weights from the cache; UserError if that can't be done."""
        _remove(self._folder(size))

    def _folder(self, size: str) -> Path:
        return (self.folder or cache_folder() / "openai") / size


Source = HuggingFace | OpenAI
SOURCES: dict[str, type[Source]] = {"huggingface": HuggingFace, "openai": OpenAI}
IF_YOU_HAVE_IT = (
    "if you have the weights, give the path of their file or folder instead of the size"
)


def fetch(
    size: str, sources: Sequence[Source] = (HuggingFace(), OpenAI()), advice: str = IF_YOU_HAVE_IT
) -> Path:
    """The folder that holds GPT-2 of this size: cached, or from the first source that has it.

    Says on stderr which source it tries. Raises UserError for an unknown size, and, with each
    source's reason and the `advice`, if none of them could be reached.
    """
    size = size_name(size)
    for source in sources:
        if folder := source.cached(size):
            return folder
    failures = []
    for source in sources:
        say(f"fetching GPT-2 {size} from {source.label}")
        try:
            return source.download(size)
        except UserError as error:
            failures.append(str(error))
            if source is not sources[-1]:
                say(str(error))
    raise UserError(f"{'; '.join(failures)}; {advice}")


def open_release(
    size: str,
    sources: Sequence[Source] = (HuggingFace(), OpenAI()),
    verify: bool = False,
    advice: str = IF_YOU_HAVE_IT,
) -> Weights:
    """OpenAI's weights of this size, fetched if need be.

    A cached copy that is damaged or of another size is removed and fetched again, and stderr says
    so. `verify` compares the cached copy's checksums too, which takes about a second per gigabyte;
    what is fetched is always verified. Raises UserError as `fetch` does.
    """
    size = size_name(size)
    for source in sources:
        if folder := source.cached(size):
            try:
                weights = _open_published(folder, size)
                if verify:
                    source.verify(folder, size)
                return weights
            except UserError as error:
                say(f"{error}: this copy is removed")
                source.remove(size)
    return _open_published(fetch(size, sources, advice), size)


def _open_published(folder: Path, size: str) -> Weights:
    # UserError if it is not this size, or is damaged as far as can be told without its numbers.
    weights = open_weights(folder)
    for key, value in published_shape(size).items():
        if (found := getattr(weights.config, key)) != value:
            raise UserError(f"{folder} is not GPT-2 {size}: its {key} is {found}, not {value}")
    if not is_gpt2(weights.config):
        raise UserError(f"{folder} is not GPT-2 {size}: it is another architecture")
    return weights


def _thrown_away(source: str, error: UserError) -> UserError:
    return UserError(f"the files from {source} were thrown away: {error}; run this again")


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} is damaged: remove it ({error.strerror or error})") from error


def ways_out(tried: Sequence[Source]) -> str:
    """What a user without these sources can do."""
    untried = [name for name, kind in SOURCES.items() if kind not in map(type, tried)]
    others = "".join(f"--source {name}, or " for name in untried)
    return f"try {others}--from with the file or folder, if you have it"
