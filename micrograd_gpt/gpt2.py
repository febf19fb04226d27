"""GPT-2: the whole model, flat, under the names its checkpoint uses.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the reference
implementation is OpenAI's gpt-2 `model.py`.

    B batch   T time (tokens)   C channels (n_embd)   H heads   D head size (C / H)   V vocabulary
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from micrograd_gpt import functional as F
from micrograd_gpt.arrays.backend import Array, RandomStream, array_module, library_for
from micrograd_gpt.arrays.precision import array_dtype, half_name, wide
from micrograd_gpt.kernels import accelerated
from micrograd_gpt.nn import Dropout, Embedding, Init, LayerNorm, Linear, Module
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.tensor import Tensor, recompute, tape_is_on

SIZES = {  # OpenAI's four models
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "774M": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "1558M": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
OLDER_NAMES = {"117M": "124M", "345M": "355M", "762M": "774M", "1.5B": "1558M"}


def size_name(name: str) -> str:
    """The name in SIZES for a size the user gave, older names included; UserError if unknown."""
    name = OLDER_NAMES.get(name, name)
    if name not in SIZES:
        raise UserError(f"unknown GPT-2 size {name!r}: choose one of {', '.join(SIZES)}")
    return name


@dataclasses.dataclass
class GPT2Config:
    """The shape of a GPT-2, under the names of the checkpoint's config.json.

    `norm_position="post"` puts each LayerNorm behind its residual addition, as in the first
    Transformer, and has no final one; `position_embedding="sinusoidal"` adds fixed waves instead of
    a learned table. Both are for learning: OpenAI's weights are "pre" and "learned".
    Raises UserError for values no model can have.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    n_positions: int = 1024  # the longest context, in tokens
    embd_pdrop: float = 0.0  # dropout after the embeddings,
    attn_pdrop: float = 0.0  # on the attention weights,
    resid_pdrop: float = 0.0  # and at the end of each residual branch
    layer_norm_epsilon: float = 1e-5
    norm_position: str = "pre"
    position_embedding: str = "learned"

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"{name} must be a probability in [0, 1), not {value!r}")
        value = self.layer_norm_epsilon
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            raise UserError(f"layer_norm_epsilon must be a finite number above 0, not {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        for name, choices in (
            ("norm_position", ("pre", "post")),
            ("position_embedding", ("learned", "sinusoidal")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")

    @property
    def is_gpt2(self) -> bool:
        """True for GPT-2's own architecture, False for the teaching variants."""
        return (self.norm_position, self.position_embedding) == ("pre", "learned")

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, as Transformers reads it.

        A teaching variant is no GPT-2 and does not say that it is: Transformers would load it and
        compute something else.
        """
        values = dataclasses.asdict(self)
        if not self.is_gpt2:
            return {"model_type": "micrograd-gpt", **values}
        del values["norm_position"], values["position_embedding"]
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "n_ctx": self.n_positions,
            "tie_word_embeddings": True,
            **values,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPT2Config:
        """The config in a config.json; UserError where it asks for what this GPT-2 does not do."""
        n_embd = values.get("n_embd")
        required = {
            "model_type": ("gpt2", "micrograd-gpt"),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "tie_word_embeddings": (True,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "n_inner": (None, 4 * n_embd if isinstance(n_embd, int) else None),
        }
        for key, allowed in required.items():
            if key in values and values[key] not in allowed:
                raise UserError(
                    f"config.json: {key} is {values[key]!r}; only {allowed[0]!r} is supported"
                )
        fields = {field.name for field in dataclasses.fields(cls)}
        missing = {"n_layer", "n_head", "n_embd", "vocab_size", "n_positions"} - values.keys()
        if missing:
            raise UserError(f"config.json lacks {', '.join(sorted(missing))}")
        return cls(**{key: value for key, value in values.items() if key in fields})


class KVCache:
    """The keys and values of every token so far, so that decoding computes only the new token's.

    One array (n_layer, 2, B, H, capacity, D), allocated once and written in place: it takes
    2 × n_layer × n_embd × capacity × B × 4 bytes in float32, half of that where a GPU computes in
    half precision. Row b holds `lengths[b]` tokens; setting that back forgets the latest. `length`
    stands for all rows' lengths where they agree.
    """

    def __init__(self, model: GPT2, batch_size: int = 1, capacity: int | None = None) -> None:
        c, device = model.config, model.transformer.wte.weight.device
        capacity = c.n_positions if capacity is None else capacity
        shape = (c.n_layer, 2, batch_size, c.n_head, capacity, c.n_embd // c.n_head)
        self.data = library_for(device).empty(shape, array_dtype(model.compute, device))
        self.lengths = np.zeros(batch_size, int)

    @property
    def length(self) -> int:
        first, *others = {int(n) for n in self.lengths}
        if others:
            raise ValueError(f"the rows of this KV cache differ in length: {self.lengths}")
        return first

    @length.setter
    def length(self, length: int) -> None:
        self.lengths[:] = length

    def layer(self, i: int) -> tuple[Array, Array, np.ndarray]:
        """Layer i's keys and values, each (B, H, capacity, D), and the rows' lengths (B,)."""
        keys, values = self.data[i]
        return keys, values, self.lengths

    def rows(self, first: int, end: int) -> KVCache:
        """Rows first … end-1 as a cache of their own, which is a view: nothing is copied."""
        part = copy.copy(self)
        part.data, part.lengths = self.data[:, :, first:end], self.lengths[first:end]
        return part

    def copy_rows(self, sources: list[int], since: int = 0) -> None:
        """Row i goes on from what row sources[i] holds; the first `since` tokens agree already."""
        moves = [(source, row) for row, source in enumerate(sources) if source != row]
        if moves:
            old, new = zip(*moves, strict=True)
            since = min(since, int(self.lengths[list(new)].min()))
            part = slice(since, int(self.lengths[list(old)].max()))
            to, source = (array_module(self.data).asarray(rows) for rows in (new, old))
            self.data[:, :, to, :, part] = self.data[:, :, source, :, part]
            self.lengths[list(new)] = self.lengths[list(old)]


class CausalSelfAttention(Module):
    def __init__(self, config: GPT2Config, init: Init, random: RandomStream) -> None:
        c = config
        self.n_head, self.attn_pdrop, self.random = c.n_head, c.attn_pdrop, random
        self.c_attn = Linear(c.n_embd, 3 * c.n_embd, init)
        self.c_proj = Linear(c.n_embd, c.n_embd, init, std=0.02 / math.sqrt(2 * c.n_layer))
        self.resid_dropout = Dropout(c.resid_pdrop, random)

    def __call__(self, x: Tensor, past: tuple[Array, Array, np.ndarray] | None = None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3C)
        if past is not None:
            mixed = F.cached_attention(qkv, self.n_head, *past)  # (B, T, C)
        elif self.training and self.attn_pdrop:
            key = self.random.next_key()
            mixed = F.causal_attention(qkv, self.n_head, self.attn_pdrop, key)
        else:
            mixed = F.causal_attention(qkv, self.n_head)
        return self.resid_dropout(self.c_proj(mixed))  # (B, T, C)


class MLP(Module):
    def __init__(self, config: GPT2Config, init: Init, random: RandomStream) -> None:
        c = config
        self.c_fc = Linear(c.n_embd, 4 * c.n_embd, init)
        self.c_proj = Linear(4 * c.n_embd, c.n_embd, init, std=0.02 / math.sqrt(2 * c.n_layer))
        self.resid_dropout = Dropout(c.resid_pdrop, random)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x, gelu=True)  # (B, T, 4C)
        return self.resid_dropout(self.c_proj(hidden))  # (B, T, C)


class Block(Module):
    def __init__(self, config: GPT2Config, init: Init, random: RandomStream) -> None:
        self.norm_position = config.norm_position
        # "pre" begins a branch, in the type of the matrix work; "post" is of the residual stream
        half = init.half if config.norm_position == "pre" else None
        self.ln_1 = LayerNorm(config.n_embd, init, config.layer_norm_epsilon, half)
        self.attn = CausalSelfAttention(config, init, random)
        self.ln_2 = LayerNorm(config.n_embd, init, config.layer_norm_epsilon, half)
        self.mlp = MLP(config, init, random)

    def __call__(self, x: Tensor, past: tuple[Array, Array, np.ndarray] | None = None) -> Tensor:
        if self.norm_position == "pre":
            x = x + self.attn(self.ln_1(x), past)  # (B, T, C)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, past))
        return self.ln_2(x + self.mlp(x))

    def plain_parameters(self) -> list[Array] | None:
        """The arrays of its twelve parameters as they are used, for a kernel that does it all.

        None where it does anything but GPT-2's: drops out, say, or has had a part replaced.
        """
        attn, mlp = self.attn, self.mlp
        parts = (self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj)
        dropouts = (attn.resid_dropout, mlp.resid_dropout)
        types = [LayerNorm, Linear, Linear, LayerNorm, Linear, Linear, Dropout, Dropout]
        types += [Block, CausalSelfAttention, MLP]
        plain = [type(part) for part in (*parts, *dropouts, self, attn, mlp)] == types
        drops_out = (attn.training and attn.attn_pdrop) or any(d.training and d.p for d in dropouts)
        if not plain or drops_out or self.norm_position != "pre":
            return None
        return [parameter.data for part in parts for parameter in (part.weight, part.bias)]


class Transformer(Module):
    """Everything below the head; exists so that names begin with `transformer.`, as in files.

    With `recompute` a training step keeps only what goes into each block, and computes the block
    again in the backward: the same gradients from less memory, in a quarter more time.
    """

    recompute: bool = False

    def __init__(self, config: GPT2Config, init: Init, random: RandomStream) -> None:
        c = config
        self.wte = Embedding(c.vocab_size, c.n_embd, init)
        if c.position_embedding == "learned":
            self.wpe = Embedding(c.n_positions, c.n_embd, init, std=0.01)
        else:
            self.waves = sinusoidal_positions(c.n_positions, c.n_embd, init)
        self.drop = Dropout(c.embd_pdrop, random)
        self.h = [Block(c, init, random) for _ in range(c.n_layer)]
        if c.norm_position == "pre":
            self.ln_f = LayerNorm(c.n_embd, init, c.layer_norm_epsilon, init.half)

    def __call__(self, ids: Array, cache: KVCache | None = None) -> Tensor:
        xp = array_module(self.wte.weight.data)
        positions = xp.arange(ids.shape[1])  # (T,)
        if cache:
            positions = xp.asarray(cache.lengths)[:, None] + positions  # (B, T)
        places = self.wpe(positions) if hasattr(self, "wpe") else self.waves[positions]
        x = self.drop(self.wte(ids) + places)  # (B, T, C)
        if cache:
            if tape_is_on():
                F.check_no_tape(x, *self.parameters())
            x = Tensor(cached_blocks(x.data, self.h, cache))  # (B, T, C)
        else:
            for block in self.h:
                if self.recompute and self.training:
                    x = recompute(block, x, block.parameters(), self.drop.random)  # (B, T, C)
                else:
                    x = block(x)  # (B, T, C)
        return self.ln_f(x) if hasattr(self, "ln_f") else x


@accelerated
def cached_blocks(x: Array, blocks: list[Block], cache: KVCache) -> Array:
    """New tokens x (B, T, C) through the blocks, seeing those in the cache -> (B, T, C).

    Their keys and values are added to the cache, and its lengths grow by T.
    """
    stream = Tensor(x)
    for i, block in enumerate(blocks):
        stream = block(stream, cache.layer(i))  # (B, T, C)
    cache.lengths += x.shape[1]
    return stream.data


class GPT2(Module):
    """A GPT-2 language model.

    Args:
        config: its shape.
        seed: of the random initialisation, and of dropout until `random.reseed()` is called.
        dtype, device: what the parameters are held in, and where ("float32", "float64", "bfloat16",
            "float16"; "cpu" or "gpu").
        compute: the type of the matrix work, by default `dtype`. To train in half precision, hold
            the parameters in float32 and compute in "bfloat16" or "float16": the branches of each
            block and the logits are then kept in that type, the residual stream, LayerNorm, the
            loss and the gradients of the parameters in float32 (Micikevicius et al. 2018,
            arXiv:1710.03740). On the CPU half precision is emulated, see precision.py.
        initialize: False leaves the matrices unwritten, for a loader to fill.

    Raises ValueError for a `compute` that is neither `dtype` nor of half precision, UserError where
    the device or what a type needs there is missing.
    """

    # Methods that stand on this model, defined above it and attached in micrograd_gpt/__init__.py
    from_pretrained: ClassVar[Any]  # pretrained.py
    save_pretrained: Callable[..., None]  # checkpoint.py
    generate: Callable[..., Any]  # sampling.py

    def __init__(
        self,
        config: GPT2Config,
        seed: int = 0,
        dtype: str = "float32",
        device: str = "cpu",
        initialize: bool = True,
        compute: str | None = None,
    ) -> None:
        self.config = dataclasses.replace(config)  # its own: set_dropout() changes it
        self.random = RandomStream(seed)  # numbers the dropout draws; reseed it at each step
        self.compute = compute or dtype
        if self.compute != dtype and not half_name(self.compute):
            raise ValueError(f"parameters of {dtype} cannot compute in {compute}: use one type")
        init = Init(seed, dtype, device, initialize, self.compute)
        self.half = init.half
        self.transformer = Transformer(config, init, self.random)

    @property
    def n_parameters(self) -> int:
        return sum(p.size for p in self.parameters())

    def set_dropout(self, p: float) -> None:
        """Drop embeddings, attention weights and residual branches with probability p."""
        c, t = self.config, self.transformer
        c.embd_pdrop = c.attn_pdrop = c.resid_pdrop = t.drop.p = p
        for block in t.h:
            block.attn.attn_pdrop = block.attn.resid_dropout.p = block.mlp.resid_dropout.p = p

    def hidden(self, ids: Any, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C), in the type it computes in."""
        ids = ids.data if isinstance(ids, Tensor) else ids
        ids = ids if hasattr(ids, "dtype") else np.asarray(ids)
        if ids.ndim != 2:
            raise ValueError(f"GPT2 takes token ids of shape (B, T), not {ids.shape}")
        if cache and len(cache.lengths) != len(ids):
            raise ValueError(f"a KV cache of {len(cache.lengths)} rows for a batch of {len(ids)}")
        end = (cache.lengths.max() if cache else 0) + ids.shape[1]
        if end > self.config.n_positions:
            raise ValueError(f"{end} tokens do not fit n_positions = {self.config.n_positions}")
        x = self.transformer(ids, cache)
        return x.astype(self.half) if self.half else x

    def __call__(self, ids: Any, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits of the next token at every position: ids (B, T) -> (B, T, V).

        With a `cache` the ids continue the tokens that are in it, and are added to it. With
        `last_only` the logits of the last position alone are computed: (B, 1, V). Raises ValueError
        for ids that are not (B, T), lie outside the vocabulary, or run past `n_positions`.
        """
        x = self.hidden(ids, cache)  # (B, T, C)
        if last_only:
            x = x[:, -1:]  # (B, 1, C)
        return F.linear(x, self.transformer.wte.weight.T)  # the head is tied to the embedding

    def loss(self, ids: Any, targets: Any) -> Tensor:
        """Mean cross-entropy of targets (B, T) given ids (B, T), in nats per token: a scalar.

        Targets of -100 are ignored. The logits are never held all at once.
        """
        return F.linear_cross_entropy(self.hidden(ids), self.transformer.wte.weight, targets)


def sinusoidal_positions(n_positions: int, n_embd: int, init: Init) -> Tensor:
    """Fixed position vectors (n_positions, C): sines and cosines, interleaved, whose wavelengths
    grow from 2π to 10000 · 2π along the channels (Vaswani et al. 2017, section 3.5)."""
    position = np.arange(n_positions)[:, None]  # (n_positions, 1)
    channel = np.arange(n_embd)
    angle = position / 10000 ** (channel // 2 * 2 / n_embd)  # (n_positions, C)
    waves = np.where(channel % 2 == 0, np.sin(angle), np.cos(angle))
    return Tensor(waves, dtype=wide(init.dtype), device=init.device)
