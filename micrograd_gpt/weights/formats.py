"""What a local file or folder holds: its config, and its tensors under our names.

Weights come as a safetensors file, a PyTorch file, a set of either, nanoGPT's checkpoint or
OpenAI's TensorFlow checkpoint; with a config beside them or, for OpenAI's sizes, without.
`open_weights` recognises all of them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micrograd_gpt.gpt2 import GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import SAVED, finish_set
from micrograd_gpt.support.files import read_json, reading
from micrograd_gpt.weights.config import (
    CONFIG,
    SIZES,
    own_classes,
    published_shape,
    read_config,
    read_hparams,
    read_values,
    was_edited,
)
from micrograd_gpt.weights.nanogpt import is_nanogpt, nanogpt_config, nanogpt_tensors
from micrograd_gpt.weights.reading import StoredTensor, Zeros, same_bytes
from micrograd_gpt.weights.tensor_files import TensorFile
from micrograd_gpt.weights.tf_checkpoint import TFCheckpoint
from micrograd_gpt.weights.torch_file import read_torch, stored_tensors

BODY = ("wte.", "wpe.", "h.", "ln_f.")  # the parts of GPT-2
MASK = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
# What stands on the body in Transformers' models for classification and the like, and in TRL's
OTHER_HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head.")

MODEL, INDEX, HPARAMS = "model.safetensors", "model.safetensors.index.json", "hparams.json"
TORCH_MODEL, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHT_FILES = (MODEL, INDEX, TORCH_MODEL, TORCH_INDEX)  # the first in a folder counts
SHARD = r"(pytorch_)?model-\d+-of-\d+\.(bin|safetensors)"  # a file of a sharded set
NANOGPT = "ckpt.pt"
ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
STATE = "trainer_state.json"  # of the training run that wrote a model (runs/checkpoint.py)
RUN_FLAGS = "settings.toml"  # of a run, from its beginning on (runs/config_file.py)
RUN_FLAGS_BEGIN = "# The settings of this run, for --config"  # its first line, which no user's has
TORCH_SUFFIXES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Weights:
    """A model as its files describe it, whatever their format.

    `path` is the file or folder, `tensors` maps each of GPT-2's parameter names to where its
    numbers are. `heads` has the tensors of other heads, for classification and the like, and
    `unused` those that a GPT-2 has no use for. `values` is all that config.json says.
    """

    path: Path
    config: GPT2Config
    tensors: dict[str, StoredTensor]
    heads: dict[str, StoredTensor] = field(default_factory=dict)
    unused: dict[str, StoredTensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the files that belong to the model are, as its tokenizer's."""
        return self.path if self.path.is_dir() else self.path.parent


def is_adapter(path: str | Path) -> bool:
    """Whether this folder holds a LoRA adapter (weights/adapters.py) and not a whole model."""
    if os.path.isdir(Path(path, SAVED)):
        finish_set(path)
    whole = any(os.path.exists(Path(path, name)) for name in WEIGHT_FILES)
    return os.path.isfile(Path(path, ADAPTER_CONFIG)) and not whole


def holds_model(path: str | Path) -> bool:
    """Whether this folder holds a model or an adapter, in whatever format."""
    files = (*WEIGHT_FILES, NANOGPT, HPARAMS)
    return is_adapter(path) or any(os.path.exists(Path(path, name)) for name in files)


def has_begun(folder: Path) -> bool:
    """Whether a run has begun in the folder, so that its RUN_FLAGS are there, and not a user's."""
    with reading(folder / RUN_FLAGS):
        try:
            return (folder / RUN_FLAGS).read_bytes().startswith(RUN_FLAGS_BEGIN.encode())
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False


def weight_files(folder: Path) -> list[str]:
    """The names of the files in this folder that hold the weights of one model, Transformers'."""
    with reading(folder):
        names = [file.name for file in folder.iterdir()]
    return [name for name in names if name in WEIGHT_FILES or re.fullmatch(SHARD, name)]


def open_weights(path: str | Path) -> Weights:
    """Recognise a local file or folder and read what it says of itself, but no tensor yet.

    `path` is a safetensors or PyTorch file (with config.json beside it, or one of OpenAI's four
    sizes), the *.index.json of a sharded set, nanoGPT's ckpt.pt, a Hugging Face folder or a
    checkpoint of ours (config.json with one of WEIGHT_FILES), a folder with a ckpt.pt, or OpenAI's
    folder (hparams.json with a TensorFlow checkpoint). No code in a file is run. Raises UserError
    for anything else, and for a GPT-2's config that the shapes of the tensors contradict, naming
    what is wrong.
    """
    try:
        return _open(Path(path))
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _open(path: Path) -> Weights:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    finish_set(path if path.is_dir() else path.parent)
    if path.is_dir():
        files = [name for name in WEIGHT_FILES if (path / name).exists()]
        for name in files or [name for name in WEIGHT_FILES if (path / name).is_symlink()]:
            if not (path / CONFIG).exists():
                raise UserError(f"{path} has {name} but no {CONFIG}, which belongs to it")
            return _open_file(path / name)
        if (path / NANOGPT).exists():
            return _open_file(path / NANOGPT)
        if (hparams := read_json(path / HPARAMS)) is not None:
            return _open_openai(path, hparams)
        if weight_files(path):
            raise UserError(f"{path} holds files of a model without the *.index.json they go by")
        raise UserError(
            f"{path} does not hold a model: it needs {MODEL} (or {TORCH_MODEL}) and {CONFIG},"
            f" nanoGPT's {NANOGPT}, or OpenAI's {HPARAMS} and model.ckpt.*"
        )
    if path.suffix in (".safetensors", *TORCH_SUFFIXES) or path.name.endswith(".index.json"):
        return _open_file(path)
    raise UserError(
        f"{path} is neither a .safetensors, .bin or .pt file nor a folder that holds a model"
    )


def _open_file(path: Path) -> Weights:
    if re.fullmatch(SHARD, path.name) and "-of-00001." not in path.name:
        raise UserError(f"{path} is a part of a model: give the folder, with its *.index.json")
    if path.name == ADAPTER_MODEL and is_adapter(path.parent):
        raise UserError(f"{path} is a part of an adapter: give the folder")
    if path.suffix in TORCH_SUFFIXES:
        saved = read_torch(path)
        if is_nanogpt(saved):
            return _open_nanogpt(path, saved)
        entries = stored_tensors(saved, path)
    else:
        entries = TensorFile(path).entries
    entries = _unwrapped(entries)
    if not path.with_name(CONFIG).exists():
        tensors = _gpt2_tensors(path, entries)
        return Weights(path, _published_config(path, tensors), tensors, _other_heads(entries))
    values = read_values(path.parent)
    config = read_config(values, path.parent / CONFIG)
    tensors = _gpt2_tensors(path, entries, values.get("tie_word_embeddings", True))
    if not own_classes(values) and not was_edited(values):
        check_agreement(path, config, CONFIG, tensors)
    heads = _other_heads(entries)
    unused = {name: entries[name] for name in entries if name not in {**tensors, **heads}}
    return Weights(path, config, tensors, heads, unused, values)


def _unwrapped(entries: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without what DataParallel, torch.compile or Lightning puts before every name."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if entries and all(name.startswith(prefix) for name in entries):
            return _unwrapped({name.removeprefix(prefix): entries[name] for name in entries})
    return entries


def _open_nanogpt(path: Path, saved: dict[str, Any]) -> Weights:
    config = read_config(nanogpt_config(saved, path), path)
    tensors = _gpt2_tensors(path, nanogpt_tensors(saved, path))
    check_agreement(path, config, "model_args", tensors)
    return Weights(path, config, tensors)


def _gpt2_tensors(
    path: Path, entries: Mapping[str, StoredTensor], is_tied: bool = True
) -> dict[str, StoredTensor]:
    # GPT2LMHeadModel is saved with `transformer.` before the names, the bare GPT2Model without. A
    # subclass of one's own may have other parameters, whose names stay.
    is_bare = not any(name.startswith("transformer.") for name in entries)
    names: dict[str, str] = {}
    for name in entries:
        if name == "lm_head.weight" or re.fullmatch(MASK, name):
            continue  # the head, and the causal mask that old files hold too
        if not name.startswith(OTHER_HEADS):
            names[f"transformer.{name}" if is_bare and name.startswith(BODY) else name] = name
    if "lm_head.weight" in entries and not is_tied:
        names["lm_head.weight"] = "lm_head.weight"
    elif "lm_head.weight" in entries:
        # The head is the token embedding: files may have either name, or both.
        wte = names.setdefault("transformer.wte.weight", "lm_head.weight")
        if not same_bytes(entries[wte], entries["lm_head.weight"]):
            raise UserError(
                f"{path}: lm_head.weight differs from {wte}, but GPT-2 ties the two: if this"
                f" model does not, {CONFIG} must say tie_word_embeddings: false"
            )
    tensors = {ours: entries[name] for ours, name in names.items()}
    # Tensors of a PyTorch file may overlap, so that a small file could describe a vast model.
    stored = [tensor for tensor in tensors.values() if not isinstance(tensor, Zeros)]
    size = sum(file.stat().st_size for file in {tensor.path for tensor in stored})
    if sum(tensor.nbytes for tensor in stored) > size:
        raise UserError(f"{path} is damaged: its tensors overlap; fetch it again")
    return tensors


def _other_heads(entries: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in entries.items() if name.startswith(OTHER_HEADS)}


def _open_openai(folder: Path, hparams: dict[str, Any]) -> Weights:
    checkpoint = TFCheckpoint(folder)
    tensors: dict[str, StoredTensor] = {}
    for ours, name in checkpoint.gpt2_names().items():
        variable = checkpoint.variables[name]
        if len(variable.shape) == 3 and variable.shape[0] == 1:
            # A convolution of width 1, (1, n_in, n_out), is a matrix to the model.
            variable = dataclasses.replace(variable, shape=variable.shape[1:])
        tensors[ours] = variable
    config = read_hparams(hparams, folder / HPARAMS)
    check_agreement(folder, config, HPARAMS, tensors)
    return Weights(folder, config, tensors)


def _published_config(path: Path, tensors: Mapping[str, StoredTensor]) -> GPT2Config:
    # No shape tells the number of heads, but for OpenAI's sizes it is known.
    found = implied_by(tensors)
    for shape in map(published_shape, SIZES):
        if "n_embd" in found and all(shape[key] == found[key] for key in found):
            return read_config(shape)
    raise UserError(
        f"{path} has no {CONFIG} beside it, and is not one of OpenAI's four sizes: put the model's "
        f"{CONFIG} there"
    )


def check_agreement(
    path: Path, config: GPT2Config, file: str, tensors: Mapping[str, StoredTensor]
) -> None:
    """UserError where GPT-2's tensors contradict the config, which `file` holds.

    It comes before a model is made, which a wrong config could make larger than the memory.
    """
    wte = tensors.get("transformer.wte.weight")
    if wte is None or len(wte.shape) != 2:
        raise UserError(f"{path} lacks transformer.wte.weight of shape (vocab_size, n_embd)")
    for key, value in implied_by(tensors).items():
        if getattr(config, key) != value:
            raise UserError(
                f"{path}: {file} says {key} {getattr(config, key)}, the tensors {value}"
            )


def implied_by(tensors: Mapping[str, Any]) -> dict[str, int]:
    """What the names and shapes of a model's tensors say of its config, as far as they do."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    implied = {"n_layer": len(layers)}
    for name, rows in (("wte", "vocab_size"), ("wpe", "n_positions")):
        tensor = tensors.get(f"transformer.{name}.weight")
        if tensor is not None and len(tensor.shape) == 2:
            implied |= {rows: tensor.shape[0], "n_embd": tensor.shape[1]}
    return implied
