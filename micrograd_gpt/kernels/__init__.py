"""The same arithmetic made fast: in NumPy, in C, and in CUDA.

Importing this package registers its functions with the definitions they stand in for
(arrays/stand_ins.py); only the package's own `__init__.py` imports it. Nothing is defined here
alone.
"""

import micrograd_gpt.kernels.in_c.kernels
import micrograd_gpt.kernels.in_c.token_step
import micrograd_gpt.kernels.in_cuda.kernels
import micrograd_gpt.kernels.in_cuda.token_step
import micrograd_gpt.kernels.in_numpy.kernels  # noqa: F401
