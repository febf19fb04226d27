"""The one loop that fills a model, or an optimizer, with the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.nn import Embedding, LayerNorm, Linear, Module, Parameter, parts
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.weights.reading import StoredTensor


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


def stored_parameters(model: Module) -> dict[str, Parameter]:
    """A model's parameters by their names in its file: those that blocks share have several."""
    first = dict(model.named_parameters())
    everywhere = {name: part for name, part in parts(model) if isinstance(part, Parameter)}
    return {
        name: parameter
        for name, parameter in everywhere.items()
        if name in first or name.startswith("transformer.h.")
    }


def check_kept(model: Module) -> None:
    """ValueError where a layer's weight or bias is a plain Tensor, which no file would keep."""
    for name, part in model.modules():
        for key in ("weight", "bias") if isinstance(part, Linear | Embedding | LayerNorm) else ():
            value = getattr(part, key, None)
            if isinstance(value, Tensor) and not isinstance(value, Parameter):
                raise ValueError(
                    f"{name}.{key} is a plain Tensor, which is not saved: make it an nn.Parameter "
                    "(with requires_grad = False it is not trained)".lstrip(".")
                )


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
