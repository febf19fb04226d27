"""What a user calls a model, in every script the same.

124M, 355M, 774M, 1558M             OpenAI's sizes, and the older names of them
out, models/x, model.safetensors    a local file or folder; it wins over a name on the Hub.
                                    A LoRA adapter's folder stands for its base with it folded in
gpt2, gpt2-medium, distilgpt2, …    what everybody calls these models on the Hub
OWNER/NAME, OWNER/NAME@REVISION     any GPT-2 on the Hub (weights/hub.py)
"""

from __future__ import annotations

import os
from pathlib import Path

from micrograd_gpt.gpt2 import GPT2Config
from micrograd_gpt.support.cli import command, quoted, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import refuse_tilde
from micrograd_gpt.weights.config import (
    CONFIG,
    OLDER_NAMES,
    SIZES,
    published_shape,
    read_config,
    size_name,
)
from micrograd_gpt.weights.formats import Weights, is_adapter, open_weights
from micrograd_gpt.weights.hub import fetch, repository_named
from micrograd_gpt.weights.releases import RELEASES, open_release

SIZE_OF = {release.repository: size for size, release in RELEASES.items()}
SHORT_NAMES = {repository.split("/")[1]: repository for repository in SIZE_OF}
SHORT_NAMES["distilgpt2"] = "distilbert/distilgpt2"


def size_named(name: str) -> str | None:
    """OpenAI's size that `name` stands for, as "124M", "gpt2" and "openai-community/gpt2" do."""
    if name in SIZES or name in OLDER_NAMES:
        return size_name(name)
    return None if os.path.exists(name) else SIZE_OF.get(SHORT_NAMES.get(name, name))


def open_model(name: str) -> Weights:
    """The weights of a model, fetched if need be; UserError if there is none of that name."""
    if size := size_named(name):
        if os.path.exists(name):
            say(f"note: {name} is OpenAI's model of that size; for what is here, write ./{name}")
        return open_release(size)
    return open_local(find(name))


def open_local(path: Path) -> Weights:
    """The weights in a file or folder: of an adapter's folder, its base's with it folded in."""
    if not is_adapter(path):
        return open_weights(path)
    from micrograd_gpt.weights.adapters import open_with_base  # it opens the base by its name

    return open_with_base(path)


def open_language_model(name: str) -> Weights:
    """As `open_model`; UserError too for a classifier, which predicts no next token."""
    weights = open_model(name)
    if "score.weight" in weights.heads:
        raise UserError(
            f"{name} is a classifier, which labels texts and writes none: "
            f"{command('finetune_gpt2.py')} classify --model {quoted(name)} --predict FILE"
        )
    return weights


def find(name: str, with_weights: bool = True) -> Path:
    """The local file or folder of a model that is not one of OpenAI's sizes, fetched if need be.

    `with_weights=False` fetches only its config and its tokenizer. Raises UserError if there is no
    model of that name.
    """
    short, at, revision = name.partition("@")
    on_the_hub = SHORT_NAMES.get(short, short) + at + revision
    if os.path.exists(name):
        if on_the_hub != name or name in SIZE_OF:
            say(f"using the local {name}, not the model of that name on the Hugging Face Hub")
        return Path(name)
    if repository := repository_named(on_the_hub):
        return fetch(repository, with_weights)
    refuse_tilde(name)
    raise UserError(
        f"{name!r} is neither a file or folder, nor one of {', '.join(SIZES)}, nor a model on the"
        " Hugging Face Hub (OWNER/NAME or OWNER/NAME@REVISION)"
    )


def config_named(name: str) -> GPT2Config:
    """The shape of a model, without its weights where possible; UserError if there is none."""
    if size := size_named(name):
        return read_config(published_shape(size))
    path = find(name, with_weights=False)
    if (path / CONFIG).exists() and not is_adapter(path):
        return read_config(path)
    return open_local(path).config


def tokenizer_folder(name: str) -> Path | None:
    """Where the tokenizer of a model is; None for OpenAI's sizes, whose tokenizer is gpt2."""
    if size_named(name):
        return None
    path = find(name, with_weights=False)
    if is_adapter(path):
        return open_local(path).folder
    return path if path.is_dir() else path.parent


def lies_in(model: str, folder: Path) -> bool:
    """Whether a model of this name is the one in a folder."""
    if size_named(model) or not os.path.exists(model):
        return False
    path = Path(model).resolve()
    return folder.resolve() in (path, path.parent if path.is_file() else path)


def own_name(model: str) -> str:
    """What to call the folder of a model that has no published size."""
    path = Path(model)
    if path.exists():
        return path.resolve().name if path.is_dir() else path.resolve().stem
    return Path(model.partition("@")[0]).name  # NAME of OWNER/NAME@REVISION
