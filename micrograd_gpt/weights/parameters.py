"""The parameters of any Module in a safetensors file, and back.

    save_parameters(net, "net.safetensors")
    load_parameters(net, "net.safetensors")

A whole GPT-2 has its folder instead (saving.py), which also says how to make it anew. The library's
own `safetensors.numpy.save_file` writes an array's memory as it lies, and calls it C order: by
hand, pass `np.ascontiguousarray(array)`, for `Linear` keeps its weight in Fortran order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from micrograd_gpt.arrays.int8 import UNSAVED, Int8Matrix
from micrograd_gpt.nn import Module
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights.loading import check_fit, fill, say_what_is_not_kept
from micrograd_gpt.weights.tensor_files import TensorFile, write_safetensors


def save_parameters(module: Module, path: str | Path) -> None:
    """Write all parameters, by their names, to a safetensors file, whole or not at all.

    Each is kept in its own dtype and comes back bit for bit, also on another device. What is no
    Parameter is not kept; stderr names a layer's weight that is none. Raises ValueError for a
    module that has none, or two of one name, UserError for a model in int8, and if the file can't
    be written.
    """
    say_what_is_not_kept(module)
    parameters = module.named_parameters()
    arrays = {name: parameter.data for name, parameter in parameters}
    if not arrays:
        raise ValueError(f"{type(module).__name__} has no parameters to save")
    if any(isinstance(array, Int8Matrix) for array in arrays.values()):
        raise UserError(UNSAVED)
    for name, parameter in parameters:
        if arrays[name] is not parameter.data:
            raise ValueError(f"two parameters are called {name}, and a file keeps one: rename one")
    write_safetensors(path, arrays, {"format": "pt"})


def load_parameters(module: Module, path: str | Path) -> None:
    """Give the module the parameters that `save_parameters` wrote; each stays on its device.

    Raises UserError, naming the file and the parameter, and leaves the module as it was, unless
    names, shapes and dtypes are the same on both sides, and if the file can't be read.
    """
    file, parameters = TensorFile(path), dict(module.named_parameters())
    check_fit({name: p.shape for name, p in parameters.items()}, file.entries, file.path)
    for name, p in parameters.items():
        if (stored := file.entries[name].dtype) != p.dtype:
            raise UserError(f"{path}: {name} holds {stored}, the model needs {p.dtype}")
    arrays = {name: np.empty_like(p.data) for name, p in parameters.items()}
    fill(arrays, file.entries, file.path)
    for name, p in parameters.items():
        p.data = arrays[name]
