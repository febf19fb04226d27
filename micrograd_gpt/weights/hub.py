"""Models on the Hugging Face Hub by name, fetched into huggingface_hub's cache.

A name is OWNER/NAME or OWNER/NAME@REVISION, where a revision is a branch, a tag or a commit.
huggingface_hub resumes downloads, shows their progress, and obeys its environment: HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HTTPS_PROXY and the rest.

The Hub is asked which commit a branch or tag stands for now. Only what the cache lacks of that
commit is fetched; if the Hub cannot be asked, the commit in the cache is used. Other programs write
to that cache too, and fetch a model without its tokenizer, or the reverse: that is not used.
"""

from __future__ import annotations

import functools
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from micrograd_gpt.support.cli import say
from micrograd_gpt.support.download import reason
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, sha256
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE
from micrograd_gpt.text.tokenizer_files import TOKENIZER_FILES, TOKENIZERS
from micrograd_gpt.weights.config import CONFIG, read_config
from micrograd_gpt.weights.formats import ADAPTER_CONFIG, MODEL, TORCH_MODEL, WEIGHT_FILES

ANSWER_TIMEOUT = 10  # seconds to wait for the Hub's answer; it is small
MAIN = "main"  # the branch that a name without a revision means


@dataclass(frozen=True)
class Repository:
    """A model on the Hub, at a branch, tag or commit.

    `endpoint` and `cache_folder` override huggingface_hub's environment if given.
    """

    name: str
    revision: str = MAIN
    endpoint: str | None = None
    cache_folder: Path | None = None

    def __str__(self) -> str:
        return self.name if self.revision == MAIN else f"{self.name}@{self.revision}"


def repository_named(name: str) -> Repository | None:
    """The repository that OWNER/NAME or OWNER/NAME@REVISION stands for; None for other texts."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", name, re.ASCII)
    if match is None:
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return Repository(match[1], match[2] or MAIN)


def fetch(repository: Repository, with_weights: bool = True) -> Path:
    """The folder that holds a repository's model: config, weights, tokenizer, prompt template.

    `with_weights=False` fetches the other files only. Says on stderr when it fetches, and when it
    cannot ask the Hub and uses the copy in the cache. Raises UserError where there is no such
    model, where it is not a GPT-2, and where neither the Hub nor the cache gives it.
    """
    commit, files = _listing(repository)
    if ADAPTER_CONFIG in files and files.isdisjoint(WEIGHT_FILES):
        raise UserError(
            f"{repository} is a LoRA adapter, and one is read from a folder here: fetch it first "
            f"(hf download {repository.name} --revision {repository.revision} --local-dir FOLDER)"
        )
    if CONFIG not in files:
        raise UserError(f"{repository} has no {CONFIG} on the Hugging Face Hub: it is not a GPT-2")
    noted = _noted(repository)
    is_new = noted is None or noted.name != commit
    if is_new:
        say(f"fetching {repository} from Hugging Face")
    try:
        folder = _file(repository, CONFIG, commit).parent
        read_config(folder)  # another architecture is refused before gigabytes are fetched
        for name in (*TOKENIZER_FILES, PROMPT_TEMPLATE):
            if name in files:
                _file(repository, name, commit)
        if _lacking(repository, commit, files) == "tokenizer":
            _ask_for_a_tokenizer(repository, commit)
        if with_weights:
            _fetch_weights(repository, commit, files)
            if is_new:  # only now the cache is told which commit the branch or tag stands for
                _file(repository, CONFIG, repository.revision)
    except UserError:
        raise
    except Exception as error:  # its own, and those of the HTTP library that its version uses
        raise UserError(f"cannot fetch {repository}: {reason(error)}") from error
    return folder


def _lacking(repository: Repository, commit: str, files: frozenset[str]) -> str | None:
    """What these files of a commit are without, unless the Hub has said that it has none."""
    from huggingface_hub import try_to_load_from_cache

    if files.isdisjoint(WEIGHT_FILES):
        return "weights"
    name, folder = repository.name, repository.cache_folder
    if files.isdisjoint(TOKENIZERS) and not try_to_load_from_cache(
        name, TOKENIZERS[0], folder, commit
    ):
        return "tokenizer"
    return None


def _ask_for_a_tokenizer(repository: Repository, commit: str) -> None:
    """Have the cache keep the Hub's answer that there is none."""
    from huggingface_hub.utils import EntryNotFoundError

    with suppress(EntryNotFoundError):
        _file(repository, TOKENIZERS[0], commit)


def _fetch_weights(repository: Repository, commit: str, files: frozenset[str]) -> None:
    weights = next((name for name in WEIGHT_FILES if name in files), None)
    if weights is None:
        raise UserError(
            f"{repository} has no weights that can be read on the Hugging Face Hub: it needs"
            f" {MODEL} or {TORCH_MODEL}"
        )
    file = _file(repository, weights, commit)
    for shard in _shards(file) & files:
        _file(repository, shard, commit)


@functools.cache  # once a process, so that all files of a model are of one commit
def _listing(repository: Repository) -> tuple[str, frozenset[str]]:
    """The commit that a revision stands for now, and the names of its files.

    The Hub says so, or if it does not answer, the cache. UserError if neither can.
    """
    from huggingface_hub.utils import OfflineModeIsEnabled

    try:
        return _asked(repository)
    except UserError as error:
        folder = _noted(repository)
        if folder is None:
            raise
        files = frozenset(file.name for file in folder.iterdir())
        if lacking := _lacking(repository, folder.name, files):
            problem = f"{error}; the copy in the cache has no {lacking}, and the Hub may have"
            raise UserError(problem) from error
        if not isinstance(error.__cause__, OfflineModeIsEnabled):
            say(f"{error}; using the copy that was fetched before")
        return folder.name, files


def _asked(repository: Repository) -> tuple[str, frozenset[str]]:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = repository.name, repository.revision
    login = "log in (hf auth login, or HF_TOKEN)"
    try:
        api = HfApi(repository.endpoint)
        found = api.model_info(name, revision=revision, timeout=ANSWER_TIMEOUT)
        return str(found.sha), frozenset(file.rfilename for file in found.siblings or ())
    except GatedRepoError as error:
        problem = f"{name} needs its owner's permission: ask for it on the Hub, and {login}"
        raise UserError(problem) from error
    except RevisionNotFoundError as error:
        problem = f"{name} has no revision {revision!r} on the Hugging Face Hub"
        raise UserError(problem) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is neither a file or folder here nor a model on the Hugging Face Hub; if it is"
            f" a private model, {login}"
        ) from error
    except Exception as error:  # its own, and those of the HTTP library that its version uses
        is_page = isinstance(error, json.JSONDecodeError)
        why = "its answer is not a Hub's (a login page or a proxy?)" if is_page else reason(error)
        raise UserError(
            f"cannot ask the Hugging Face Hub for {name}, which is not a file or folder here: {why}"
        ) from error


def _noted(repository: Repository) -> Path | None:
    """The folder of the commit that a revision stood for when the cache last heard of it."""
    try:
        return _file(repository, CONFIG, repository.revision, local_files_only=True).parent
    # Nor has it one without a home (RuntimeError), or with a token that cannot be read
    except (OSError, ValueError, RuntimeError):
        return None


def _shards(file: Path) -> set[str]:
    """The files beside it that an index of shards names; none for another file."""
    if file.suffix != ".json":
        return set()
    weight_map = (read_json(file) or {}).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def _file(repository: Repository, name: str, revision: str, local_files_only: bool = False) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository.name, name, repository.cache_folder, revision)
    file = hf_hub_download(
        repository.name,
        name,
        revision=revision,
        endpoint=repository.endpoint,
        cache_dir=repository.cache_folder,
        local_files_only=local_files_only,
    )
    if not isinstance(cached, str):
        _check_arrived(Path(file))
    return Path(file)


def _check_arrived(file: Path) -> None:
    """UserError if a file that was just fetched is not what the Hub has, and the cache without it.

    The cache calls what a link leads to by its checksum on the Hub: for files in Git LFS, as all
    large ones are, that is their SHA-256.
    """
    blob = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
        blob.unlink()
        raise UserError(f"{file.name} is not what the Hub has (its sha256 differs): fetch it again")
