"""GPT-2: the whole model, flat, under the names its checkpoint uses (Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners"; reference implementation: OpenAI's gpt-2 `model.py`).

    B batch   T time (tokens)   C channels (n_embd)   H heads   D head size (C / H)   V vocabulary
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.stand_ins import definition
from micrograd_gpt.nn import Draws, Dropout, Embedding, Init, LayerNorm, Linear, Module, normal
from micrograd_gpt.tensor import Array, Tensor


@dataclasses.dataclass
class GPT2Config:
    """The shape of a GPT-2, under the names of the checkpoint's config.json."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    n_positions: int = 1024  # the longest context, in tokens
    embd_pdrop: float = 0.0  # dropout after the embeddings,
    attn_pdrop: float = 0.0  # on the attention weights,
    resid_pdrop: float = 0.0  # and at the end of each residual branch
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        from micrograd_gpt.checks import check_config

        check_config(vars(self))


class CausalSelfAttention(Module):
    def __init__(self, c: GPT2Config, init: Init, draws: Draws) -> None:
        self.n_head = c.n_head
        self.c_attn = Linear(c.n_embd, 3 * c.n_embd, init)
        self.c_proj = Linear(c.n_embd, c.n_embd, init, std=0.02 / math.sqrt(2 * c.n_layer))
        self.attn_dropout = Dropout(c.attn_pdrop, draws)
        self.resid_dropout = Dropout(c.resid_pdrop, draws)

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        b, t, width = x.shape
        qkv = self.c_attn(x).reshape(b, t, 3, self.n_head, -1)  # (B, T, 3, H, D)
        mixed = layers.self_attention(qkv, *self.attn_dropout.draw(), past)  # (B, T, H, D)
        return self.resid_dropout(self.c_proj(mixed.reshape(b, t, width)))  # (B, T, C)


class MLP(Module):
    def __init__(self, c: GPT2Config, init: Init, draws: Draws) -> None:
        self.c_fc = Linear(c.n_embd, 4 * c.n_embd, init)
        self.c_proj = Linear(4 * c.n_embd, c.n_embd, init, std=0.02 / math.sqrt(2 * c.n_layer))
        self.resid_dropout = Dropout(c.resid_pdrop, draws)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = layers.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.resid_dropout(self.c_proj(hidden))  # (B, T, C)


class Block(Module):
    def __init__(self, c: GPT2Config, init: Init, draws: Draws) -> None:
        self.ln_1 = LayerNorm(c.n_embd, c.layer_norm_epsilon)
        self.attn = CausalSelfAttention(c, init, draws)
        self.ln_2 = LayerNorm(c.n_embd, c.layer_norm_epsilon)
        self.mlp = MLP(c, init, draws)

    def __call__(self, x: Tensor, past: Any = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # 2 sums a block, hence √(2 n_layer) in c_proj's std


class Transformer(Module):
    """Everything below the head; exists so that names begin with `transformer.`, as in files."""

    def __init__(self, c: GPT2Config, init: Init, draws: Draws) -> None:
        self.wte = Embedding(c.vocab_size, c.n_embd, init)
        self.wpe = Embedding(c.n_positions, c.n_embd, init, std=0.01)
        self.drop = Dropout(c.embd_pdrop, draws)
        self.h = [Block(c, init, draws) for _ in range(c.n_layer)]
        self.ln_f = LayerNorm(c.n_embd, c.layer_norm_epsilon)

    def __call__(self, ids: Array, cache: Any = None) -> Tensor:
        positions = np.arange(ids.shape[1]) if cache is None else cache.positions(*ids.shape)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        return self.ln_f(through_blocks(x, self.h, cache))


@definition
def through_blocks(x: Tensor, blocks: list[Block], cache: Any = None) -> Tensor:
    """The residual stream x (B, T, C) through all blocks; a cache then counts T tokens more."""
    for i, block in enumerate(blocks):
        x = block(x, None if cache is None else cache.layer(i))  # (B, T, C)
    if cache is not None:
        cache.lengths += x.shape[1]
    return x


class GPT2(Module):
    """GPT-2. `seed` draws its weights, unless `init` does, and dropout, until `draws.reseed()`."""

    def __init__(self, config: GPT2Config, seed: int = 0, init: Init | None = None) -> None:
        if type(self) is GPT2 and type(config) is not GPT2Config:
            raise ValueError(f"GPT2 takes a GPT2Config, not a {type(config).__name__}")
        self.config, self.draws = dataclasses.replace(config), Draws(seed)
        self.transformer = Transformer(config, init or normal(seed), self.draws)

    def hidden(self, ids: Any, cache: Any = None) -> Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C); ValueError for unfit ids."""
        ids = layers.checked_ids(ids, self.config.vocab_size)
        if ids.ndim != 2 or not ids.size:
            raise ValueError(f"GPT2 takes token ids of shape (B, T), not {ids.shape}")
        if not hasattr(cache, "lengths") and cache is not None:
            raise TypeError("a cache continues ids: with targets, call model.loss(ids, targets)")
        end = ids.shape[1] + (0 if cache is None else cache.lengths.max())
        if end > self.config.n_positions:
            raise ValueError(f"{end} tokens do not fit n_positions = {self.config.n_positions}")
        return self.transformer(ids, cache)

    def __call__(self, ids: Any, cache: Any = None, last_only: bool = False) -> Tensor:
        """Logits of the next token at every position, or with `last_only` at the last: ids (B, T)
        -> (B, T or 1, V). The ids continue the tokens of a `cache` (generation/kv_cache.py)."""
        x = self.hidden(ids, cache)  # (B, T, C)
        x = x[:, -1:] if last_only else x
        return layers.linear(x, self.transformer.wte.weight.T)  # the head is the embedding again

    def loss(self, ids: Any, targets: Any) -> Tensor:
        """Mean cross-entropy, in nats, of targets (B, T) given ids (B, T); -100 does not count."""
        return layers.linear_cross_entropy(self.hidden(ids), self.transformer.wte.weight, targets)

    def generate(self, ids: Any, **settings: Any) -> Any:
        """Continue token ids as the settings of generation/settings.py say."""
        from micrograd_gpt.generation.sampling import generate

        return generate(self, ids, **settings)

    @classmethod
    def from_pretrained(cls, name: Any, device: str = "cpu", dtype: str = "float32") -> GPT2:
        """OpenAI's weights by size ("124M", …), or those in a folder (weights/pretrained.py)."""
        from micrograd_gpt.weights.pretrained import from_pretrained

        return from_pretrained(cls, name, device, dtype)

    def save_pretrained(self, folder: Any, tokenizer: Any = None, dtype: Any = None) -> None:
        """Write a folder that Transformers loads (weights/saving.py)."""
        from micrograd_gpt.weights.saving import save_pretrained

        save_pretrained(self, folder, tokenizer, dtype)
