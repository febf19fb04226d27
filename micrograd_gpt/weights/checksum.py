"""Are these the weights that they were before?"""

from __future__ import annotations

import zlib

import numpy as np

from micrograd_gpt.arrays.devices import to_device
from micrograd_gpt.nn import Module


def weights_checksum(model: Module) -> str:
    """What tells the weights of two models apart: the CRC-32 of all, in their order."""
    checksum = 0
    for name, parameter in model.named_parameters():
        array = np.ascontiguousarray(to_device(parameter.data, "cpu").T)  # no copy in Fortran order
        checksum = zlib.crc32(
            array.view(np.uint8).reshape(-1).data, zlib.crc32(name.encode(), checksum)
        )
    return f"{checksum:08x}"
