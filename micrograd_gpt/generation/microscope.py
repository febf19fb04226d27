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

Three things are computed anew: the attention weights, the lens's logits, and the parts that sum to
a logit. They are compared with what the model itself found, and a model in which something else
happens, such as an attention of one's own, is refused.

    T positions observed   S tokens read (S >= T)   L layers   C channels   H heads   V vocabulary
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.devices import device_of, to_device
from micrograd_gpt.arrays.precision import HALF, compute_dtype, widened
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.nn import Linear, Module, Parameter, no_dropout
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Array, Tensor, no_grad

WATCHED = ("wte", "wpe", "h", "c_attn", "c_proj", "mlp")  # parts, by attribute

KNOWS = "the microscope knows GPT-2's architecture, and in this model"
# How far what is computed anew may be from the model's own: rounding is far less, another
# architecture far more
EXACT, COARSE = 1e-4, 2**-6  # the second in half precision, and on a GPU, which may use TF32


class Watched(Module):
    """A module that notes what it took and gave when it was last called, and how often it was."""

    took: Any = None
    gave: Any = None
    calls = 0

    def __init__(self, module: Module) -> None:
        self.module: Any = module

    def __call__(self, x: Any, *more: Any, **options: Any) -> Any:
        self.calls += 1
        self.took, self.gave = x, self.module(x, *more, **options)
        return self.gave

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)  # such as the weight of `wte`, which the head reads


def watched(module: Any, name: str = "") -> Any:
    """A copy of a module that shares its parameters and whose WATCHED parts are `Watched`."""
    twin = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, Module):
            setattr(twin, key, watched(value, key))
        elif isinstance(value, list | tuple):
            parts = [watched(part, key) if isinstance(part, Module) else part for part in value]
            setattr(twin, key, parts)
    return Watched(twin) if name in WATCHED else twin


def called_once(part: Any, name: str) -> Any:
    """The part; UserError unless the model has it and called it once, so that what it noted is all
    that it did."""
    if getattr(part, "calls", 0) != 1:
        raise UserError(f"the microscope needs a model that has each `{name}` and calls it once")
    return part


@dataclass(frozen=True)
class Observation:
    """What a model computed at T positions of a text: NumPy arrays, float32 or wider.

    In a GPT-2 the last of the stream is the sum of the two embeddings and of all that was added.
    """

    attention: np.ndarray  # (L, H, T, S) each head's attention weights, over all S tokens read
    stream: np.ndarray  # (L + 1, T, C) the residual stream: before each block, and after the last
    token: np.ndarray  # (T, C) the embedding of the token,
    position: np.ndarray  # (T, C) and that of its position (0 in a model that adds none)
    mixed: np.ndarray  # (L, T, C) what the heads found, side by side, before their projection
    attention_added: np.ndarray  # (L, T, C) what attention added to the stream,
    mlp_added: np.ndarray  # (L, T, C) and what the MLP did
    logits: np.ndarray  # (T, V)


def observe(model: GPT2, ids: Any, since: int = 0) -> Observation:
    """What the model computes as it reads ids (S,), at the positions from `since` on.

    Raises ValueError for ids that the model cannot read, and UserError for a model whose LayerNorms
    stand behind the residual additions (its stream is not a sum of what its parts add), that has
    not GPT-2's parts, or whose attention is not GPT-2's.
    """
    if getattr(model.config, "norm_position", "pre") != "pre":
        raise UserError('the microscope needs a model with norm_position "pre"')
    twin = watched(model)
    with no_grad(), no_dropout():
        logits = twin(np.asarray(ids)[None])  # (1, S, V)
    body = twin.transformer
    blocks = [called_once(block, "h") for block in body.h]
    mlps = [called_once(getattr(block, "mlp", None), "mlp") for block in blocks]
    token, wpe = called_once(body.wte, "wte").gave, getattr(body, "wpe", None)
    position = called_once(wpe, "wpe").gave if getattr(wpe, "calls", 0) else token * 0

    def rows(tensors: list[Tensor]) -> np.ndarray:
        """Of each (1, S, C) or (S, C): the positions from `since` on, (…, T, C)."""
        return np.stack([on_cpu(t).reshape(-1, t.shape[-1])[since:] for t in tensors])

    return Observation(
        attention=np.stack([attention_weights(model, block.attn, since) for block in blocks]),
        stream=rows([*(block.took for block in blocks), blocks[-1].gave]),
        token=rows([token])[0],
        position=rows([position])[0],
        mixed=rows([block.attn.c_proj.took for block in blocks]),
        attention_added=rows([block.attn.c_proj.gave for block in blocks]),
        mlp_added=rows([mlp.gave for mlp in mlps]),
        logits=rows([logits])[0],
    )


def attention_weights(model: GPT2, attention: Any, since: int = 0) -> np.ndarray:
    """The weights (H, T, S) with which a watched attention mixed the values of its S tokens.

    They are what attention on its queries and keys returns where the values are the rows of the
    identity matrix. UserError where these weights do not mix the values into what it found.
    """
    qkv = called_once(getattr(attention, "c_attn", None), "c_attn").gave  # (1, S, 3C)
    found = on_cpu(called_once(getattr(attention, "c_proj", None), "c_proj").took)  # (1, S, C)
    n_head, what = model.config.n_head, "attention is not the softmax of c_attn's q kᵀ / √D"
    if qkv.shape[-1] % (3 * n_head):
        raise UserError(f"{KNOWS} {what}")
    heads = Tensor(widened(qkv.data)).reshape(1, qkv.shape[1], 3, n_head, -1)  # (1, S, 3, H, D)
    q, k, v = (heads[:, :, i].swapaxes(1, 2) for i in range(3))  # each (1, H, S, D)
    identity = Tensor(np.eye(qkv.shape[1], dtype=heads.dtype, like=heads.data))
    with no_grad(), at_most("definitions"):  # faster ones take no values of another width
        weights = layers.attention(q[:, :, since:], k, identity)
        mixed = on_cpu((weights @ v).swapaxes(1, 2))[0]  # (T, H, D)
    own = found.reshape(qkv.shape[1], -1)[since:]
    check_same(model, mixed.reshape(len(mixed), -1), own, np.abs(on_cpu(v)).max(), what)
    return on_cpu(weights)[0]


def check_same(model: GPT2, ours: np.ndarray, own: np.ndarray, size: Any, what: str) -> None:
    """UserError, saying what is not as in GPT-2, unless what is computed anew is the model's own,
    but for rounding. `size` is how large the numbers are that it is computed from."""
    if not np.isfinite(own).all():
        raise UserError("the model computes numbers that are not finite, which cannot be drawn")
    weight = model.transformer.wte.weight
    is_exact = device_of(weight.data) == "cpu" and str(compute_dtype(weight)) not in HALF
    apart = np.asarray(size) * (EXACT if is_exact else COARSE)
    if ours.shape != own.shape or not np.allclose(ours, own, rtol=0, atol=apart):
        raise UserError(f"{KNOWS} {what}")


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

    def sizes(self) -> np.ndarray:
        """The absolute values (T,) of all parts together."""
        parts = [np.abs(part).reshape(-1, len(self.token)) for part in vars(self).values()]
        return np.concatenate(parts).sum(axis=0)

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
    Transformer Circuits"). Raises UserError for a projection that is not a plain `Linear`, and
    where the parts do not sum to the model's own logit.
    """
    ln_f, blocks, count = model.transformer.ln_f, model.transformer.h, len(targets)
    row = _wide(to_device(head(model).data, "cpu")[np.asarray(targets)])  # (T, C)
    # LayerNorm takes the mean off the stream; taking it off the direction comes to the same
    direction = row * vector(ln_f, "weight", 1, row.shape[-1])
    direction, eps = direction - direction.mean(axis=-1, keepdims=True), getattr(ln_f, "eps", 0)
    deviation = np.sqrt(_wide(seen.stream[-1, :count]).var(axis=-1, keepdims=True) + eps)
    direction = direction / deviation  # (T, C)
    heads, biases = [], []
    for block, mixed in zip(blocks, seen.mixed, strict=True):
        projection = block.attn.c_proj
        if type(projection) is not Linear:
            raise UserError("the microscope needs a plain Linear as c_proj: fold an adapter in")
        through = mixed[:count] * (direction @ _wide(projection.weight.data).T)  # (T, C)
        heads.append(through.reshape(count, model.config.n_head, -1).sum(axis=-1).T)  # (H, T)
        biases.append(direction @ vector(projection, "bias", 0, row.shape[-1]))  # (T,)
    found = Attribution(
        token=(seen.token[:count] * direction).sum(axis=-1),
        position=(seen.position[:count] * direction).sum(axis=-1),
        heads=np.stack(heads),
        attention_bias=np.stack(biases),
        mlp=(seen.mlp_added[:, :count] * direction).sum(axis=-1),
        final_bias=row @ vector(ln_f, "bias", 0, row.shape[-1]),
    )
    own = seen.logits[np.arange(count), np.asarray(targets)]
    what = "the logits are not the sum of what the parts add"
    check_same(model, found.total(), own, found.sizes(), what)
    return found


def head(model: GPT2) -> Parameter:
    """What the last hidden state is multiplied by to give logits, (V, C)."""
    own = getattr(model, "head", None)  # as relatives have
    return own if isinstance(own, Parameter) else model.transformer.wte.weight


def vector(module: Any, name: str, otherwise: float, width: int) -> np.ndarray:
    """A module's weight or bias (C,), or `otherwise` in each place where it has none."""
    parameter = getattr(module, name, None)
    return np.full(width, float(otherwise)) if parameter is None else _wide(parameter.data)


def on_cpu(tensor: Tensor) -> np.ndarray:
    """A tensor's data as a NumPy array, float32 where it is half precision."""
    return np.asarray(widened(tensor.numpy()))


def _wide(array: Array) -> np.ndarray:
    return to_device(array, "cpu").astype(np.float64)
