"""micrograd-gpt: GPT-2 on a tensor-autograd engine in NumPy or CuPy.

from micrograd_gpt import Tensor, no_grad, nn, optim, functional as F
from micrograd_gpt.gpt2 import GPT2, GPT2Config
"""

import micrograd_gpt.kernels  # registers what stands in for the definitions  # noqa: F401
from micrograd_gpt import functional, nn, optim
from micrograd_gpt.arrays import edits
from micrograd_gpt.graph import draw_graph
from micrograd_gpt.support.version import VERSION as __version__
from micrograd_gpt.tensor import Tensor, concatenate, no_grad, stack, where

edits.remember()  # the definitions as they are now: what is edited from here on, is noticed

__all__ = [
    "Tensor",
    "__version__",
    "concatenate",
    "draw_graph",
    "functional",
    "nn",
    "no_grad",
    "optim",
    "stack",
    "where",
]
