"""GGUF: one file with a model and its tokenizer, from which llama.cpp runs it.

llama.cpp's architecture "gpt2" computes GPT-2. Its file differs from ours in this:

    names        `attn.c_attn` is "attn_qkv", `mlp.c_fc` "ffn_up" and so on: TABLES and IN_BLOCK
    orientation  the weights of Linear layers are (out, in), ours transposed
    scores       are always q · k / √D: another scale is multiplied into the queries' weights
    padding      ids that the tokenizer does not have are left out of the embedding and the head
    tokenizer    "tokenizer.ggml.…": the tokens and merges, spelled as in merges.py, and what kind
                 of token each is

The `gguf` package writes it (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes
the format). What llama.cpp would run as another model or tokenizer is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from micrograd_gpt.arrays.edits import edited_parts
from micrograd_gpt.checks import check_described
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.cli import listed, say
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import written_whole
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer
from micrograd_gpt.text.byte_pairs import AddedToken
from micrograd_gpt.text.hugging_face import added_tokens, tokenizer_json
from micrograd_gpt.text.merges import BYTES
from micrograd_gpt.text.tokenizers import CharTokenizer, WordTokenizer
from micrograd_gpt.variants import (
    OWN_VALUES,
    VariantConfig,
    differences,
    query_scale,
)
from micrograd_gpt.weights.reading import FLOATS
from micrograd_gpt.weights.saving import stored_parameters
from micrograd_gpt.weights.tensor_files import converted

SUFFIX = ".gguf"
HEAD = "lm_head.weight"  # where there is none, it is the embedding
TABLES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    HEAD: "output.weight",
}
IN_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TYPES = {  # what the format calls a tensor's type, and a file's whose matrices are of that type
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # what it calls kinds of tokens
NO_MERGE = f"{END_OF_TEXT} {END_OF_TEXT}"
ONLY_GPT2S = ("norm_position", "position_embedding", "activation_function")


def write_gguf(
    path: str | Path, model: GPT2, tokenizer: Tokenizer, dtype: str = "float32", name: str = "gpt2"
) -> None:
    """Write the model and its tokenizer to `path`, whole or not at all.

    `dtype` (a name in TYPES) is what the matrices are stored in, rounded to nearest; vectors and
    the table of positions stay float32, as llama.cpp needs them. `name` is what programs show.
    Raises UserError as `check_exportable` does, for a number too large for `dtype`, and if the file
    can't be written; ValueError for a GPT2 that its config no longer describes.
    """
    check_described(model)
    check_exportable(model.config, tokenizer)
    gguf = gguf_package()
    tensors = dict(gguf_tensors(model, tokenizer.vocab_size))
    classes = dict.fromkeys(type(part) for _, part in model.modules())
    own = [kind.__name__ for kind in classes if not kind.__module__.startswith("micrograd_gpt.")]
    if edited := [*edited_parts(), *own]:
        say(f"note: llama.cpp computes GPT-2's code, and not what is yours: {listed(edited)}")
    # The writer opens the temporary file too, by its name
    with written_whole(path) as file, closing(gguf.GGUFWriter(file.name, "gpt2")) as writer:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[TYPES[dtype][1]])
        _add_shape(writer, model.config, inner=tensors["blk.0.ffn_up.bias"].size)
        _add_tokenizer(writer, tokenizer)
        stored = {key: stored_as(key, array, dtype) for key, array in tensors.items()}
        for key, array in tensors.items():
            kind = gguf.GGMLQuantizationType[TYPES[stored[key]][0]]
            size = array.size * FLOATS[stored[key]].itemsize
            writer.add_tensor_info(key, array.shape, FLOATS[stored[key]], size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, array in tensors.items():  # one at a time is converted
            writer.write_tensor_data(converted(array, FLOATS[stored[key]], key))


def stored_as(name: str, array: np.ndarray, dtype: str) -> str:
    """The type that llama.cpp's tensor of this name is stored in, where matrices are in `dtype`."""
    is_matrix = array.ndim == 2 and name != "position_embd.weight"
    return dtype if is_matrix else "float32"


def gguf_package() -> ModuleType:
    """The gguf package, which is an extra; UserError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError('a .gguf file needs gguf: pip install "micrograd-gpt[gguf]"') from error
    return gguf


def check_exportable(config: GPT2Config, tokenizer: Tokenizer) -> None:
    """Raise UserError if llama.cpp would run another model or tokenizer than this, saying why, or
    if the gguf package is not installed."""
    variant = differences(config)
    for setting in ONLY_GPT2S:
        if setting in variant:
            raise UserError(
                f"the model's {setting} is {variant[setting]!r}, and llama.cpp's gpt2 has only "
                f"{OWN_VALUES[setting]!r}: it cannot be exported"
            )
    gguf_vocabulary(tokenizer)
    gguf_package()


# ------------------------------------------------------------------------------------- the tensors


def gguf_names(config: GPT2Config) -> dict[str, str]:
    """What llama.cpp's gpt2 calls each parameter that it computes with."""
    modules = {"transformer.ln_f": "output_norm"}
    for layer in range(config.n_layer):
        for ours, theirs in IN_BLOCK.items():
            modules[f"transformer.h.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    kinds = "weight", "bias"
    named = {f"{ours}.{kind}": f"{modules[ours]}.{kind}" for ours in modules for kind in kinds}
    return TABLES | named


def gguf_tensors(model: GPT2, vocab_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's names of a model's parameters, and their numbers as it wants them.

    Of the embedding (V, C), and of a head of its own, it gets the first `vocab_size` rows. The
    weights of Linear layers become (out, in). UserError for a model with others, as of edited code.
    """
    names, parameters = gguf_names(model.config), stored_parameters(model)
    if wrong := sorted((names.keys() ^ parameters.keys()) - {HEAD}):
        has = "has" if wrong[0] in parameters else "lacks"
        raise UserError(
            f"the model {has} {wrong[0]}, unlike llama.cpp's gpt2: it cannot be exported"
        )
    for name, parameter in parameters.items():
        array = parameter.numpy()
        if name in ("transformer.wte.weight", HEAD):
            array = array[:vocab_size]  # (V without padding, C)
        if ".attn.c_attn." in name:
            array = _with_scaled_queries(array, model.config, layer=int(name.split(".")[2]))
        is_linear = ".c_" in name and array.ndim == 2
        yield names[name], array.T if is_linear else array


def _with_scaled_queries(array: np.ndarray, config: GPT2Config, layer: int) -> np.ndarray:
    """A c_attn's weight (C, 3C) or bias (3C,), whose first third makes the queries."""
    scale = query_scale(config, layer) if isinstance(config, VariantConfig) else 1
    if scale == 1:
        return array
    array = array.copy()
    array[..., : config.n_embd] *= scale
    return array


def _add_shape(writer: Any, config: GPT2Config, inner: int) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(inner)  # an edited MLP may have another than the config's
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


# ----------------------------------------------------------------------------------- the tokenizer


class Vocabulary(NamedTuple):
    """A byte-pair encoding in llama.cpp's terms."""

    tokens: list[str]  # by id
    kinds: list[int]  # of each token: NORMAL, CONTROL if it is special, or USER_DEFINED
    merges: list[str]  # in order, as in merges.txt


def gguf_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer in llama.cpp's terms; UserError if llama.cpp would give other ids.

    llama.cpp looks for added tokens in a text one after the other, the longest first, and in what
    is left cuts up words and carries out merges as GPT-2 does.
    """
    if isinstance(tokenizer, CharTokenizer | WordTokenizer):
        raise UserError(
            f"a {tokenizer.name} tokenizer cannot be exported: llama.cpp needs byte-level BPE, as "
            "--tokenizer gpt2 and byte are"
        )
    if tokenizer.end_of_text is None:  # llama.cpp would take id 11 for it
        raise UserError(
            "its tokenizer has no token that ends a text (eos_token), and llama.cpp needs one"
        )
    added = added_tokens(tokenizer)
    _refuse_overlaps(added)
    model = tokenizer_json(tokenizer)["model"]
    tokens = {id: token for token, id in model["vocab"].items()}
    tokens |= {token.id: token.content for token in added}
    kinds = dict.fromkeys(tokens, NORMAL)
    kinds |= {token.id: CONTROL if token.special else USER_DEFINED for token in added}
    for id, token in tokens.items():
        if kinds[id] == NORMAL and not BYTES.keys() >= set(token):
            raise UserError(f"its token {token!r} is not spelled in bytes, as llama.cpp needs it")
    ids = range(tokenizer.vocab_size)
    # Of a merge that is listed twice, the last counts here, and the first there
    merges = list(dict.fromkeys(reversed(model["merges"])))[::-1]
    return Vocabulary([tokens[id] for id in ids], [kinds[id] for id in ids], merges)


def _refuse_overlaps(added: Sequence[AddedToken]) -> None:
    """Raise UserError if which of two added tokens is found depends on how they are looked for."""
    for one, other in itertools.permutations(added, 2):
        a, b = one.content, other.content
        overlap = any(a[-n:] == b[:n] for n in range(1, min(len(a), len(b))))
        same_character = len(set(a + b)) == 1  # the longest first is then the first
        same_rules = (one.special, one.normalized) == (other.special, other.normalized)
        if (overlap and not same_character) or (a in b and not same_rules):
            raise UserError(
                f"its added tokens {a!r} and {b!r} overlap, and llama.cpp looks for them in "
                "another order"
            )


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    vocabulary = gguf_vocabulary(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the pattern that cuts text into words
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    # Merges must not be missing, and this one can't happen
    writer.add_token_merges(vocabulary.merges or [NO_MERGE])
    special = {"bos_token": tokenizer.end_of_text, **tokenizer.special_tokens}
    writer.add_bos_token_id(special["bos_token"])
    writer.add_eos_token_id(special["eos_token"])
    if "pad_token" in special:
        writer.add_pad_token_id(special["pad_token"])
    writer.add_add_bos_token(False)
