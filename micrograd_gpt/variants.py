"""Two variants of GPT-2 that texts about Transformers teach, as small subclasses of it.

`norm_position="post"` puts each LayerNorm after its residual addition, as the first Transformer
did, and leaves out the final one. `position_embedding="sinusoidal"` adds fixed waves instead of a
learned table (Vaswani et al. 2017, arXiv:1706.03762). Both are for learning: OpenAI's weights are
"pre" and "learned".

    model = VariantGPT2(VariantConfig(norm_position="post", n_layer=4, n_head=4, n_embd=128))
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from micrograd_gpt.gpt2 import GPT2, Block, GPT2Config
from micrograd_gpt.nn import Init, Module
from micrograd_gpt.tensor import Tensor

CHOICES = {"norm_position": ("pre", "post"), "position_embedding": ("learned", "sinusoidal")}


@dataclasses.dataclass
class VariantConfig(GPT2Config):
    """The shape of a GPT-2 and its two choices; ValueError for a choice that is not in CHOICES."""

    norm_position: str = "pre"
    position_embedding: str = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")


class VariantGPT2(GPT2):
    """A GPT-2 with parts replaced as its config says."""

    def __init__(self, config: VariantConfig, seed: int = 0, init: Init | None = None) -> None:
        super().__init__(config, seed, init)
        body = self.transformer
        if config.position_embedding == "sinusoidal":
            body.wpe = SinusoidalPositions(config.n_positions, config.n_embd)  # type: ignore[assignment]
        if config.norm_position == "post":
            for block in body.h:
                block.__class__ = PostNormBlock
            body.ln_f = Identity()  # type: ignore[assignment]


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
