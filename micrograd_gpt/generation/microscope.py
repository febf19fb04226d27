"""What goes on inside a model as it reads a text: attention, the residual stream, and which part of
the model moved a logit.

    seen = observe(model, ids)                # the model reads the ids once
    seen.attention[3, 5]                      # layer 3, head 5: who looks at whom, (T, S)
    lens(model, seen.stream[3])               # the logits, if layer 3 had been the last
    attribution(model, seen, targets).heads   # how far each head moved each target's logit

The model is observed from outside: `observe` runs a copy of it that shares its parameters and in
which some modules note what they take and give. So what is seen is what the model really does,
also one whose code has been edited, and the model itself is not touched. The alternative, to write
the forward pass here once more and keep each step, would show that second pass instead.

    T positions observed   S tokens read (S >= T)   L layers   C channels   H heads   V vocabulary
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.devices import device_of, to_device
from micrograd_gpt.arrays.precision import widened
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.nn import Linear, Module, Parameter, no_dropout
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Array, Tensor, no_grad

WATCHED = ("wte", "wpe", "ln_1", "c_attn", "c_proj", "mlp", "ln_f")  # parts, by attribute


class Watched(Module):
    """A module that notes what it took and gave when it was last called."""

    took: Any
    gave: Any

    def __init__(self, module: Module) -> None:
        self.module: Any = module

    def __call__(self, x: Any) -> Any:
        self.took, self.gave = x, self.module(x)
        return self.gave


def watched(module: Any, name: str = "") -> Any:
    """A copy of a module that shares its parameters and whose WATCHED parts are `Watched`."""
    twin = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, Module):
            setattr(twin, key, watched(value, key))
        elif isinstance(value, list):
            parts = [watched(part) if isinstance(part, Module) else part for part in value]
            setattr(twin, key, parts)
    return Watched(twin) if name in WATCHED else twin


@dataclass(frozen=True)
class Observation:
    """What a model computed at T positions of a text: NumPy arrays, float32 or wider.

    The last of the stream is the sum of the two embeddings and of all that was added.
    """

    attention: np.ndarray  # (L, H, T, S) each head's attention weights, over all S tokens read
    stream: np.ndarray  # (L + 1, T, C) the residual stream: before each block, and after the last
    token: np.ndarray  # (T, C) the embedding of the token,
    position: np.ndarray  # (T, C) and that of its position
    mixed: np.ndarray  # (L, T, C) what the heads found, side by side, before their projection
    attention_added: np.ndarray  # (L, T, C) what attention added to the stream,
    mlp_added: np.ndarray  # (L, T, C) and what the MLP did


def observe(model: GPT2, ids: Any, since: int = 0) -> Observation:
    """What the model computes as it reads ids (S,), at the positions from `since` on.

    Raises ValueError for ids that the model cannot read, and UserError for a model whose LayerNorms
    stand behind the residual additions: its stream is not a sum of what its parts add.
    """
    if getattr(model.config, "norm_position", "pre") != "pre":
        raise UserError('the microscope needs a model with norm_position "pre"')
    twin = watched(model)
    with no_grad(), no_dropout():
        twin.hidden(np.asarray(ids)[None])
        body, n_head = twin.transformer, model.config.n_head
        weights = [attention_weights(block.attn.c_attn.gave, n_head, since) for block in body.h]

    def rows(tensors: list[Tensor]) -> np.ndarray:
        """Of each (1, S, C) or (S, C): the positions from `since` on, (…, T, C)."""
        return np.stack([on_cpu(t).reshape(-1, t.shape[-1])[since:] for t in tensors])

    return Observation(
        attention=np.stack([on_cpu(weight)[0] for weight in weights]),
        stream=rows([*(block.ln_1.took for block in body.h), body.ln_f.took]),
        token=rows([body.wte.gave])[0],
        position=rows([body.wpe.gave])[0],
        mixed=rows([block.attn.c_proj.took for block in body.h]),
        attention_added=rows([block.attn.c_proj.gave for block in body.h]),
        mlp_added=rows([block.mlp.gave for block in body.h]),
    )


def attention_weights(qkv: Tensor, n_head: int, since: int = 0) -> Tensor:
    """The weights with which self-attention on qkv (B, S, 3C) mixes the values: (B, H, T, S).

    They are what attention returns where the values are the rows of the identity matrix.
    """
    b, s, _ = qkv.shape
    heads = Tensor(widened(qkv.data)).reshape(b, s, 3, n_head, -1)  # (B, S, 3, H, D)
    q, k = (heads[:, :, i].swapaxes(1, 2) for i in range(2))  # each (B, H, S, D)
    identity = Tensor(np.eye(s, dtype=heads.dtype, like=heads.data))
    with at_most("definitions"):  # faster ones take no values of another width than the keys'
        return layers.attention(q[:, :, since:], k, identity)


def lens(model: GPT2, stream: np.ndarray) -> np.ndarray:
    """The logits (…, V) that the model's last LayerNorm and head read from a residual stream
    (…, C), also one between two blocks: the logit lens (nostalgebraist 2020, "interpreting GPT:
    the logit lens")."""
    weight = head(model)
    x = Tensor(to_device(stream, device_of(weight.data)))
    with no_grad():
        return on_cpu(layers.linear(model.transformer.ln_f(x), weight.T))


@dataclass(frozen=True)
class Attribution:
    """A logit at each of T positions as a sum, float64: how far each part of the model moved it."""

    token: np.ndarray  # (T,) the embedding of the token,
    position: np.ndarray  # (T,) and of its position
    heads: np.ndarray  # (L, H, T) each head,
    attention_bias: np.ndarray  # (L, T) and the bias of their projection, which is no head's
    mlp: np.ndarray  # (L, T)
    final_bias: np.ndarray  # (T,) the bias of the last LayerNorm

    def total(self) -> np.ndarray:
        """The logits (T,): all parts together."""
        layers = self.heads.sum(axis=1) + self.attention_bias + self.mlp  # (L, T)
        return self.token + self.position + layers.sum(axis=0) + self.final_bias


def attribution(model: GPT2, seen: Observation, targets: Any) -> Attribution:
    """How far each part moved the logit of targets[t] at the t-th position observed. There may be
    fewer targets (T,) than positions.

    The last LayerNorm divides the stream by its deviation. With that held as it was, a logit is
    linear in the stream, and so it is the sum of what each part added to the stream, along one
    direction (direct logit attribution: Elhage et al. 2021, "A Mathematical Framework for
    Transformer Circuits"). Raises UserError for a projection that is not a plain `Linear`.
    """
    ln_f, blocks, count = model.transformer.ln_f, model.transformer.h, len(targets)
    row = _wide(to_device(head(model).data, "cpu")[np.asarray(targets)])  # (T, C)
    # LayerNorm takes the mean off the stream; taking it off the direction comes to the same
    direction = row * _wide(ln_f.weight.data)
    direction = direction - direction.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(_wide(seen.stream[-1, :count]).var(axis=-1, keepdims=True) + ln_f.eps)
    direction = direction / deviation  # (T, C)
    heads, biases = [], []
    for block, mixed in zip(blocks, seen.mixed, strict=True):
        projection = block.attn.c_proj
        if type(projection) is not Linear:
            raise UserError("the microscope needs a model into which its adapters are folded")
        through = mixed[:count] * (direction @ _wide(projection.weight.data).T)  # (T, C)
        heads.append(through.reshape(count, model.config.n_head, -1).sum(axis=-1).T)  # (H, T)
        biases.append(direction @ _wide(projection.bias.data))  # (T,)
    return Attribution(
        token=(seen.token[:count] * direction).sum(axis=-1),
        position=(seen.position[:count] * direction).sum(axis=-1),
        heads=np.stack(heads),
        attention_bias=np.stack(biases),
        mlp=(seen.mlp_added[:, :count] * direction).sum(axis=-1),
        final_bias=row @ _wide(ln_f.bias.data),
    )


def head(model: GPT2) -> Parameter:
    """What the last hidden state is multiplied by to give logits, (V, C)."""
    weight: Parameter = getattr(model, "head", model.transformer.wte.weight)  # a relative's own
    return weight


def on_cpu(tensor: Tensor) -> np.ndarray:
    """A tensor's data as a NumPy array, float32 where it is half precision."""
    return np.asarray(widened(tensor.numpy()))


def _wide(array: Array) -> np.ndarray:
    return to_device(array, "cpu").astype(np.float64)
