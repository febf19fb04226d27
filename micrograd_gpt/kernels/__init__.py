"""The same arithmetic made fast: in NumPy, in C, and in CUDA.

Importing this package registers its functions as stand-ins for their definitions
(arrays/stand_ins.py). Only micrograd_gpt/__init__.py imports it. Every function here has a readable
definition that it can be compared with.
"""

import micrograd_gpt.kernels.in_c.int8
import micrograd_gpt.kernels.in_c.kernels
import micrograd_gpt.kernels.in_c.token_step
import micrograd_gpt.kernels.in_cuda.block
import micrograd_gpt.kernels.in_cuda.kernels
import micrograd_gpt.kernels.in_cuda.token_step
import micrograd_gpt.kernels.in_numpy.kernels  # noqa: F401
