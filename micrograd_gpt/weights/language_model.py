"""A language model as a script uses it: with its tokenizer, and the template it was tuned with."""

from __future__ import annotations

from pathlib import Path

from micrograd_gpt.arrays.int8 import INT8
from micrograd_gpt.arrays.memory import memory_errors
from micrograd_gpt.arrays.precision import emulation_note
from micrograd_gpt.gpt2 import GPT2
from micrograd_gpt.support.cli import command, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import Tokenizer
from micrograd_gpt.text.hugging_face import PROMPT_TEMPLATE
from micrograd_gpt.text.template import Template, template_of
from micrograd_gpt.text.tokenizer_files import model_tokenizer
from micrograd_gpt.weights.config import CONFIG
from micrograd_gpt.weights.formats import is_adapter
from micrograd_gpt.weights.names import open_language_model
from micrograd_gpt.weights.pretrained import build

TRAINED = "out"  # where train_gpt2.py writes if it is not told


def load_language_model(
    name: str | None,
    device: str = "cpu",
    dtype: str = "float32",
    answers: bool = False,
    decoding: bool = False,
) -> tuple[GPT2, Tokenizer, Template | None]:
    """The model of that name, its tokenizer, and its template where it was tuned on instructions.

    None is the folder out if it holds a model, else "124M", and which it is is said on stderr; so
    is where a type is not faster, in `decoding` or, without, in reading whole texts.
    Raises UserError where there is no such model, where it does not fit into memory, where the
    tokenizer is not the model's, for int8 on a GPU, and where it `answers` instructions but has no
    template.
    """
    if note := emulation_note(dtype, device, decoding):
        say(note)
    chosen = name
    if chosen is None:
        chosen = TRAINED if _holds_model(TRAINED) else "124M"
        say(f"no --model given: using {chosen}")
    with memory_errors(f"the weights do not fit; try {_smaller(device, dtype)}"):
        try:
            weights = open_language_model(chosen)
        except UserError as error:
            if name is None and chosen != TRAINED:  # a newcomer without network
                train = command("train_gpt2.py")
                raise UserError(f"{error}; or train a model first: {train}") from error
            raise
        tokenizer = model_tokenizer(weights.folder, weights.config.vocab_size)
        template = template_of(weights.folder)
        if answers and template is None:
            raise UserError(
                f"{chosen} was not tuned on instructions (no {PROMPT_TEMPLATE}): give it a --prompt"
            )
        return build(weights, device, dtype), tokenizer, template


def _smaller(device: str, dtype: str) -> str:
    """What takes less memory than a model of this type on this device."""
    if device != "cpu":
        return "--dtype bfloat16, or --device cpu"
    return "a smaller model" if dtype == INT8 else "--dtype int8"


def _holds_model(folder: str) -> bool:
    return Path(folder, CONFIG).exists() or is_adapter(folder)
