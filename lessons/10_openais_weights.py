# %% [markdown]
# # 10. OpenAI's weights
#
# **Afterwards you can** open a file of weights with nothing but `json` and NumPy and say what every
# byte in it is for, load it into a model by its names, and tell whether what you have loaded really
# is GPT-2.
#
# **The idea.** A file of weights is a *list*, which gives each tensor's name, shape and place, and
# then *numbers*, end to end. All formats are that; they only write the list in different ways. So
# whoever can read the list has the model.

# %%
import json
import math
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import safetensors.numpy

import micrograd_gpt
from micrograd_gpt import no_grad
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.byte_pairs import GPT2Tokenizer, gpt2_merges, gpt2_vocabulary
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.weights.releases import HuggingFace
from micrograd_gpt.weights.tf_checkpoint import TFCheckpoint

HERE = Path(__file__).parent if "__file__" in globals() else Path()  # a notebook runs in its folder
workshop = tempfile.TemporaryDirectory()  # for the files of this lesson
folder = Path(workshop.name)

# %% [markdown]
# ## A whole file in one picture
#
# The format that nearly everybody uses now is called **safetensors**. Its own library writes two
# small tensors for us, and we look at the bytes: at letters where there is text, and elsewhere at
# their values, in hexadecimal digits.


# %%
def draw_bytes(data, parts, texts, columns=24):
    """Bytes in rows. `parts` says what they are, in order: pairs of a name and how many bytes; the
    bytes of those whose names are in `texts` are letters."""
    rows = math.ceil(sum(count for _, count in parts) / columns)
    _, axis = plt.subplots(figsize=(10, 0.4 * rows + 0.5))
    names = list(dict(parts))  # each once
    kinds = [name for name, count in parts for _ in range(count)]  # of every byte
    for place, (byte, kind) in enumerate(zip(data, kinds, strict=False)):
        row, column = divmod(place, columns)
        axis.add_patch(plt.Rectangle((column, row), 1, 1, color=plt.cm.Pastel1(names.index(kind))))
        text = chr(byte) if kind in texts else f"{byte:02x}"
        axis.text(column + 0.5, row + 0.55, text, ha="center", va="center", family="monospace")
    for i, name in enumerate(names):
        axis.scatter([], [], color=plt.cm.Pastel1(i), marker="s", label=name)
    axis.set(xlim=(0, columns), ylim=(rows, 0))
    axis.axis("off")
    axis.legend(ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    plt.show()


tensors = {
    "a": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    "b": np.array([0.5, -0.5], np.float32),
}
data = safetensors.numpy.save(tensors)
length = int.from_bytes(data[:8], "little")
parts = [("length of the list", 8), ("the list", length), ("numbers of a", 24), ("of b", 8)]
draw_bytes(data, parts, texts=["the list"])
print(data[8 : 8 + length].decode())

# %% [markdown]
# That is all. Eight bytes say how long the list is (the lowest byte first, which is called *little
# endian*). The list is JSON, and may end with spaces, so that the numbers begin at a multiple of
# eight. Then come the numbers, each in four bytes: 1.0 is `00 00 80 3f`. `data_offsets` says where
# a tensor's bytes begin and end, counted from the end of the list.
#
# One trap: the library's `save` writes memory as it lies, row by row. `nn.Linear` keeps its
# weight column after column, so whoever writes one by hand passes `np.ascontiguousarray(weight)`.
# `save_parameters` (`weights/parameters.py`) does so for the parameters of any module.
#
# Why not `pickle`, Python's own way to save things, which PyTorch used for years? Because a pickle
# is a *program* that builds the object when it is read. A pickle from a stranger can do anything on
# your machine. Here, there is nothing that could be run.
#
# ## A reader in a few lines
#
# Now a GPT-2. Ours is small and its numbers are random, but its vocabulary is GPT-2's, and its
# folder is in every way like the one of the real model.

# %%
tokenizer = GPT2Tokenizer()
model = GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=tokenizer.vocab_size))
model.save_pretrained(folder, tokenizer)
print(*sorted(path.name for path in folder.iterdir()))

DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}  # "<": the lowest byte first


def read_list(path):
    """What a safetensors file says of its tensors, and at which byte the numbers begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)  # a place for remarks
    return tensors, 8 + length


def read_tensor(path, name):
    tensors, start = read_list(path)
    dtype, shape = DTYPES[tensors[name]["dtype"]], tensors[name]["shape"]
    offset = start + tensors[name]["data_offsets"][0]
    return np.fromfile(path, dtype, count=math.prod(shape), offset=offset).reshape(shape)


path = folder / "model.safetensors"
listed, start = read_list(path)
library = safetensors.numpy.load_file(path)
assert listed.keys() == library.keys()
for name in listed:
    assert np.array_equal(read_tensor(path, name), library[name])
print(f"{len(listed)} tensors, all equal to what the library reads")

parameters = sum(p.size for p in model.parameters())
print(f"{parameters:,} parameters of 4 bytes, and {start:,} bytes for the list")
assert path.stat().st_size == start + 4 * parameters

# %% [markdown]
# ## Loading by names
#
# A model is a tree of modules, and a parameter's name is the way to it: `transformer.h.1.mlp.c_fc`
# is, in Python, `model.transformer.h[1].mlp.c_fc`. This package calls everything by the names that
# GPT-2's files use, so that loading needs no table of translations, only a loop. Two habits of
# files on the Hub have to be known: in some, the first part, `transformer.`, is left out; and old
# ones also hold the causal mask of each layer, under the misleading name `attn.bias`.


# %%
def our_name(name):
    """What we call a tensor of such a file; None for one that we have no use for."""
    name = name.removeprefix("transformer.")
    is_mask = name.endswith((".attn.bias", ".attn.masked_bias"))
    is_head = name == "lm_head.weight"  # which is the token table again
    return None if is_mask or is_head else f"transformer.{name}"


def fill(model, tensors):
    """Copy tensors into the parameters of the same names; nothing may be left over."""
    found = {our_name(name): tensor for name, tensor in tensors.items()}
    found.pop(None, None)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == found.keys(), parameters.keys() ^ found.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == found[name].shape, name
        parameter.data[...] = found[name]


other = GPT2(model.config, seed=1)  # other random numbers
fill(other, {name: read_tensor(path, name) for name in listed})
ids = tokenizer.encode("The dog")[None]
with no_grad():
    assert np.array_equal(model(ids).numpy(), other(ids).numpy())
print("another model now says exactly the same")
print(*(f"{name} {read_tensor(path, name).shape}" for name in listed if ".h.0." in name), sep="\n")

# %% [markdown]
# Compare the names on **both** sides, as above. A tensor that the model lacks is an error that
# anyone notices. But a parameter that the file lacks keeps its random numbers, and the model still
# writes something: that mistake is found weeks later.
#
# One thing is peculiar to GPT-2. Its matrices are stored as (in, out), so that a layer computes
# `x @ weight`. PyTorch's own `Linear` stores (out, in). Whoever loads GPT-2 into that has to
# transpose four matrices in each block. In this package nothing is transposed.
#
# ## As OpenAI published it: TensorFlow's checkpoint
#
# In 2019 the weights came out as files of TensorFlow: `model.ckpt.data-00000-of-00001` with the
# numbers, and `model.ckpt.index` with the list. This repository keeps a tiny GPT-2 that TensorFlow
# itself wrote, for the tests. Here is how its list begins:

# %%
repository = Path(micrograd_gpt.__file__).parents[1]
tiny = repository / "tests" / "data" / "tf_checkpoint" / "saver"
print(json.loads((tiny / "hparams.json").read_text("utf-8")))
index = (tiny / "model.ckpt.index").read_bytes()
entry = ["three sizes", "key", "value"]
parts = [("about the whole", 9), *zip(entry * 2, (3, 22, 16, 3, 1, 27), strict=True)]
draw_bytes(index, [*parts, ("three sizes", 3), ("key", 6)], texts=["key"])

# %% [markdown]
# It is a table of keys and values, sorted by key. Neighbours in a sorted list begin alike, so each
# entry says first *how many letters it shares* with the key before it, then how many of its own
# follow, and how long its value is. Look at the second `three sizes`: 0x15 = 21 letters as before,
# one new letter, `w`, and then 0x1b = 27 bytes. So the second key is `model/h0/attn/c_attn/w`.
#
# All such numbers are **varints**: seven bits in a byte, the lowest first, and the highest bit says
# that another byte follows. A number below 128 takes one byte, and a large one as many as it needs.
# Several blocks of entries make a file. Its last 48 bytes say where two lists are, each by its
# offset and length: the first list is of no use to us, the second is the list of blocks. That is a
# block of entries itself, whose values are again offsets and lengths: those of the blocks.


# %%
def varint(data, at):
    """The number that begins at this byte, and where the next thing begins."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def varints(data, at, count):
    numbers = []
    for _ in range(count):
        number, at = varint(data, at)
        numbers.append(number)
    return *numbers, at


def entries(data, offset, length):
    """The keys and values of one block."""
    block, at, key = data[offset : offset + length], 0, b""
    n_marks = int.from_bytes(block[-4:], "little")  # for a quick search, which we do not need
    while at < length - 4 * (n_marks + 1):
        shared, own, size, at = varints(block, at, 3)
        key = key[:shared] + block[at : at + own]
        at += own + size
        yield key, block[at - size : at]


assert varint(b"\xac\x02", 0) == (300, 2)  # 44 + 2 × 128
_, _, *list_of_blocks, _ = varints(index[-48:], 0, 4)
table = {}
for _, where in entries(index, *list_of_blocks):
    *block, _ = varints(where, 0, 2)
    table |= {key.decode(): value for key, value in entries(index, *block)}
del table[""]  # the first entry is about the file as a whole
print(*list(table)[:5], "…", len(table), "tensors")

checkpoint = TFCheckpoint(tiny)  # the package's reader
assert list(table) == list(checkpoint.variables)
print("model/wte:", table["model/wte"].hex(" "))

# %% [markdown]
# A value is a *protocol buffer*, Google's way to write a record. Before each field stands a byte
# with its number, times 8, plus its kind: 0 for a varint, 2 for bytes whose count follows, 5 for
# four bytes. So it can be read by eye:
#
# | bytes | meaning |
# | --- | --- |
# | `08 01` | field 1, the number type: 1, which is float32 |
# | `12 08 12 02 08 3d 12 02 08 10` | field 2, the shape: 0x3d = 61 rows of 0x10 = 16 |
# | `20 80 de 01` | field 4, the byte in the data file where the numbers begin |
# | `28 c0 1e` | field 5, how many bytes: 64 + 128 × 30 = 3904 = 61 × 16 × 4 |
# | `35 a7 b3 66 8c` | field 6, a checksum (safetensors has none) |
#
# The data file is numbers and nothing else. So NumPy can read it, once the list has said where:

# %%
expected = safetensors.numpy.load_file(tiny.parent / "expected.safetensors")
numbers = tiny / "model.ckpt.data-00000-of-00001"
arrays = {}
for name, v in checkpoint.variables.items():
    arrays[name] = np.fromfile(numbers, "<f4", count=v.count, offset=v.offset).reshape(v.shape)
    assert np.array_equal(arrays[name], expected[name])
print(f"{len(arrays)} tensors, all equal to those that TensorFlow was given")

# %% [markdown]
# The names are another matter. OpenAI's code calls a weight `w` or, in a norm, `g` (for *gain*),
# and writes its layers as convolutions of width 1, whose matrices have a third axis in front.
# Hugging Face renamed everything, and its names have become the common ones. A few rules translate:


# %%
def translated(name):
    """model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight"""
    parts = name.split("/")[1:]  # without "model"
    parts = [f"h.{part[1:]}" if part[0] == "h" else part for part in parts]
    last = {"w": "weight", "g": "weight", "b": "bias"}.get(parts[-1])
    return ".".join([*parts[:-1], last] if last else [*parts, "weight"])


names = {name: translated(name) for name in arrays}
for name in ("model/wte", "model/ln_f/g", "model/h0/attn/c_attn/w"):
    print(f"{name:24} {arrays[name].shape!s:14} {names[name]}")
assert checkpoint.gpt2_names() == {f"transformer.{names[name]}": name for name in names}

config = GPT2Config(n_layer=2, n_head=4, n_embd=16, vocab_size=61, n_positions=32)
ours = GPT2(config)
fill(ours, {names[n]: a[0] if a.ndim == 3 else a for n, a in arrays.items()})
with no_grad():
    assert np.array_equal(ours([[1, 2]]).numpy(), GPT2.from_pretrained(tiny)([[1, 2]]).numpy())
print("and the same logits as GPT2.from_pretrained")

# %% [markdown]
# ## The tokenizer's two files
#
# Weights without their tokenizer are useless: token 464 has to be the one that was 464 in training.
# Two files say it. `vocab.json` gives every token its number, `merges.txt` lists the merges of
# lesson 3, in order, a pair on each line. (OpenAI called them `encoder.json` and `vocab.bpe`.)
# Every byte is spelled as a letter that can be seen, so a space is `Ġ`, and a new line `Ċ`.

# %%
own = folder / "tokenizer"
own.mkdir(exist_ok=True)
(own / "vocab.json").write_text(json.dumps(gpt2_vocabulary()), "utf-8")
lines = ["#version: 0.2", *(f"{left} {right}" for left, right in gpt2_merges())]
(own / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
print(lines[:6])

vocabulary = json.loads((own / "vocab.json").read_text("utf-8"))
print({token: vocabulary[token] for token in ("!", "the", "Ġthe", "ĠTHE", "<|endoftext|>")})
assert len(vocabulary) == 256 + len(gpt2_merges()) + 1 == 50257  # bytes, merges, end of text
assert load_tokenizer(own).encode("The dog").tolist() == [464, 3290]

# %% [markdown]
# ## What to expect of 124M
#
# | | |
# | --- | --- |
# | parameters | 124,439,808: 498 MB in float32 |
# | loss on pages of the web | about 3.1 nats a token: as unsure as among 22 equally likely ones |
# | perplexity on WikiText-2 | 29.41 in OpenAI's paper (Radford et al. 2019, table 3) |
# | last word of a passage | right in 46 % of cases (LAMBADA, in the same table) |
# | what it is good at | English that sounds right for a sentence or three |
# | what it cannot do | answer, follow an instruction, count, stay with a subject: it *continues* |
#
# (The loss is that of nanoGPT's README, on OpenWebText: 3.12 for 124M, 2.84 for 355M, 2.67 for
# 774M.)
#
# How would you know that what you have loaded is GPT-2, and not a model with one matrix transposed?
# Ask it two things. Its **loss** on any English text: a model that knows nothing has
# $\ln 50257 = 10.8$ (lesson 4), and 124M stays far below 5. And its **greedy continuation** of a
# prompt, which leaves nothing to chance. For "The dog" it is known, token by token:

# %%
published = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246]
published += [286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
print(repr(tokenizer.decode(published)))

story = tokenizer.encode((HERE / "story.txt").read_text("utf-8"))


def loss_on_story(model):
    with no_grad():
        return model.loss(story[None, :-1], story[None, 1:]).item()


print(f"a model that knows nothing: {loss_on_story(model):.1f}")
assert math.isclose(loss_on_story(model), math.log(50257), rel_tol=0.01)

# %% [markdown]
# And the real one? If it is on your machine, the next cell loads it with *our* reader and *our*
# loop, and puts both questions to it. It looks in `models/gpt2-124M`, where `python load_gpt2.py`
# puts it, and among the models that Hugging Face's library has fetched. (This lesson downloads
# nothing.)


# %%
def find_124m():
    """The folder of 124M, or None. LESSON_MODEL, if it is set, names it ("": do not look)."""
    if (named := os.environ.get("LESSON_MODEL")) is not None:
        return Path(named) if named else None
    for place in (repository / "models" / "gpt2-124M", HuggingFace().cached("124M")):
        if place and (place / "model.safetensors").exists():
            return place
    return None


found = find_124m()
if found is None:
    print("124M is not here; `python load_gpt2.py` fetches it")
else:
    path = found / "model.safetensors"
    gpt2 = GPT2(GPT2Config())
    fill(gpt2, {name: read_tensor(path, name) for name in read_list(path)[0]})
    written = gpt2.generate([464, 3290], max_new_tokens=18, temperature=0).tolist()
    print(f"loss {loss_on_story(gpt2):.2f}:", repr(tokenizer.decode(written)))
    assert loss_on_story(gpt2) < 5 and written == published

# %% [markdown]
# **Read next:** [`weights/tensor_files.py`](../micrograd_gpt/weights/tensor_files.py) and
# [`weights/tf_checkpoint.py`](../micrograd_gpt/weights/tf_checkpoint.py), which are these readers
# with every check that a damaged or hostile file calls for, and
# [`weights/loading.py`](../micrograd_gpt/weights/loading.py), the loop.
#
# ## Exercises
#
# 1. Write a safetensors file with nothing but `json` and bytes: one tensor, the numbers 1, 2 and 3.
#    The library must be able to read it.
# 2. On the Hub, `model.safetensors` of 124M takes 548 MB, but its parameters only 498. It also
#    holds twelve tensors like `h.0.attn.bias`, of shape (1, 1, 1024, 1024), in float32. What are
#    these, and do they explain the difference?
# 3. Load our model with `attn.c_proj.weight` of both blocks transposed, the mistake of whoever
#    takes GPT-2 for a model made of PyTorch's `Linear`. Which of the checks in `fill` notices? What
#    would?
#
# ## Solutions
#
# **1.** A list of one entry, its length before it, its numbers after it.

# %%
listing = {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
text = json.dumps(listing).encode()
text += b" " * (-len(text) % 8)
by_hand = len(text).to_bytes(8, "little") + text + np.array([1, 2, 3], "<f4").tobytes()
print(safetensors.numpy.load(by_hand))
assert np.array_equal(safetensors.numpy.load(by_hand)["x"], [1, 2, 3])

# %% [markdown]
# **2.** They are the causal mask of lesson 5, once for each layer, a triangle of ones. They explain
# it to the last megabyte. Nobody needs to store them, and newer files do not.

# %%
masks = 12 * 1024 * 1024 * 4
print(f"{124_439_808 * 4 / 1e6:.0f} MB + {masks / 1e6:.0f} MB = ", end="")
print(f"{(124_439_808 * 4 + masks) / 1e6:.0f} MB")
assert round((124_439_808 * 4 + masks) / 1e6) == 548

old = {name.removeprefix("transformer."): tensor for name, tensor in library.items()}
old |= {f"h.{i}.attn.bias": np.tri(1024, dtype=np.float32)[None, None] for i in range(2)}
fill(other, old)  # an old file of our model: `fill` takes it

# %% [markdown]
# **3.** None of them: the names are right, and a square matrix has the same shape either way. Only
# the numbers that come out tell. So keep a few numbers of a model that is known to be right, and
# compare: that is what `load_gpt2.py` does at its end, with the ids that you saw above.

# %%
wrong = {n: t.T if n.endswith("attn.c_proj.weight") else t for n, t in library.items()}
fill(other, wrong)
with no_grad():
    difference = np.abs(other(ids).numpy() - model(ids).numpy()).max()
print("loaded without complaint, and the logits are wrong")
assert difference > 1e-3

workshop.cleanup()
