"""Folders with the tokenizers of other models, made small."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from micrograd_gpt.text.merges import SPELLING

END = "<|endoftext|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("d", "o"), ("do", "g"), ("Ġ", "dog"), ("o", "o")]


def vocabulary(merges: Sequence[tuple[str, str]] = MERGES) -> dict[str, int]:
    """What merges make comes first, in the order of the alphabet, and then the bytes."""
    made = sorted({"".join(pair) for pair in merges})
    return {token: id for id, token in enumerate([*made, *SPELLING])}


def added_token(content: str, id: int, special: bool = True, **options: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | {"normalized": not special}
    return {"id": id, "content": content, "special": special, **flags, **options}


def tokenizer_json(
    added: Sequence[Mapping[str, Any]] = (), model: Mapping[str, Any] | None = None, **parts: Any
) -> dict[str, Any]:
    """A tokenizer.json as the tokenizers library writes it, with parts that differ."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    merges = [" ".join(pair) for pair in MERGES]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary(), "merges": merges, **(model or {})},
        **parts,
    }


def write(folder: Path, **files: Any) -> Path:
    """Write files into the folder: `merges_txt="…"` text, `vocab_json={…}` as JSON."""
    for name, content in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


def merges_txt(merges: Sequence[tuple[str, str]] = MERGES) -> str:
    return "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""])
