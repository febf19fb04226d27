"""GPT-2 with a head that labels a text, as Transformers' GPT2ForSequenceClassification has it.

    B batch   T time (tokens)   C channels (n_embd)   N labels   V vocabulary

The head reads the hidden state of a text's last token, which has seen all others. A batch is padded
on the right: attention is causal, so no token sees the padding, and lengths say where a text ends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from micrograd_gpt import layers
from micrograd_gpt.arrays.devices import device_of, move
from micrograd_gpt.arrays.int8 import INT8
from micrograd_gpt.arrays.memory import memory_errors
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.layers import IGNORE
from micrograd_gpt.nn import Init, Module, Parameter, normal
from micrograd_gpt.support.cli import command, quoted
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json, write_text
from micrograd_gpt.tensor import Tensor
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.hugging_face import TOKENIZER_CONFIG, tokenizer_config_json
from micrograd_gpt.text.tables import short
from micrograd_gpt.text.tokenizer_files import model_tokenizer
from micrograd_gpt.weights.config import ADAPTED_CONFIG, CONFIG, read_values
from micrograd_gpt.weights.formats import Weights
from micrograd_gpt.weights.loading import each_once, fill
from micrograd_gpt.weights.names import open_model
from micrograd_gpt.weights.pretrained import unwritten
from micrograd_gpt.weights.saving import write_model

ARCHITECTURE, SCORE = "GPT2ForSequenceClassification", "score.weight"
LONGEST = "model_max_length"  # in tokenizer_config.json: where texts are cut off


class Score(Module):
    """The head: hidden states (…, C) -> logits of the labels (…, N). It has no bias."""

    def __init__(self, count: int, width: int, init: Init) -> None:
        self.weight = Parameter(init((count, width), 0.02))  # (N, C), as PyTorch's Linear has it

    def __call__(self, x: Tensor) -> Tensor:
        return layers.linear(x, self.weight.T)


class GPT2Classifier(Module):
    """The body of a GPT-2, shared and not copied, below a new head for these labels.

    `seed` draws the head's weights, from the same distribution as Transformers does. `longest` is
    how many tokens of a text are read (None: as many as the model can). Parameters have the names
    of Transformers' checkpoints: `transformer.…` and `score.weight`.
    """

    def __init__(
        self, body: GPT2, labels: Sequence[str], seed: int = 0, longest: int | None = None
    ) -> None:
        if len(set(labels)) != len(labels) or len(labels) < 2:
            raise ValueError(f"a classifier needs two different labels or more, not {labels}")
        self.config, self.draws = body.config, body.draws
        self.transformer, self.hidden = body.transformer, body.hidden
        self.labels = list(labels)
        self.longest = min(longest or self.config.n_positions, self.config.n_positions)
        self.score = Score(len(labels), self.config.n_embd, normal(seed))
        wte = self.transformer.wte.weight
        hold_in(self.score, str(wte.dtype))
        move(self.score, device_of(wte.data))

    def __call__(self, ids: Any, lengths: Any) -> Tensor:
        """Token ids (B, T), of which row i is a text up to lengths[i] and padding from there on ->
        logits of the labels (B, N). ValueError for a length that is no whole number in 1 … T."""
        lengths, shape = np.asarray(lengths), np.shape(ids)
        are_counts = lengths.dtype.kind in "iu" and len(shape) == 2 and lengths.shape == shape[:1]
        if not are_counts or not ((lengths >= 1) & (lengths <= shape[1])).all():
            raise ValueError(f"lengths {lengths} do not fit token ids of shape {shape}")
        rows, longest = shape
        x = self.hidden(ids).reshape(rows * longest, -1)  # (B T, C)
        return self.score(x[np.arange(rows) * longest + lengths - 1])  # (B, N)

    def loss(self, ids: Any, lengths: Any, labels: Any) -> Tensor:
        """Mean cross-entropy, in nats, of labels (B,), numbers 0 … N-1; those of -100 are ignored.
        ValueError for others."""
        numbers, known = np.asarray(labels), {IGNORE, *range(len(self.labels))}
        if numbers.dtype.kind not in "iu" or not set(numbers.flat) <= known:
            last = len(self.labels) - 1
            raise ValueError(f"labels are given as numbers from 0 to {last}, not {labels}")
        return layers.cross_entropy(self(ids, lengths), labels)


def set_layers(model: GPT2Classifier, which: str) -> None:
    """Say which layers learn: "all", "last" (the final block and LayerNorm, the head) or "head".

    The others' parameters take no gradient. ValueError for another word.
    """
    learning = {
        "all": ("",),
        "last": (f"transformer.h.{model.config.n_layer - 1}.", "transformer.ln_f.", "score."),
        "head": ("score.",),
    }
    if which not in learning:
        raise ValueError(f"{which!r} is none of {', '.join(learning)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(learning[which])


# ---------------------------------------------------------------------------------- folders


def write_classifier(
    model: GPT2Classifier,
    folder: str | Path,
    tokenizer: Tokenizer,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write what `transformers.AutoModelForSequenceClassification.from_pretrained(folder)` loads.

    Transformers looks for a text's last token from the right, past those with `pad_token_id`. That
    is the id of `<|endoftext|>`, which no text here contains, because typed out it is plain text.
    A tokenizer without it has no token to spare: Transformers then takes one text at a time.
    """
    numbered = {str(i): label for i, label in enumerate(model.labels)}
    pad = tokenizer.end_of_text
    also = {
        "architectures": [ARCHITECTURE],
        "id2label": numbered,
        "label2id": {label: int(i) for i, label in numbered.items()},
        "problem_type": "single_label_classification",
        "pad_token_id": pad,
    }
    write_model(model, folder, tokenizer, metadata=metadata, also_in_config=also)
    content = tokenizer_config_json(tokenizer) | {LONGEST: model.longest, "padding_side": "right"}
    if pad is not None:
        content["pad_token"] = tokenizer.tokens[pad].decode("utf-8")
    path = Path(folder) / TOKENIZER_CONFIG
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def load_classifier(
    name: str | Path, device: str = "cpu", dtype: str = "float32"
) -> GPT2Classifier:
    """The classifier in a folder, of ours or of Transformers, in evaluation mode.

    Raises UserError where there is none of that name, or a model of another kind.
    """
    return build_classifier(open_model(str(name)), device, dtype)


def load_with_tokenizer(
    name: str, device: str = "cpu", dtype: str = "float32"
) -> tuple[GPT2Classifier, Tokenizer]:
    """The classifier of that name and its tokenizer; UserError as for `load_classifier`, where it
    does not fit into memory, and where the tokenizer is not the model's.
    """
    with memory_errors("the weights do not fit; try --dtype bfloat16, or a smaller --model"):
        weights = open_model(name)
        tokenizer = model_tokenizer(weights.folder, weights.config.vocab_size)
        return build_classifier(weights, device, dtype), tokenizer


def build_classifier(
    weights: Weights, device: str = "cpu", dtype: str = "float32"
) -> GPT2Classifier:
    """The classifier with these weights; UserError as for `load_classifier`, and for int8."""
    if dtype == INT8:
        raise UserError("int8 is for language models: give a classifier --dtype bfloat16")
    if SCORE not in weights.heads:
        raise UserError(
            f"{weights.path} is a language model, not a classifier: make one of it with "
            f"{command('finetune_gpt2.py')} classify --model {quoted(weights.path)} --data FILE"
        )
    longest = (read_json(weights.folder / TOKENIZER_CONFIG) or {}).get(LONGEST)
    longest = longest if type(longest) is int and longest > 0 else None
    model = GPT2Classifier(unwritten(weights.config), labels_of(weights), longest=longest)
    hold_in(model, dtype)
    move(model, device)
    arrays = {name: parameter.data for name, parameter in model.named_parameters()}
    # Without the head of an untied language model, as the base of an adapter may have one
    tensors = {name: t for name, t in weights.tensors.items() if not name.startswith("lm_head.")}
    tensors = each_once(tensors | {SCORE: weights.heads[SCORE]}, model)
    fill(arrays, tensors, weights.path)
    return model.eval()


def check_labels(out: str | Path, labels: Sequence[str]) -> None:
    """UserError unless the run in this folder has learned these labels, in this order."""
    learned = [*(read_values(out).get("id2label") or {}).values()]
    if learned != [*labels]:
        raise UserError(
            f"the run in {out} learned the labels {', '.join(map(short, learned))}, and the data "
            f"has {', '.join(map(short, labels))}: give data with the same, or start another run "
            f"with --model {quoted(out)}"
        )


def labels_of(weights: Weights) -> list[str]:
    """The names of a classifier's labels, in the order of their numbers.

    Where config.json does not say them they are LABEL_0, …, as in Transformers. Raises UserError
    for a model of a single label, which is a regression, and for names that do not fit.
    """
    count, config = weights.heads[SCORE].shape[0], weights.folder / CONFIG
    # An adapter of ours has its own beside it, one of PEFT's only its base's
    values = read_json(weights.folder / ADAPTED_CONFIG) or weights.values
    if count < 2 or values.get("problem_type") not in (None, "single_label_classification"):
        raise UserError(
            f"{config}: only models that choose one of several labels are supported, not "
            f"{values.get('problem_type') or 'regression'}"
        )
    names = values.get("id2label")
    is_base_s = values.get("architectures") != [ARCHITECTURE]  # to which PEFT added the head
    if not names or (len(names) != count and is_base_s):
        names = {str(i): f"LABEL_{i}" for i in range(count)}
    try:
        labels = [names[str(i)] for i in range(count)]
        labels = [str(label) for label in labels if isinstance(label, str | int | float)]
    except (KeyError, TypeError):
        labels = []
    if len(set(labels)) != count or len(names) != count:
        raise UserError(f"{config} is damaged: its id2label does not name {count} labels")
    return labels
