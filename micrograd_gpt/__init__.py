"""micrograd-gpt: GPT-2 on a tensor-autograd engine in NumPy or CuPy.

from micrograd_gpt import Tensor, no_grad, nn, optim, functional as F
from micrograd_gpt.gpt2 import GPT2, GPT2Config
"""

from micrograd_gpt import functional, nn, optim
from micrograd_gpt.generation import sampling
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.tensor import Tensor, concatenate, draw_graph, no_grad, where
from micrograd_gpt.weights import pretrained, saving

__all__ = ["Tensor", "concatenate", "draw_graph", "functional", "nn", "no_grad", "optim", "where"]

# gpt2.py knows nothing of what is built on top of it. These are its methods all the same:
GPT2.from_pretrained = classmethod(pretrained.from_pretrained)
GPT2.save_pretrained = saving.save_pretrained
GPT2.generate = sampling.generate
