"""Are these the weights that they were before?"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from micrograd_gpt.arrays.devices import Array, to_device
from micrograd_gpt.nn import Module
from micrograd_gpt.weights.formats import Weights


def weights_checksum(model: Module) -> str:
    """What tells the weights of two models apart: the CRC-32 of all, in their order."""
    return _checksum((name, parameter.data) for name, parameter in model.named_parameters())


def stored_checksum(weights: Weights, dtype: str) -> str | None:
    """`weights_checksum` of the transformer that these files hold, loaded in this type.

    Memory holds one tensor at a time. None where a tensor is missing or has another shape, which
    whoever loads them says.
    """
    from micrograd_gpt.weights.pretrained import unwritten  # it opens adapters, which ask this

    shapes = {name: p.shape for name, p in unwritten(weights.config).named_parameters()}
    wanted = [name for name in shapes if name.startswith("transformer.")]
    stored = weights.tensors
    if any(name not in stored or stored[name].shape != shapes[name] for name in wanted):
        return None

    def arrays() -> Iterable[tuple[str, Array]]:
        for name in wanted:
            array = np.empty(shapes[name], dtype, order="F")
            stored[name].read_into(array)
            yield name.removeprefix("transformer."), array

    return _checksum(arrays())


def _checksum(arrays: Iterable[tuple[str, Array]]) -> str:
    checksum = 0
    for name, array in arrays:
        data = np.ascontiguousarray(to_device(array, "cpu").T)  # no copy in Fortran order
        checksum = zlib.crc32(
            data.view(np.uint8).reshape(-1).data, zlib.crc32(name.encode(), checksum)
        )
    return f"{checksum:08x}"
