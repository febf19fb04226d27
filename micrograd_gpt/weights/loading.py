"""The one loop that fills a model, or an optimizer, with the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.nn import Embedding, LayerNorm, Linear, Module, Parameter, parts
from micrograd_gpt.support.cli import listed, say, say_once
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.weights.reading import StoredTensor, same_bytes


def fill(
    arrays: Mapping[str, Array],
    tensors: Mapping[str, StoredTensor],
    path: Path,
) -> None:
    """Read each of `tensors`, which are in `path`, into the array of the same name, in place.

    Each number is read once, so memory holds the arrays and one chunk, or on a GPU one tensor. NaN
    and infinity are warned of on stderr. Raises UserError, naming the tensor, unless names and
    shapes are the same on both sides, and if the file can't be read.
    """
    from tqdm import tqdm

    check_fit({name: array.shape for name, array in arrays.items()}, tensors, path)
    size = sum(array.nbytes for array in arrays.values())
    with tqdm(
        total=size, desc="loading", unit="B", unit_scale=True, delay=1, disable=None
    ) as progress:
        for name, array in arrays.items():
            if not tensors[name].read_into(array):
                is_narrower = array.dtype.itemsize < tensors[name].dtype.itemsize
                or_more = f", or numbers too large for {array.dtype}" if is_narrower else ""
                say(f"warning: {path}: {name} holds NaN or infinity{or_more}")
            progress.update(array.nbytes)


def say_what_is_not_kept(model: Module) -> None:
    """A note on stderr where a layer's weight or bias is a plain Tensor, which no file keeps."""
    plain = [
        f"{name}.{key}".lstrip(".")
        for name, part in model.modules()
        for key in (("weight", "bias") if isinstance(part, Linear | Embedding | LayerNorm) else ())
        if type(getattr(part, key, None)) is Tensor
    ]
    if plain:
        say_once(
            f"note: {listed(plain)}: a plain Tensor is not saved; to keep it, make it an "
            "nn.Parameter (with requires_grad = False it is not trained)"
        )


def each_once(tensors: Mapping[str, StoredTensor], model: Module) -> dict[str, StoredTensor]:
    """These tensors without the copies that blocks which share weights have in a model's file."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(part)] for name, part in parts(model) if isinstance(part, Parameter)}
    copies = {
        name
        for name in tensors.keys() & names.keys()
        if name != names[name]
        and names[name] in tensors
        and same_bytes(tensors[name], tensors[names[name]])
    }
    return {name: tensors[name] for name in tensors if name not in copies}


def check_fit(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor], path: Path
) -> None:
    """Raise UserError, naming the first that differs, unless names and shapes are the same."""
    for problem, names in (
        ("lacks", shapes.keys() - tensors.keys()),
        ("has a tensor that the model does not have:", tensors.keys() - shapes.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} {problem} {min(names)!r}{more}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {tensors[name].shape}, the model needs {shape}"
            )
