"""OpenAI's weights: where they are, and how each format a user may have them in is read.

    fetch(size)         a size name -> the local folder that holds it, downloaded if need be
    open_weights(path)  a local file or folder -> Weights: its config, and its tensors by our names
    build(weights)      Weights -> GPT2: one loop that checks every name and shape, both ways

`GPT2.from_pretrained` is the three in a row.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.precision import moved, wide
from micrograd_gpt.gpt2 import GPT2, OLDER_NAMES, SIZES, GPT2Config, size_name
from micrograd_gpt.runs.checkpoint import load_config
from micrograd_gpt.support.download import cache_folder, download, reason
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, sha256
from micrograd_gpt.weights.tensor_files import TensorFile
from micrograd_gpt.weights.tf_checkpoint import TFCheckpoint

# ----------------------------------------------------------------------------------------------
# Where the weights are


@dataclass(frozen=True)
class Release:
    """One size as published: its Hugging Face repository, and what is known of its files.

    A safetensors file's length must agree with its own header, and a TensorFlow checkpoint's with
    its index, so every size's length is checked; 124M's are known beforehand too.
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
# Small files first: a server that answers with something else is found out before the large one.
OPENAI_FILES = ("checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001")


@dataclass(frozen=True)
class HuggingFace:
    """Weights as safetensors from the Hugging Face Hub, through huggingface_hub.

    That library resumes downloads, shows their progress, keeps them in its cache, and obeys its
    environment: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HTTPS_PROXY and the rest.
    `endpoint` and `cache_folder` stand in for that environment where they are given.
    """

    endpoint: str | None = None
    cache_folder: Path | None = None

    label = "Hugging Face"

    def _file(self, size: str, name: str, local_files_only: bool) -> Path:
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(
            RELEASES[size].repository,
            name,
            endpoint=self.endpoint,
            cache_dir=self.cache_folder,
            local_files_only=local_files_only,
        )
        return Path(file)

    def cached(self, size: str) -> Path | None:
        """The folder of huggingface_hub's cache that holds the weights, without the network."""
        from huggingface_hub.utils import LocalEntryNotFoundError

        try:
            self._file(size, "config.json", local_files_only=True)
            return self._file(size, "model.safetensors", local_files_only=True).parent
        except LocalEntryNotFoundError:
            return None

    def download(self, size: str) -> Path:
        """Fetch the weights into huggingface_hub's cache; UserError where that can't be done."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        release = RELEASES[size]
        try:
            # Asked first because it fails at once: the download itself, with no network, tries
            # again for half a minute before it says so.
            url = hf_hub_url(release.repository, "model.safetensors", endpoint=self.endpoint)
            get_hf_file_metadata(url)
            self._file(size, "config.json", local_files_only=False)
            folder = self._file(size, "model.safetensors", local_files_only=False).parent
        except Exception as error:  # its own, and those of the HTTP library its version uses
            raise UserError(f"cannot fetch {release.repository}: {reason(error)}") from error
        try:
            _open_published(folder, size, verify=True)
        except UserError as error:
            self.remove(size)
            raise UserError(
                f"what {release.repository} sent was thrown away: {error}; run this again"
            ) from error
        return folder

    def remove(self, size: str) -> None:
        """Remove the weights from huggingface_hub's cache; UserError where that can't be done."""
        if folder := self.cached(size):
            for name in ("config.json", "model.safetensors"):
                _remove((folder / name).resolve())  # the cache's blob, which the name links to
                _remove(folder / name)


@dataclass(frozen=True)
class OpenAI:
    """The TensorFlow checkpoints of 2019 from OpenAI's blob store, or a mirror of it at `url`.

    They are kept in `folder`, by default `micrograd-gpt/openai` in the user's cache
    ($XDG_CACHE_HOME, or ~/.cache), one folder for each size. A folder that is not complete and
    verified, every tensor by its checksum, is called SIZE.part.
    """

    url: str = OPENAI_URL
    folder: Path | None = None

    label = "OpenAI"

    def _folder(self, size: str) -> Path:
        return (self.folder or cache_folder() / "openai") / size

    def cached(self, size: str) -> Path | None:
        """The folder that holds the weights, if they were fetched before."""
        folder = self._folder(size)
        return folder if folder.exists() else None

    def download(self, size: str) -> Path:
        """Fetch the weights, going on where an earlier try stopped; UserError where it can't."""
        folder = self._folder(size)
        incoming = folder.with_name(f"{size}.part")
        for name in OPENAI_FILES:
            is_data = name.endswith("00000-of-00001")
            expected = RELEASES[size].openai_data_bytes if is_data else None
            download(f"{self.url}/{size}/{name}", incoming / name, expected)
        try:
            _open_published(incoming, size, verify=True)
        except UserError as error:
            _remove(incoming)
            raise UserError(
                f"what {self.url} sent was thrown away: {error}; run this again"
            ) from error
        try:
            os.replace(incoming, folder)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        return folder

    def remove(self, size: str) -> None:
        """Remove the weights from the cache; UserError where that can't be done."""
        _remove(self._folder(size))


Source = HuggingFace | OpenAI


def fetch(size: str, sources: Sequence[Source] = (HuggingFace(), OpenAI())) -> Path:
    """The folder that holds GPT-2 of this size: cached, or from the first source that has it.

    Says on stderr where it turns to. Raises UserError for an unknown size, and where no source
    could be reached, with each one's reason.
    """
    size = size_name(size)
    for source in sources:
        if folder := source.cached(size):
            return folder
    failures = []
    for source in sources:
        _say(f"fetching GPT-2 {size} from {source.label}")
        try:
            return source.download(size)
        except UserError as error:
            failures.append(str(error))
            if source is not sources[-1]:
                _say(str(error))
    others = {"huggingface": HuggingFace, "openai": OpenAI}
    untried = [name for name, kind in others.items() if kind not in map(type, sources)]
    advice = "".join(f"--source {name}, or " for name in untried)
    raise UserError(
        f"{'; '.join(failures)}; try {advice}--from with the file or folder, if you have it"
    )


def open_release(
    size: str, sources: Sequence[Source] = (HuggingFace(), OpenAI()), verify: bool = False
) -> Weights:
    """OpenAI's weights of this size, fetched if need be.

    A cached copy that is damaged or another size is removed and fetched again, and stderr says so.
    `verify` compares every checksum there is with what is cached, which takes a second for a
    gigabyte; what is fetched is always verified. Raises UserError as `fetch` does.
    """
    size = size_name(size)
    for source in sources:
        if folder := source.cached(size):
            try:
                return _open_published(folder, size, verify)
            except UserError as error:
                _say(f"{error}: this copy is removed")
                source.remove(size)
    return _open_published(fetch(size, sources), size)


def _open_published(folder: Path, size: str, verify: bool = False) -> Weights:
    # UserError where this is damaged, as far as that is looked at, or not this size.
    weights = open_weights(folder)
    for key, value in published_shape(size).items():
        if (found := getattr(weights.config, key)) != value:
            raise UserError(f"{folder} is not GPT-2 {size}: its {key} is {found}, not {value}")
    if verify and isinstance(weights.tensors, TFCheckpoint):
        weights.tensors.verify()
    elif verify and RELEASES[size].safetensors_sha256 not in (None, sha256(weights.path)):
        raise UserError(f"{weights.path} is not the published file (its sha256 differs)")
    return weights


def published_shape(size: str) -> dict[str, Any]:
    """What a config says of OpenAI's model of this size; GPT2Config's own values where it may."""
    keys = ("vocab_size", "n_positions", "norm_position", "position_embedding")
    return SIZES[size] | {k: getattr(GPT2Config, k) for k in keys if k not in SIZES[size]}


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} is damaged: remove it ({error.strerror or error})") from error


# ----------------------------------------------------------------------------------------------
# What a local file or folder holds


@dataclass(frozen=True)
class Weights:
    """A model's config and its tensors, whatever the format.

    `names` maps each of the model's parameter names to the tensor's name in the file; `shapes` to
    the shape it has for the model.
    """

    path: Path
    config: GPT2Config
    tensors: TensorFile | TFCheckpoint
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def open_weights(path: str | Path) -> Weights:
    """Recognise a local file or folder and read what it says of itself, but no tensor yet.

    `path` is a safetensors file (config.json beside it, or one of OpenAI's four sizes), the
    *.safetensors.index.json of a sharded set, a Hugging Face folder or a checkpoint of ours
    (config.json with model.safetensors or its index), or OpenAI's folder (hparams.json with a
    TensorFlow checkpoint). Raises UserError for anything else, naming what is wrong.
    """
    try:
        return _open_weights(Path(path))
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _open_weights(path: Path) -> Weights:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        for name in ("model.safetensors", "model.safetensors.index.json"):
            if (path / name).exists():
                if not (path / "config.json").exists():
                    raise UserError(f"{path} has {name} but no config.json, which belongs to it")
                return _open_safetensors(path / name)
        if (hparams := read_json(path / "hparams.json")) is not None:
            return _open_openai(path, hparams)
        pickles = sorted(path.glob("*.bin"))
        if not pickles:
            raise UserError(
                f"{path} holds no model: need model.safetensors with config.json,"
                " or OpenAI's hparams.json with model.ckpt.*"
            )
        path = pickles[0]
    if path.suffix in (".bin", ".pt", ".pth"):
        raise UserError(
            f"{path} is a Python pickle, which can run any code when it is read; get the model's"
            " model.safetensors, or convert it with Transformers' save_pretrained"
        )
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        return _open_safetensors(path)
    raise UserError(f"{path} is neither a .safetensors file nor a folder that holds a model")


def _open_safetensors(path: Path) -> Weights:
    tensors = TensorFile(path)
    names: dict[str, str] = {}
    for name in tensors.shapes:
        # Saved without `transformer.` by the bare GPT2Model. Old files hold the causal mask too.
        short = name.removeprefix("transformer.")
        if name == "lm_head.weight" or re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", short):
            continue
        ours = f"transformer.{short}"
        if ours in names:
            raise UserError(f"{path}: holds both {names[ours]!r} and {name!r}")
        names[ours] = name
    if "lm_head.weight" in tensors.shapes:
        # The head is the token embedding; some files keep the one name, some the other, some both.
        wte = names.setdefault("transformer.wte.weight", "lm_head.weight")
        if not tensors.same_bytes(wte, "lm_head.weight"):
            raise UserError(f"{path}: lm_head.weight differs from {wte}, which GPT-2 ties it to")
    shapes = {ours: tensors.shapes[name] for ours, name in names.items()}
    if path.with_name("config.json").exists():
        config = load_config(path.parent)
    else:
        config = _published_config(path, shapes)
    return Weights(path, config, tensors, names, shapes)


def _open_openai(folder: Path, hparams: dict[str, Any]) -> Weights:
    tensors = TFCheckpoint(folder)
    names = tensors.gpt2_names()
    # A Conv1D of width 1 is stored as (1, n_in, n_out); for the model it is a matrix.
    shapes = {
        ours: shape[1:] if len(shape := tensors.shapes[name]) == 3 and shape[0] == 1 else shape
        for ours, name in names.items()
    }
    renamed = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    try:
        config = GPT2Config.from_dict({renamed.get(key, key): hparams[key] for key in hparams})
    except UserError as error:
        text = str(error).removeprefix("config.json").removeprefix(":").strip()
        for theirs, ours in renamed.items():
            text = text.replace(ours, theirs)
        raise UserError(f"{folder / 'hparams.json'}: {text}") from None
    return Weights(folder, config, tensors, names, shapes)


def _published_config(path: Path, shapes: dict[str, tuple[int, ...]]) -> GPT2Config:
    # The number of heads shows in no shape, but of OpenAI's sizes it is known.
    found = _implied_by(shapes)
    for config in (GPT2Config(**published_shape(size)) for size in SIZES):
        if "n_embd" in found and all(getattr(config, key) == found[key] for key in found):
            return config
    raise UserError(f"{path} has no config.json beside it, and is not one of OpenAI's four sizes")


def _implied_by(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    # What the tensors say of the config, as far as they do.
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.h.")}
    implied = {"n_layer": len(layers)}
    for name, rows in (("wte", "vocab_size"), ("wpe", "n_positions")):
        shape = shapes.get(f"transformer.{name}.weight", ())
        if len(shape) == 2:
            implied |= {rows: shape[0], "n_embd": shape[1]}
    return implied


# ----------------------------------------------------------------------------------------------
# The model


def build(
    weights: Weights,
    device: str = "cpu",
    dtype: str = "float32",
    cls: type[GPT2] = GPT2,
    compute: str | None = None,
) -> GPT2:
    """A GPT2 (or a subclass of it) with these weights, in evaluation mode.

    Each tensor is read into the parameter that keeps it, so on the CPU memory holds the model once.
    Names and shapes must be the model's exactly. Raises UserError, naming the tensor, for one that
    is missing, extra, misshapen or damaged, and for a config the tensors disagree with. A tensor
    with NaN or infinity in it is warned of on stderr.
    """
    from tqdm import tqdm

    config, path = weights.config, weights.path
    if len(weights.shapes.get("transformer.wte.weight", ())) != 2:
        raise UserError(f"{path} lacks transformer.wte.weight of shape (vocab_size, n_embd)")
    # Compared before a model is made, which a wrong config could make larger than the memory.
    said_by = "hparams.json" if isinstance(weights.tensors, TFCheckpoint) else "config.json"
    for key, value in _implied_by(weights.shapes).items():
        if getattr(config, key) != value:
            raise UserError(
                f"{path}: {said_by} says {key} {getattr(config, key)}, the tensors {value}"
            )
    try:
        model = cls(config, dtype=dtype, device=device, initialize=False, compute=compute)
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory for this model ({reason(error)})") from error
    parameters = dict(model.named_parameters())
    for problem, names in (
        ("lacks", parameters.keys() - weights.names.keys()),
        ("holds, where GPT-2 has no such tensor,", weights.names.keys() - parameters.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} {problem} {min(names)!r}{more}")
    for name, parameter in parameters.items():
        if parameter.data.shape != weights.shapes[name]:
            raise UserError(
                f"{path}: {name} has shape {weights.shapes[name]}, not {parameter.data.shape}"
            )
    size = sum(parameter.data.nbytes for parameter in parameters.values())
    with tqdm(
        total=size, desc="loading", unit="B", unit_scale=True, delay=1, disable=None
    ) as progress:
        for name, parameter in parameters.items():
            theirs = weights.names[name]
            on_cpu = isinstance(parameter.data, np.ndarray)
            array = parameter.data if on_cpu else np.empty(parameter.data.shape, wide(dtype))
            weights.tensors.read_into(theirs, array.reshape(weights.tensors.shapes[theirs]))
            if not np.isfinite([array.min(), array.max()]).all():  # NaN is both, if there is one
                _say(f"warning: {path}: {name} holds NaN or infinity")
            if not on_cpu or parameter.half:
                parameter.data[...] = moved(array, device, parameter.half)
            progress.update(array.nbytes)
    model.eval()
    return model


def from_pretrained(
    cls: type[GPT2],
    name_or_folder: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    compute: str | None = None,
) -> GPT2:
    """A GPT2 with OpenAI's weights of that size ("124M", …), or with those of a file or folder.

    A size is taken from a cache, or downloaded from Hugging Face or else from OpenAI; a file or
    folder is anything `open_weights` reads, without the network. `dtype` is what the parameters
    are held in ("float32", "float64", "bfloat16" or "float16"), whatever the file stores, and
    `compute` the type of the matrix work, by default the same: to train in half precision, hold
    them in float32 (see GPT2). The model is in evaluation mode. Raises UserError where the weights
    can't be found, fetched or read.
    """
    name = str(name_or_folder)
    if name in SIZES or name in OLDER_NAMES:
        weights = open_release(name)
    elif os.path.exists(name):
        weights = open_weights(name)
    else:
        raise UserError(f"{name!r} is neither a file or folder, nor one of {', '.join(SIZES)}")
    return build(weights, device, dtype, cls, compute)


# ----------------------------------------------------------------------------------------------


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
