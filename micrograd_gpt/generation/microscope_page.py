"""The microscope's page: what a model did with a prompt and its continuation, as one HTML file.

The file needs nothing but a browser. It is a template (assets/microscope.html) with the numbers in
it as JSON; the template's script draws them. Whatever comes from a model or a tokenizer reaches the
page only as text.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from micrograd_gpt.arrays.memory import memory_errors
from micrograd_gpt.generation.context import Continuation, window_start
from micrograd_gpt.generation.filters import softmax
from micrograd_gpt.generation.microscope import (
    Observation,
    attribution,
    check_same,
    lens,
    observe,
)
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.cli import say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import write_text
from micrograd_gpt.text.base_tokenizer import Tokenizer

TEMPLATE = Path(__file__).parent / "assets" / "microscope.html"
DATA = "{{data}}"  # where the template has the numbers

MAP_BYTES = 1_500_000  # of all attention maps together, which become 2 MB in the page
MOST_TOKENS = 256  # more are hard to look at
PAGE_SUFFIXES = (".html", ".htm")
OTHERS = 10  # tokens shown beside the one that came
LENS_OTHERS = 5  # tokens shown for each layer


def check_page(path: str, questions: Sequence[str] | None) -> None:
    """Raise UserError where no page can come of it; said before a large model is loaded."""
    if questions is None:
        raise UserError("--microscope looks at one text: give that with --prompt")
    if Path(path).is_dir():
        raise UserError(f"--microscope {path} is a folder: name a file, such as {path}/page.html")
    if Path(path).suffix.lower() not in PAGE_SUFFIXES:  # which a browser would show as text
        raise UserError(f"--microscope {path} is to be a page: name one that ends in .html")


def write_page(path: str, model: GPT2, tokenizer: Tokenizer, texts: Iterable[Continuation]) -> None:
    """Write the page for the first of the texts, and say on stderr what it leaves out.

    Raises UserError where the text has a single token, memory runs out, or the file cannot be
    written.
    """
    text, *others = texts
    part = choose_part(len(text.ids), text.n_prompt, model.config)
    if part.end - part.start < 2:
        raise UserError("the microscope needs a text of two tokens or more: this one has one")
    with memory_errors("the microscope's numbers do not fit; try a shorter text"):
        data = page_data(model, tokenizer, text, part)
    write_text(path, page(data))
    say(f"the microscope's page: {path}")
    if others:
        say("note: the page shows the first of the texts")
    if part.end - part.start < len(text.ids):
        say(
            f"note: the page shows tokens {part.start + 1} to {part.end} of {len(text.ids)}, "
            f"as many as fit"
        )


@dataclass(frozen=True)
class Part:
    """Which tokens of a text the page shows, [start, end), and from which on the model reads."""

    window: int
    start: int
    end: int


def choose_part(length: int, n_prompt: int, config: GPT2Config) -> Part:
    """The part to show of a text of `length` tokens that begins with a prompt of `n_prompt`.

    The text is read through the window in which its first new token was chosen. Where not all of
    that can be shown, half of the part is prompt, or more where less is new.
    """
    window = window_start(n_prompt, config.n_positions)
    end = min(length, window + config.n_positions)
    most = most_tokens(config)
    start = max(window, min(end - most, n_prompt - most // 2))
    return Part(window, start, min(end, start + most))


def most_tokens(config: GPT2Config) -> int:
    """How many tokens a page can show: the maps of n tokens have n (n + 1) / 2 bytes each."""
    maps = config.n_layer * config.n_head
    return max(2, min(MOST_TOKENS, math.isqrt(2 * MAP_BYTES // maps) - 1))


def page(data: dict[str, Any]) -> str:
    """The HTML: the template with the data as JSON in which nothing can end the script element."""
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text("utf-8").replace(DATA, text)


# -------------------------------------------------------------------------------- the page's data


def page_data(model: GPT2, tokenizer: Tokenizer, text: Continuation, part: Part) -> dict[str, Any]:
    """All that the page shows, as JSON has it. With N tokens shown, what belongs to a prediction is
    a list of N - 1: the k-th is made at token k, of token k + 1."""
    offset = part.start - part.window
    ids = np.array(text.ids[part.window : part.end])
    seen = observe(model, ids, offset)
    shown = ids[offset:]
    n_layer, n_head = seen.attention.shape[:2]
    last, layers = looks(model, tokenizer, seen, shown[1:])
    used = {int(i) for i in shown}.union(*(layer["top"].ravel().tolist() for layer in layers))
    used |= set(last["top"].ravel().tolist())
    return {
        "shape": {"layers": n_layer, "heads": n_head, "width": seen.stream.shape[-1]},
        "ids": shown.tolist(),
        "prompt": max(0, text.n_prompt - part.start),  # how many of the tokens shown
        "left_out": {
            "unread": part.window,
            "before": offset,
            "after": len(text.ids) - part.end,
        },
        "tokens": {i: spelled(tokenizer, i) for i in sorted(used)},
        "predictions": {name: rounded(values) for name, values in last.items()},
        "attention": attention_bytes(seen.attention, offset),
        "lens": [{name: rounded(layer[name]) for name in layer} for layer in layers],
        "sizes": sizes(seen),
        "parts": parts(model, seen, shown[1:]),
    }


def looks(
    model: GPT2, tokenizer: Tokenizer, seen: Observation, targets: np.ndarray
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """What the last layer says of the targets (N - 1,), and what each layer would have said."""
    layers = []
    stream = seen.stream[:, :-1]  # the last token predicts none that is there
    for x in tqdm(stream, desc="looking", unit="layer", delay=1, disable=None, leave=False):
        logits = lens(model, x)  # (N - 1, V)
        probabilities = softmax(logits.astype(np.float64))
        layers.append(look(probabilities, targets, LENS_OTHERS, tokenizer.vocab_size))
    what = "the logits are not the embedding times the last LayerNorm's output"
    check_same(model, logits, seen.logits[:-1], np.abs(logits).max(), what)
    others = probabilities.copy()
    others[np.arange(len(targets)), targets] = -1  # the ten beside the one that came
    last = look(others, targets, OTHERS, tokenizer.vocab_size)
    logs = np.log(np.maximum(probabilities, np.finfo(float).tiny))
    last |= {name: layers[-1][name] for name in ("probability", "rank")}
    last["entropy"] = -(probabilities * logs).sum(axis=-1) / math.log(2)  # bits
    return last, layers


def look(
    probabilities: np.ndarray, targets: np.ndarray, count: int, vocab_size: int
) -> dict[str, np.ndarray]:
    """Of each row of probabilities (N, V): the `count` likeliest ids, likeliest first, with theirs;
    the target's, and its rank from 1. Ids from `vocab_size` on stand for no token."""
    spelt = probabilities[:, :vocab_size]
    count = min(count, spelt.shape[1])
    top = np.argpartition(-spelt, count - 1)[:, :count]  # (N, count), in any order
    order = np.argsort(-np.take_along_axis(spelt, top, axis=-1), axis=-1, kind="stable")
    top = np.take_along_axis(top, order, axis=-1)
    own = probabilities[np.arange(len(targets)), targets]  # (N,)
    return {
        "top": top,
        "top_probability": np.take_along_axis(probabilities, top, axis=-1),
        "probability": own,
        "rank": 1 + (spelt > own[:, None]).sum(axis=-1),
    }


def attention_bytes(attention: np.ndarray, offset: int) -> dict[str, str]:
    """The weights (L, H, N, S) as a byte each, 255 times their square root, in base64: `maps`, of
    each head and row the tokens shown up to its own; `earlier`, the sum over the `offset` before.
    """
    rows, columns = np.tril_indices(attention.shape[2])
    maps = attention[:, :, rows, offset + columns]  # (L, H, N (N + 1) / 2)
    earlier = attention[..., :offset].sum(axis=-1)  # (L, H, N)
    return {"maps": as_base64(maps), "earlier": as_base64(earlier)}


def as_base64(weights: np.ndarray) -> str:
    roots = np.rint(255 * np.sqrt(np.clip(weights, 0, 1))).astype(np.uint8)
    return base64.b64encode(roots.tobytes()).decode("ascii")


def sizes(seen: Observation) -> dict[str, Any]:
    """The lengths of the vectors in the residual stream, and of what each layer adds to it."""
    vectors = {"stream": seen.stream, "attention": seen.attention_added, "mlp": seen.mlp_added}
    return {name: rounded(np.linalg.norm(v[:, :-1], axis=-1)) for name, v in vectors.items()}


def parts(model: GPT2, seen: Observation, targets: np.ndarray) -> dict[str, Any]:
    """How far each part of the model moved the logit of each target (N - 1,)."""
    found = attribution(model, seen, targets)
    moved = {name: rounded(values) for name, values in vars(found).items()}
    return moved | {"logit": rounded(found.total())}


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; bytes that are only a part of a character are written out: \\xe2."""
    return tokenizer.tokens[token].decode("utf-8", errors="backslashreplace")


def rounded(values: np.ndarray) -> Any:
    """Nested lists of the values, each with four digits that count."""
    if values.dtype.kind in "iu":
        return values.tolist()
    flat = [float(f"{value:.4g}") for value in values.ravel().tolist()]
    return np.array(flat).reshape(values.shape).tolist()
