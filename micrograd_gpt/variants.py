"""Variants of GPT-2, as small subclasses of it whose parts are replaced.

Relatives of GPT-2 that others have trained say in their config.json how they differ. The settings
have Transformers' names; a model with GPT-2's own values of all of them is a plain GPT2.

    activation_function              another GELU, relu or silu (Cerebras-GPT: gelu)
    n_inner                          the width of the MLP, if it is not 4 n_embd
    scale_attn_weights               if false, scores are q · k itself, not divided by √D
    scale_attn_by_inverse_layer_idx  if true, scores are divided by 1 in the first block, 2 in the
                                     second, … as well (Stanford's Mistral runs, CodeParrot)
    tie_word_embeddings              if false, the head is a matrix of its own

Two architectures are for learning. `norm_position="post"` puts each LayerNorm after its residual
addition, as the first Transformer did, and leaves out the final one.
`position_embedding="sinusoidal"` adds fixed waves instead of a learned table (Vaswani et al. 2017,
arXiv:1706.03762). OpenAI's weights are "pre" and "learned".

    model = VariantGPT2(VariantConfig(norm_position="post", n_layer=4, n_head=4, n_embd=128))
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.stand_ins import definition
from micrograd_gpt.gpt2 import GPT2, MLP, Block, GPT2Config
from micrograd_gpt.nn import Draws, Dropout, Init, Linear, Module, Parameter, normal
from micrograd_gpt.tensor import Array, Tensor, record

# What each setting may be: GPT-2's own value first
CHOICES: dict[str, tuple[Any, ...]] = {
    "norm_position": ("pre", "post"),
    "position_embedding": ("learned", "sinusoidal"),
    "activation_function": ("gelu_new", "gelu", "quick_gelu", "relu", "silu"),
    "scale_attn_weights": (True, False),
    "scale_attn_by_inverse_layer_idx": (False, True),
    "tie_word_embeddings": (True, False),
}
FOR_LEARNING = ("norm_position", "position_embedding")
AT_ONCE = 1 << 17  # numbers that exact_gelu works on at a time, as it needs room for several such
SAME_FUNCTION = {  # Transformers' other names for these activation functions
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_new"),
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}


@dataclasses.dataclass
class VariantConfig(GPT2Config):
    """The shape of a GPT-2 and its choices; ValueError for a choice that is not in CHOICES."""

    norm_position: str = "pre"
    position_embedding: str = "learned"
    activation_function: str = "gelu_new"
    n_inner: int | None = None  # None: 4 n_embd
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_function in tuple(SAME_FUNCTION):
            self.activation_function = SAME_FUNCTION[self.activation_function]
        if self.n_inner == 4 * self.n_embd:
            self.n_inner = None
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")


OWN_VALUES = {  # GPT-2's, of the settings that a variant has besides GPT-2's
    field.name: field.default
    for field in dataclasses.fields(VariantConfig)
    if field.name not in GPT2Config.__dataclass_fields__
}


def differences(config: GPT2Config) -> dict[str, Any]:
    """The settings by which this is another architecture than GPT-2's own; {} if it is not."""
    values = {name: getattr(config, name, own) for name, own in OWN_VALUES.items()}
    return {name: value for name, value in values.items() if value != OWN_VALUES[name]}


def inner_width(config: GPT2Config) -> int:
    """The width of the hidden layer of each MLP."""
    return getattr(config, "n_inner", None) or 4 * config.n_embd


class VariantGPT2(GPT2):
    """A GPT-2 with parts replaced as its config says."""

    config: VariantConfig
    config_class = VariantConfig  # what from_pretrained makes for it and its subclasses

    def __init__(self, config: VariantConfig, seed: int = 0, init: Init | None = None) -> None:
        if not isinstance(config, VariantConfig):
            raise ValueError(f"VariantGPT2 takes a VariantConfig, not a {type(config).__name__}")
        init = init or normal(seed)
        super().__init__(config, seed, init)
        body = self.transformer
        for i, block in enumerate(body.h):
            if config.activation_function != "gelu_new" or config.n_inner is not None:
                block.mlp = VariantMLP(config, init, self.draws)
            if (scale := query_scale(config, i)) != 1:
                block.attn.c_attn = ScaledQueries(block.attn.c_attn, scale)
            if config.norm_position == "post":
                block.__class__ = PostNormBlock
        if config.norm_position == "post":
            body.ln_f = Identity()  # type: ignore[assignment]
        if config.position_embedding == "sinusoidal":
            body.wpe = SinusoidalPositions(config.n_positions, config.n_embd)  # type: ignore[assignment]
        if not config.tie_word_embeddings:
            self.lm_head = Head(config, init)

    @property
    def head(self) -> Parameter:
        """What the hidden state is multiplied by to give logits, (V, C)."""
        tied = self.config.tie_word_embeddings
        return self.transformer.wte.weight if tied else self.lm_head.weight

    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        x = self.hidden(ids, cache)  # (B, T, C)
        return layers.linear(x[:, -1:] if last_only else x, self.head.T)

    def loss(self, ids: Any, targets: Any) -> Tensor:
        return layers.linear_cross_entropy(self.hidden(ids), self.head, targets)


# ------------------------------------------------------------------------- the parts of relatives


class VariantMLP(MLP):
    """An MLP of another width, or with another activation function."""

    def __init__(self, c: VariantConfig, init: Init, draws: Draws) -> None:
        width = inner_width(c)
        self.c_fc = Linear(c.n_embd, width, init)
        self.c_proj = Linear(width, c.n_embd, init, std=0.02 / math.sqrt(2 * c.n_layer))
        self.resid_dropout = Dropout(c.resid_pdrop, draws)
        self.activation = ACTIVATIONS[c.activation_function]

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.c_fc(x))  # (B, T, inner width)
        return self.resid_dropout(self.c_proj(hidden))  # (B, T, C)


class Head(Module):
    """A head of its own: a row for each token of the vocabulary, as the embedding has."""

    def __init__(self, c: GPT2Config, init: Init) -> None:
        self.weight = Parameter(init((c.vocab_size, c.n_embd), 0.02))


class ScaledQueries(Linear):
    """The `c_attn` of a block, with its queries multiplied by `scale`, and so all of its scores."""

    def __init__(self, c_attn: Linear, scale: float) -> None:
        self.weight, self.bias, self.scale = c_attn.weight, c_attn.bias, scale

    def __call__(self, x: Tensor) -> Tensor:
        return scaled_queries(super().__call__(x), self.scale)


def query_scale(c: VariantConfig, layer: int) -> float:
    """What the queries of a layer, counted from 0, are multiplied by; attention divides by √D."""
    scale = 1.0 if c.scale_attn_weights else math.sqrt(c.n_embd // c.n_head)
    return scale / (layer + 1) if c.scale_attn_by_inverse_layer_idx else scale


@definition
def scaled_queries(qkv: Tensor, scale: float) -> Tensor:
    """qkv (…, 3C) with its first third, the queries, times `scale`."""
    each = np.repeat([scale, 1.0, 1.0], qkv.shape[-1] // 3)  # (3C,)
    factors = np.asarray(each, qkv.dtype, like=qkv.data)
    return record("scaled_queries", qkv.data * factors, [qkv], lambda grad: (grad * factors,))


# --------------------------------------------------------------------------- activation functions


@definition
def exact_gelu(x: Tensor) -> Tensor:
    """x times the probability that a normal variable is below x ("gelu"): what `layers.gelu`
    approximates. Saved: the slope, which is that probability plus x times the density at x."""
    flat, shape = x.data.reshape(-1), x.shape
    y, slope = np.empty_like(flat), np.empty_like(flat)
    for start in range(0, flat.size, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        below, density = normal_distribution(flat[part])
        y[part] = flat[part] * below
        slope[part] = below + flat[part] * density
    return record("exact_gelu", y.reshape(shape), [x], lambda grad: (grad * slope.reshape(shape),))


@definition
def silu(x: Tensor, steepness: float = 1.0) -> Tensor:
    """x times the logistic function of `steepness` times x, also called swish. Saved: the slope.
    Ramachandran et al. 2017 (arXiv:1710.05941)."""
    gate = (steepness * x.detach()).sigmoid().data
    y = x.data * gate
    slope = gate + steepness * y * (1 - gate)
    return record("silu", y, [x], lambda grad: (grad * slope,))


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by a logistic function instead of the normal one. Hendrycks & Gimpel 2016, section 2."""
    return silu(x, 1.702)


def relu(x: Tensor) -> Tensor:
    """What is above 0. Of bfloat16 NumPy before 2.1 makes float32."""
    return x.relu().astype(x.dtype)


def new_gelu(x: Tensor) -> Tensor:
    """GPT-2's own, looked up at each call, as gpt2.py does."""
    return layers.gelu(x)


ACTIVATIONS = {
    "gelu_new": new_gelu,
    "gelu": exact_gelu,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
}


def normal_distribution(x: Array) -> tuple[Array, Array]:
    """The probability that a normal variable is below x, ½ (1 + erf(x / √2)), and its density at x.

    With u = |x|, the probability of lying above u is exp(-u² / 2) times a function that falls from
    ½ to 0 as slowly as 1 / u. That one is w = 4 / (4 + u), between 1 and 0, times a smooth function
    of w, which is a polynomial in 2w - 1 to within rounding. The method is that of Shepherd and
    Laframboise 1981, "Chebyshev approximation of (1 + 2x) exp(x²) erfc x", Math. Comp. 36.
    """
    u = np.abs(x)
    w = 4 / (4 + u)
    s = 2 * w - 1
    highest, *others = tail_polynomial(TERMS_OF_FLOAT32 if x.dtype == np.float32 else len(TAIL))
    above = np.full_like(s, highest)
    for coefficient in others:  # Horner's rule, in place
        above *= s
        above += coefficient
    density = np.exp(-0.5 * u * u)
    above *= w
    above *= density
    density *= 1 / math.sqrt(2 * math.pi)
    return np.where(x < 0, above, 1 - above), density


@functools.cache
def tail_polynomial(terms: int) -> list[float]:
    """The first terms of TAIL as the coefficients of powers, the highest first."""
    return np.polynomial.chebyshev.cheb2poly(TAIL[:terms]).tolist()[::-1]


# The Chebyshev series of exp(u² / 2) (probability above u) / w in 2w - 1, where w = 4 / (4 + u),
# worked out with 50 digits from its values at 23 Chebyshev nodes. After ten terms less than 1e-8 is
# left, after all of them less than 1e-16.
# fmt: off
TAIL = (
    0.24261280114151915, 0.18792720420989265, 0.05554838891881276,
    0.012129438315111521, 0.0017314801240606202, 8.014961859953749e-05,
    -2.5136847908026697e-05, -4.725842254926741e-06, 2.5258922136865774e-07,
    1.536333687349456e-07, -8.452550300172939e-10, -5.171627015435706e-09,
    -2.820650908118151e-11, 1.9435038070970429e-10, -2.4853560476961905e-12,
    -7.936207374893726e-12, 4.606201694121593e-13, 3.2821542034931133e-13,
    -4.353840290125295e-14, -1.2268337473133801e-14, 3.233181000392148e-15,
    3.062681882363622e-16, -2.114463453763617e-16,
)
# fmt: on
TERMS_OF_FLOAT32 = 10


# ---------------------------------------------------------------------- the parts for learning


class PostNormBlock(Block):
    """A block whose LayerNorms normalise the residual stream itself."""

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        x = self.ln_1(x + self.attn(x, past))  # (B, T, C)
        return self.ln_2(x + self.mlp(x))


class Identity(Module):
    """Stands in place of a LayerNorm and returns x as it is."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


class SinusoidalPositions(Module):
    """Fixed position vectors: positions (…) -> (…, C), float32.

    Sines and cosines, interleaved, whose wavelengths grow from 2π towards 10000 · 2π along the
    channels (Vaswani et al. 2017, section 3.5).
    """

    def __init__(self, n_positions: int, n_embd: int) -> None:
        position = np.arange(n_positions)[:, None]  # (n_positions, 1)
        channel = np.arange(n_embd)
        angle = position / 10000 ** (channel // 2 * 2 / n_embd)  # (n_positions, C)
        waves = np.where(channel % 2 == 0, np.sin(angle), np.cos(angle))
        self.waves = Tensor(waves, dtype="float32")

    def __call__(self, positions: Any) -> Tensor:
        return self.waves[positions]  # (…, C)
