"""LoRA: training low-rank additions to some layers, with everything else frozen.

Hu et al. 2021 (arXiv:2106.09685). Of a weight W of n_in × n_out numbers, what fine-tuning changes
is taken to be a product A B of rank r, with r (n_in + n_out) numbers. Gradients and AdamW's moments
exist for these alone. A is drawn and B begins at zero, so training begins at the model as it was.

    add_lora(model, rank=8, base="124M")  the layers become LoRALinear, the rest is frozen
    AdamW(trained_parameters(model))      then train as ever
    model.save_pretrained(folder)         what was trained, as PEFT reads it (weights/adapters.py)
    load_adapter(model, folder)           and back, to train on

Initial values, scale and names are those of the reference implementation, PEFT.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.devices import Array, device_of, move, to_device
from micrograd_gpt.nn import Draws, Dropout, Linear, Module, Parameter
from micrograd_gpt.runs import checkpoint
from micrograd_gpt.runs.checkpoint import BEST, earlier_sets, remove_set
from micrograd_gpt.support.cli import command, quoted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, write_text
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.variants import ScaledQueries, scaled_queries
from micrograd_gpt.weights.adapters import (
    BASE,
    HEAD,
    PREFIX,
    check_made_for,
    open_adapter,
)
from micrograd_gpt.weights.checksum import weights_checksum
from micrograd_gpt.weights.formats import (
    ADAPTER_CONFIG,
    WEIGHT_FILES,
    holds_model,
    is_adapter,
)
from micrograd_gpt.weights.names import lies_in, size_named
from micrograd_gpt.weights.releases import RELEASES
from micrograd_gpt.weights.saving import stored_parameters

M = TypeVar("M", bound=Module)

# The linear layers of a block, as --lora-layers takes them; the last part alone is enough.
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
DEFAULT_LAYERS = ("c_attn",)  # PEFT's for GPT-2
WITHOUT_RANK = "--lora-alpha and --lora-layers are for LoRA: give --lora-rank too"


class LoRALinear(Module):
    """x (…, n_in) -> x @ weight + bias + alpha / r * (x @ lora_A) @ lora_B, (…, n_out).

    It takes the place of `base`, which still computes the first two terms, and whose weight (n_in,
    n_out) and bias (n_out,), if it has one, it keeps under their names. lora_A is (n_in, r), lora_B
    (r, n_out). While training, x is dropped out before lora_A.
    """

    def __init__(
        self, base: Linear, rank: int, alpha: float, draws: Draws, seed: Any = 0, dropout: float = 0
    ) -> None:
        n_in, n_out = base.weight.shape
        vars(self).update((n, p) for n, p in vars(base).items() if isinstance(p, Parameter))
        self.base = base  # its parameters are listed once, by the names above
        # torch.nn.Linear's default, which PEFT takes over; in its order of drawing, (r, n_in)
        bound, dtype = 1 / math.sqrt(n_in), np.result_type(base.weight.dtype, np.float32)
        start = np.random.default_rng(seed).uniform(-bound, bound, (rank, n_in))
        self.lora_A = Parameter(start.astype(dtype).T)
        self.lora_B = Parameter(np.zeros((n_out, rank), dtype).T)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.dropout = Dropout(dropout, draws)
        # Of a variant that scales its queries: the addition to them is scaled with them
        self.query_scale = base.scale if isinstance(base, ScaledQueries) else 1.0

    def __call__(self, x: Tensor) -> Tensor:
        low = layers.linear(self.dropout(x), self.lora_A) * self.scale  # (…, r)
        y, more = self.base(x), layers.linear(low, self.lora_B)
        return y + (more if self.query_scale == 1 else scaled_queries(more, self.query_scale))


def add_lora(
    model: Any,
    rank: int,
    alpha: float | None = None,
    layer_names: Sequence[str] = DEFAULT_LAYERS,
    seed: int = 0,
    dropout: float = 0.0,
    base: str | None = None,
) -> None:
    """Turn these layers of a model, a GPT2 or a classifier, into LoRALinear, and freeze the rest.

    A name is one of LAYERS, or the last part of one: `c_proj` is both of that name. `alpha` is
    twice the rank if left out. A classifier's head is trained in full. From now on the model is
    saved as an adapter, which names `base`, what the model is called, if given. Raises UserError
    for a layer that there is not, for a rank that no addition to a layer's weight can have, for an
    `alpha` by which it would be nothing, and for a model that has additions already.
    """
    check_layer_names(layer_names)
    check_has_none(model)
    if not isinstance(rank, Integral) or rank < 1:
        raise UserError(f"the rank of LoRA must be a whole number of at least 1, not {rank!r}")
    alpha = 2 * rank if alpha is None else alpha
    if not isinstance(alpha, Real) or not 0 < abs(alpha) < math.inf:
        raise UserError(f"the alpha of LoRA must be a finite number, and not 0; it is {alpha!r}")
    if not isinstance(dropout, Real) or not 0 <= dropout < 1:
        raise UserError(f"the dropout of LoRA must be a probability in [0, 1), not {dropout!r}")
    linear = named_layers(model, Linear)
    names = [name for name in linear if any(name.endswith(f".{wanted}") for wanted in layer_names)]
    if not names:
        raise UserError("this model has no such layers")
    full = min(min(linear[name].weight.shape) for name in names)
    if rank > full:
        raise UserError(
            f"--lora-rank {rank:,} is above {full:,}, where an addition can be any matrix: lower it"
        )
    for i, name in enumerate(names):
        replace_by_lora(model, name, rank, alpha, (seed, i), dropout)
    model.adapter = AdapterFiles(base)
    freeze(model)


def check_has_none(model: Any) -> None:
    """UserError for a model with additions: there is no room for others."""
    if getattr(model, "adapter", None) is not None:
        raise UserError("the model has LoRA's additions already: load it anew to give it others")


def check_layer_names(layer_names: Sequence[str]) -> None:
    """UserError unless each name is one of LAYERS, or the last part of one, and there are some."""
    if isinstance(layer_names, str):
        raise UserError(f"the layers of LoRA are a list of names: write {_names_in(layer_names)}")
    if not layer_names:
        raise UserError(f"--lora-layers: no layer given; choose from {', '.join(LAYERS)}")
    for wanted in layer_names:
        if not any(f".{name}".endswith(f".{wanted}") for name in LAYERS):
            known = ", ".join(LAYERS)
            raise UserError(f"--lora-layers: there is no {wanted!r}; choose from {known}")


def check_flags(settings: Namespace) -> None:
    """UserError if what --lora-rank and its companions say is wrong."""
    if settings.lora_rank is None:
        if settings.lora_alpha is not None or told_layers(settings) != list(DEFAULT_LAYERS):
            raise UserError(WITHOUT_RANK)
        return
    if getattr(settings, "train_layers", "all") != "all":
        raise UserError("--lora-rank says what learns, and so does --train-layers: give one")
    if is_adapter(settings.model):
        raise UserError(
            f"{settings.model} is an adapter, and an adapter of one cannot be named: merge it "
            f"first, with {command('load_gpt2.py')} --from {quoted(settings.model)} --out FOLDER"
        )
    check_layer_names(told_layers(settings))


def told_layers(settings: Namespace) -> list[str]:
    """The names in --lora-layers."""
    return _names_in(settings.lora_layers)


def _names_in(text: str) -> list[str]:
    return text.replace(",", " ").split()


def add_as_told(model: Any, settings: Namespace) -> None:
    """Do what --lora-rank and its companions say, if they say anything."""
    if settings.lora_rank is not None:
        check_base(model, settings)
        _add(model, settings)


def what_learns(model: Any, settings: Namespace) -> dict[str, int]:
    """What a Plan is told of a model, whose weights do not matter, under these settings."""
    if settings.lora_rank is not None:
        _add(model, settings)
    blocks, inputs = model.transformer.h, [m.lora_A.shape[0] for m in lora_layers(model).values()]
    return {
        "n_trained": sum(parameter.size for parameter in trained_parameters(model)),
        "n_frozen": len([*takewhile(lambda block: not trained_parameters(block), blocks)]),
        "classifies": HEAD in dict(model.named_parameters()),
        "n_dropped": sum(inputs) // len(blocks) if settings.dropout else 0,
    }


def _add(model: Any, settings: Namespace) -> None:
    how = settings.lora_rank, settings.lora_alpha, told_layers(settings), settings.seed
    add_lora(model, *how, base=settings.model)


def check_base(model: Any, settings: Namespace) -> None:
    """UserError if a run would resume on another base; the settings note which base this is.

    A run's folder names its base and does not hold it, so that somebody may have trained it on.
    """
    before, found = settings.base_weights, weights_checksum(model.transformer)
    if before is not None and found != before and not settings.allow_changes:
        raise UserError(
            f"{settings.model} has other weights now than when the run in {settings.out} began: "
            "give it back those, or add --allow-changes"
        )
    settings.base_weights = found


@contextmanager
def finding_base(settings: Namespace) -> Iterator[None]:
    """Where the base of a resumed run is not found in this block, the UserError says how to name it
    anew."""
    try:
        yield
    except UserError as error:
        if not settings.resume:
            raise
        raise UserError(
            f"the base of the adapter in {settings.out}: {error}; if it was moved, say with "
            "--model where it is now"
        ) from error


def base_found(out: Path, name: str) -> str:
    """The base of the adapter in a run's folder, which the run calls `name`: where there is none of
    that name, as in another working directory, the path that the adapter's own file has."""
    noted = str((read_json(out / ADAPTER_CONFIG) or {}).get(BASE))
    is_there = Path(noted).is_absolute() and Path(noted).exists()
    return noted if is_there and not Path(name).exists() else name


def rename_base(settings: Namespace) -> None:
    """Have the sets of a resumed run name the base where it is now: it may have been moved.

    Where it has other weights now, best/ is for a base that is gone, and no loss compares with it.
    """
    out = Path(settings.out)
    best = checkpoint.load_settings(out / BEST) if checkpoint.holds_run(out / BEST) else {}
    if best.get("base_weights") not in (None, settings.base_weights):
        say(f"note: {out / BEST} is an adapter for other weights of the base: removed")
        remove_set(out / BEST)
    name, revision = base_name(settings.model)
    for folder in (out, out / BEST, *earlier_sets(out)):
        config = read_json(folder / ADAPTER_CONFIG) if is_adapter(folder) else None
        if config is not None and config.get(BASE) != name:
            config |= {BASE: name, "revision": revision}
            write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def replace_by_lora(
    model: Any, name: str, rank: int, alpha: float, seed: Any = 0, dropout: float = 0.0
) -> LoRALinear:
    """Put a LoRALinear, on the same device, in the place of the Linear of this full name; one that
    is there already, as in a block that stands in several places, stays."""
    path, _, last = name.rpartition(".")
    parent = named_layers(model, Module)[path]
    base, draws = getattr(parent, last), model.transformer.drop.draws
    if isinstance(base, LoRALinear):
        return base
    layer = LoRALinear(base, rank, alpha, draws, seed, dropout)
    move(layer.train(base.training), device_of(base.weight.data))
    setattr(parent, last, layer)
    return layer


def freeze(model: Any) -> None:
    """Have no parameter trained but the additions and a classifier's head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith((".lora_A", ".lora_B")) or name == HEAD


def trained_parameters(model: Any) -> list[Parameter]:
    """The parameters that are trained; an optimizer that gets no others keeps no other moments."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_layers(model: Any) -> dict[str, LoRALinear]:
    """The layers with additions, by their full names, as `transformer.h.0.attn.c_attn`."""
    return named_layers(model, LoRALinear)


def named_layers(model: Any, kind: type[M]) -> dict[str, M]:
    """The modules of this class by their full names."""
    parts = ((prefix.removesuffix("."), part) for prefix, part in model.modules())
    return {name: part for name, part in parts if isinstance(part, kind)}


@dataclass(frozen=True)
class AdapterFiles:
    """How a model with LoRA is saved (weights/saving.py): by its additions alone.

    `base` is what the model that they are made for is called, None if that is not known.
    """

    base: str | None

    def check_place(self, folder: Path) -> None:
        """UserError if a whole model is in this folder, the base or another, whose files those of
        the adapter would replace; or a model of another format, which may be the base."""
        if self.base is not None and lies_in(self.base, folder):
            raise UserError(f"{folder} holds the adapter's own base: give another folder")
        if is_adapter(folder):
            return
        if any((folder / name).exists() for name in WEIGHT_FILES):
            raise UserError(
                f"{folder} holds a whole model, which an adapter would replace: give another folder"
            )
        if self.base is None and holds_model(folder):
            raise UserError(
                f"{folder} holds a model, perhaps the adapter's base: give another folder, or say "
                "which model is, with add_lora(…, base=NAME)"
            )

    def arrays(self, model: Any) -> dict[str, Array]:
        """What adapter_model.safetensors holds, by name: views of the parameters that are trained.

        lora_A is (r, n_in) there, and lora_B (n_out, r), as torch.nn.Linear stores its weight.
        """
        arrays = {}
        for name, layer in lora_layers(model).items():
            arrays[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.data.T
            arrays[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.data.T
        heads = {PREFIX + name: p.data for name, p in model.named_parameters() if name == HEAD}
        return arrays | heads

    def config(self, model: Any) -> dict[str, Any]:
        """What adapter_config.json says."""
        lora = lora_layers(model)
        first = next(iter(lora.values()))
        is_classifier = HEAD in dict(model.named_parameters())
        name, revision = (None, None) if self.base is None else base_name(self.base)
        return {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM",
            BASE: name,
            "revision": revision,
            "r": first.rank,
            "lora_alpha": first.alpha,
            "lora_dropout": first.dropout.p,
            "target_modules": _target_modules(model, lora),
            "modules_to_save": ["classifier", "score"] if is_classifier else None,
            "fan_in_fan_out": True,  # weights are (in, out), as GPT-2 stores them
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }


def base_name(model: str) -> tuple[str, str | None]:
    """What adapter_config.json calls a model: as PEFT can find it, from whichever folder, and the
    revision of one on the Hub."""
    if size := size_named(model):
        return RELEASES[size].repository, None
    if Path(model).exists():
        return str(Path(model).resolve()), None
    name, _, revision = model.partition("@")
    return name, revision or None


def _target_modules(model: Any, lora: Mapping[str, LoRALinear]) -> list[str]:
    """How PEFT is to find these layers: as `attn.c_attn`, or by full names if not in each block."""
    kinds = {".".join(name.split(".")[-2:]) for name in lora}
    complete = len(lora) == len(kinds) * len(model.transformer.h)
    return sorted(kinds) if complete else list(lora)


def load_adapter(model: Any, folder: str | Path) -> None:
    """Put the additions of an adapter, ours or PEFT's, into its base model, and freeze the rest.

    Raises UserError, naming the file, where it can't be read or adds to layers that the model
    lacks, and for a model that has additions already.
    """
    check_has_none(model)
    adapter = open_adapter(folder)
    files = AdapterFiles(adapter.base if adapter.config.get(BASE) else None)
    parameters = stored_parameters(model)
    check_made_for(adapter, {name: p.shape for name, p in parameters.items()}, "this one")
    if len(ranks := {a.a.shape[1] for a in adapter.additions.values()}) > 1:
        raise UserError(f"{folder}: the rank differs between layers: {sorted(ranks)}; merge it")
    if adapter.head is not None:
        if HEAD not in parameters or parameters[HEAD].shape != adapter.head.shape:
            has = parameters[HEAD].shape if HEAD in parameters else "no"
            raise UserError(f"{folder} has a head {adapter.head.shape}, the model has {has} head")
        adapter.head.read_into(head := np.empty(adapter.head.shape, np.float32))
    dropout = adapter.config.get("lora_dropout") or 0.0
    for name, addition in adapter.additions.items():
        rank = addition.a.shape[1]
        layer = replace_by_lora(model, name, rank, addition.scale * rank, dropout=dropout)
        _set(layer.lora_A, addition.a)
        _set(layer.lora_B, addition.b)
    if adapter.head is not None:
        _set(parameters[HEAD], head)
    model.adapter = files
    freeze(model)


def _set(parameter: Parameter, values: np.ndarray) -> None:
    """Give a parameter these values, on its device and in its type."""
    values = values.astype(parameter.dtype, copy=False)
    parameter.data = to_device(values, device_of(parameter.data))
