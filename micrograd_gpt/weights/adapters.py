"""LoRA adapters in PEFT's format, and a model with one folded in.

A layer with weight W (n_in, n_out) and a low-rank addition computes x W + scale (x A) B, which is
what a layer with weight W + scale A B computes (Hu et al. 2021, arXiv:2106.09685). An adapter's
folder holds the additions, not the model that they are made for:

    adapter_config.json          the name of that model, its base, and the scale: lora_alpha / r
    adapter_model.safetensors    of each layer lora_A, (r, n_in), and lora_B, (n_out, r)

The names and the orientation of the matrices are those of PEFT, which reads and writes the same.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.support.cli import command, quoted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE, TOKENIZER
from micrograd_gpt.weights.checksum import stored_checksum
from micrograd_gpt.weights.config import ADAPTED_CONFIG
from micrograd_gpt.weights.formats import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    STATE,
    Weights,
    is_adapter,
)
from micrograd_gpt.weights.names import open_model
from micrograd_gpt.weights.reading import StoredTensor
from micrograd_gpt.weights.tensor_files import TensorFile

OLDER_ADAPTER_MODEL = "adapter_model.bin"  # which older versions of PEFT wrote
PREFIX = "base_model.model."  # before every name in PEFT's files
BASE = "base_model_name_or_path"  # what adapter_config.json calls the name of the base
HEAD = "score.weight"  # a classifier's head, which is trained in full and kept beside the additions

# Settings of PEFT by which an adapter is another than the plain one, and what each must be.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base as well
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias"), (False, None)),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class Addition:
    """scale * a @ b, for a weight (n_in, n_out): a is (n_in, r), b (r, n_out), both float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[1]


@dataclass(frozen=True)
class Adapter:
    """The adapter in a folder.

    `additions` are by the names of the layers, as `transformer.h.0.attn.c_attn`. `head` is a
    classifier's, (n_labels, n_embd), None for a language model's adapter. `config` is all that
    adapter_config.json says.
    """

    folder: Path
    config: dict[str, Any]
    additions: dict[str, Addition]
    head: StoredTensor | None = None

    @property
    def base(self) -> str:
        """The name of the model that it was made for, as `--model` takes it."""
        name = self.config.get(BASE)
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{self.folder / ADAPTER_CONFIG} does not name its model ({BASE}): write it there, "
                f"or fold the adapter in with {command('load_gpt2.py')} --from MODEL --merge"
            )
        revision = self.config.get("revision")  # of a model on the Hub
        is_told = isinstance(revision, str) and revision not in ("", "main")
        return f"{name}@{revision}" if is_told and not Path(name).exists() else name


@contextmanager
def naming_base(adapter: Adapter | None) -> Iterator[None]:
    """Within the block, in which the base of an adapter, if one is given, is opened, a UserError
    says where it is named."""
    try:
        yield
    except UserError as error:
        if adapter is None:
            raise
        is_gone = Path(adapter.base).is_absolute() and not Path(adapter.base).exists()
        moved = f"; if it was moved, correct {BASE} there" if is_gone else ""
        place = adapter.folder / ADAPTER_CONFIG
        raise UserError(f"{place} names its base, but {error}{moved}") from error


def open_with_base(folder: Path) -> Weights:
    """The base of the adapter in this folder, wherever it is, with the adapter folded in.

    The folder of the result is the one that holds the tokenizer, and so the template. Raises
    UserError as `open_adapter` and `open_model` do.
    """
    adapter = open_adapter(folder)
    if is_adapter(adapter.base):
        raise UserError(
            f"the base of {folder} is an adapter itself: merge that with {command('load_gpt2.py')} "
            f"--from {quoted(adapter.base)} --out FOLDER, and name FOLDER as {BASE} in "
            f"{folder / ADAPTER_CONFIG}"
        )
    with naming_base(adapter):
        base = open_model(adapter.base)
    if not trained_on(adapter, base):
        all_the_same = (
            f", or fold {folder} in all the same, with {command('load_gpt2.py')} "
            f"--from {quoted(adapter.base)} --merge {quoted(folder)}"
        )
        raise UserError(
            f"{adapter.base} has other weights now than when {folder} was trained on it: give it "
            f"back those{all_the_same if adapter.head is None else ', or train it again'}"
        )
    weights = merged(base, adapter)
    has_tokenizer = (folder / TOKENIZER).exists()
    if not any((folder / name).exists() for name in (ADAPTED_CONFIG, PROMPT_TEMPLATE)):
        # PEFT's, which has at most a copy of the base's
        has_tokenizer &= not (weights.folder / TOKENIZER).exists()
    return dataclasses.replace(weights, path=folder) if has_tokenizer else weights


def open_adapter(folder: str | Path) -> Adapter:
    """Read an adapter, ours or PEFT's; no code in its files is run.

    Raises UserError, naming the file, where there is none, where it is damaged, and where it is
    more than low-rank additions to the four linear layers of a block.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(
            f"there is no folder {folder}: an adapter is read from a folder here, so fetch one "
            "that is on the Hugging Face Hub first (hf download OWNER/NAME --local-dir FOLDER)"
        )
    if folder.is_file():
        raise UserError(f"{folder} is no folder: give the adapter's, with its {ADAPTER_CONFIG}")
    config = read_json(folder / ADAPTER_CONFIG) if is_adapter(folder) else None
    if config is None:
        raise UserError(f"{folder} holds no adapter: there is no {ADAPTER_CONFIG}")
    scale = _scale_times_rank(config, folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER_MODEL).exists() and (folder / OLDER_ADAPTER_MODEL).exists():
        raise UserError(
            f"{folder} has {OLDER_ADAPTER_MODEL}, but only {ADAPTER_MODEL} is read here: have PEFT "
            "load the adapter, and save it with safe_serialization=True"
        )
    file = TensorFile(folder / ADAPTER_MODEL)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    head = None
    for name in file.entries:
        short = name.removeprefix(PREFIX)
        pattern = r"(?:transformer\.)?(h\.\d+\.(?:attn|mlp)\.c_\w+)\.lora_([AB])\.weight"
        if match := re.fullmatch(pattern, short):
            layer = arrays.setdefault(f"transformer.{match[1]}", {})
            layer[match[2]] = _matrix(file, name).T
        elif short == HEAD:
            head = file.entries[name]
        else:
            raise UserError(f"{file.path}: {name!r} is not a low-rank addition: merge it with PEFT")
    if not arrays:
        raise UserError(f"{file.path} holds no low-rank additions")
    additions = {}
    for layer_name, pair in sorted(arrays.items()):
        if pair.keys() != {"A", "B"} or pair["A"].shape[1] != pair["B"].shape[0]:
            raise UserError(f"{file.path}: lora_A and lora_B of {layer_name} do not fit together")
        rank = pair["A"].shape[1]
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        additions[layer_name] = Addition(pair["A"], pair["B"], scale / root)
    return Adapter(folder, config, additions, head)


def _scale_times_rank(config: Mapping[str, Any], path: Path) -> float:
    """lora_alpha; UserError for an adapter that is not a plain one."""
    for key, allowed in PLAIN.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise UserError(
                f"{path}: {key} is {value!r}; only {allowed[0]!r} is supported: have PEFT merge it"
            )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UserError(f"{path}: lora_alpha must be a number, not {alpha!r}")
    return float(alpha)


def _matrix(file: TensorFile, name: str) -> np.ndarray:
    shape = file.shapes[name]
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{file.path}: {name!r} has shape {shape}, where a matrix is needed")
    file.read_into(name, out := np.empty(shape, np.float32))
    return out


def merged(weights: Weights, adapter: Adapter) -> Weights:
    """The model of `weights` with the adapter folded in, a tensor at a time, while it is read.

    Raises UserError where the adapter adds to layers that the model lacks.
    """
    check_made_for(adapter, {name: t.shape for name, t in weights.tensors.items()}, weights.path)
    tensors = dict(weights.tensors)
    for name, addition in adapter.additions.items():
        base = tensors[f"{name}.weight"]
        values = {f.name: getattr(base, f.name) for f in dataclasses.fields(StoredTensor)}
        tensors[f"{name}.weight"] = Merged(**values, base=base, addition=addition)
    heads = weights.heads | ({} if adapter.head is None else {HEAD: adapter.head})
    return dataclasses.replace(weights, tensors=tensors, heads=heads)


def check_made_for(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], model: str | Path
) -> None:
    """UserError unless a model whose tensors have these shapes has every layer of the adapter."""
    for name, addition in adapter.additions.items():
        shape = shapes.get(f"{name}.weight")
        if shape != addition.shape:
            has = "none" if shape is None else f"one of shape {shape}"
            raise UserError(
                f"{adapter.folder} is for another model: it adds to a {name} of shape"
                f" {addition.shape}, and {model} has {has}"
            )


@dataclass(frozen=True)
class Merged(StoredTensor):
    """A weight of the file with an addition to it."""

    base: StoredTensor
    addition: Addition

    def read_into(self, out: Array) -> bool:
        """Fill `out` with the sum, computed in float32 or wider, as StoredTensor.read_into does."""
        wide = np.empty(out.shape, np.result_type(out.dtype, np.float32), order="F")
        self.base.read_into(wide)
        wide += self.addition.scale * (self.addition.a @ self.addition.b)
        if isinstance(out, np.ndarray):
            out[...] = wide
        else:
            out.set(np.ascontiguousarray(wide, out.dtype))
        return bool(np.isfinite(wide).all())


def open_language_adapter(folder: str | Path) -> Adapter:
    """As `open_adapter`; UserError too for a classifier's."""
    adapter = open_adapter(folder)
    if adapter.head is not None:
        raise UserError(f"{folder} is a classifier's adapter: use it as it is, with --model")
    return adapter


def with_adapter(weights: Weights, adapter: Adapter) -> Weights:
    """The weights with an adapter folded in.

    Where it is known that it was trained on other weights, stderr says so: no shape can tell.
    UserError where a run's own folder is given for both.
    """
    if weights.folder.samefile(adapter.folder):
        raise UserError(f"{adapter.folder} is folded into its base already: leave --merge out")
    base = adapter.config.get(BASE)
    if isinstance(base, str) and Path(base).is_dir() and not weights.folder.samefile(base):
        say(f"note: {adapter.folder} was trained on {base}, not on {weights.folder}")
    elif not trained_on(adapter, weights):
        say(f"note: {adapter.folder} was trained on other weights than {weights.path} has now")
    return merged(weights, adapter)


def trained_on(adapter: Adapter, base: Weights) -> bool:
    """Whether an adapter was trained on these weights, as far as its run noted that.

    Only a folder's weights are looked at: nobody trains what was fetched.
    """
    settings = (read_json(adapter.folder / STATE) or {}).get("settings")
    settings = settings if isinstance(settings, dict) else {}
    noted = settings.get("base_weights")
    if noted is None or not Path(adapter.config.get(BASE) or "").exists():
        return True
    dtype = "float64" if settings.get("dtype") == "float64" else "float32"
    return stored_checksum(base, dtype) in (noted, None)
