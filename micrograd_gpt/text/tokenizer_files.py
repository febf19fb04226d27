"""The tokenizer of a model's folder: ours, or GPT-2's in Hugging Face's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json
from micrograd_gpt.text.tokenizers import (
    END_OF_TEXT,
    NAMES,
    TOKENIZER_FILE,
    GPT2Tokenizer,
    Tokenizer,
    tokenizer_from_dict,
)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of the model in `folder`.

    A tokenizer.json of ours says which it is. Any other folder is a Hugging Face folder, which can
    have Hugging Face's own tokenizer.json, a vocab.json, both or neither. Its tokenizer is gpt2,
    provided that each vocabulary found is GPT-2's, entry by entry, and that config.json, if there
    is one, does not give another vocab_size than 50257.

    Raises UserError, naming the file, for a damaged file and for any other tokenizer.
    """
    folder = Path(folder)
    settings = read_json(folder / TOKENIZER_FILE)
    if settings is not None and "tokenizer" in settings:
        try:
            return tokenizer_from_dict(settings)
        except UserError as error:
            raise UserError(f"{folder / TOKENIZER_FILE} is damaged: {error}") from error

    gpt2 = GPT2Tokenizer()
    if settings is not None and not _describes_gpt2(settings, gpt2):
        raise UserError(
            f"{folder / TOKENIZER_FILE} is neither one of our tokenizers ({', '.join(NAMES)}) nor "
            "Hugging Face's for GPT-2: give a model that uses one of these"
        )
    vocabulary = read_json(folder / "vocab.json")
    if vocabulary is not None and vocabulary != spelled_gpt2_vocabulary(gpt2):
        raise UserError(
            f"{folder / 'vocab.json'} is not GPT-2's vocabulary, the only one that can be read: "
            "give a model that uses it"
        )
    config = read_json(folder / "config.json") or {}
    if config.get("vocab_size", gpt2.vocab_size) != gpt2.vocab_size:
        raise UserError(
            f"{folder} has no {TOKENIZER_FILE}, and its vocab_size is {config['vocab_size']} where "
            f"GPT-2's is {gpt2.vocab_size}: add the {TOKENIZER_FILE} the model was saved with"
        )
    return gpt2


def _describes_gpt2(settings: dict[str, Any], gpt2: GPT2Tokenizer) -> bool:
    """Return whether Hugging Face's tokenizer.json has GPT-2's 50,257 tokens and no others."""
    model, added = settings.get("model"), settings.get("added_tokens", [])
    return (
        isinstance(model, dict)
        and model.get("vocab") == spelled_gpt2_vocabulary(gpt2)
        and isinstance(added, list)
        and all(isinstance(t, dict) and t.get("content") == END_OF_TEXT for t in added)
    )


def spelled_gpt2_vocabulary(gpt2: GPT2Tokenizer) -> dict[str, int]:
    """Return GPT-2's tokens and ids, spelled as in OpenAI's encoder.json and Hugging Face's files.

    Each byte is spelled as one printable character: its Latin-1 character if that can be printed,
    else the next one from U+0100 on (a space is "Ġ").
    """
    hidden = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
    characters = {b: chr(256 + hidden.index(b)) if b in hidden else chr(b) for b in range(256)}
    return {
        END_OF_TEXT if i == gpt2.end_of_text else "".join(characters[b] for b in token): i
        for i, token in enumerate(gpt2.tokens)
    }
