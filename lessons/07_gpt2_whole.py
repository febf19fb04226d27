# %% [markdown]
# # 7. GPT-2 whole
#
# **Afterwards you can** say where GPT-2's 124 million parameters are, follow one prompt through
# every line of the model with the shape of everything in mind, and watch a prediction take form
# from layer to layer.
#
# **The idea.** You have all the parts: tokens, embeddings, attention, the block, softmax. GPT-2 is
# these parts in a row, and no more. There is no secret left, only sizes.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import load_file

import micrograd_gpt
from micrograd_gpt import layers, no_grad, optim
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.generation.ten_lines import sample
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.text.windows import Windows

HERE = Path(__file__).parent if "__file__" in globals() else Path()  # a notebook runs in its folder
story = (HERE / "story.txt").read_text("utf-8")
tokenizer = CharTokenizer.from_text(story)

# %% [markdown]
# ## Counting parameters
#
# With $C$ channels, a block has these matrices and vectors (each matrix with its bias):
#
# | part | shape | numbers |
# | --- | --- | --- |
# | `ln_1`, `ln_2` | twice a weight and a bias of $C$ | $4C$ |
# | `attn.c_attn` (queries, keys, values) | $(C, 3C)$ and $3C$ | $3C^2 + 3C$ |
# | `attn.c_proj` | $(C, C)$ and $C$ | $C^2 + C$ |
# | `mlp.c_fc` | $(C, 4C)$ and $4C$ | $4C^2 + 4C$ |
# | `mlp.c_proj` | $(4C, C)$ and $C$ | $4C^2 + C$ |
#
# That is $12C^2 + 13C$. Around the blocks there are the table of tokens `wte` ($V \times C$), that
# of places `wpe` ($1024 \times C$), and the last norm ($2C$). The head costs nothing: it is `wte`
# again.


# %%
def count(n_layer, C, V=50257, n_positions=1024):
    """The parameters by part."""
    return {
        "token table": V * C,
        "place table": n_positions * C,
        "attention": n_layer * (4 * C * C + 4 * C),
        "MLP": n_layer * (8 * C * C + 5 * C),
        "norms": n_layer * 4 * C + 2 * C,
    }


sizes = {
    "124M": (12, 768, 124_439_808),
    "355M": (24, 1024, 354_823_168),
    "774M": (36, 1280, 774_030_080),
    "1558M": (48, 1600, 1_557_611_200),
}
for name, (n_layer, C, published) in sizes.items():
    total = sum(count(n_layer, C).values())
    print(f"{name:>5}: {total:13,}")
    assert total == published

# A model of zeros is enough to count on: the operating system gives zeros without taking memory, as
# long as nobody copies them. (Hence order="F": column by column, as the model keeps its matrices.)
whole = GPT2(GPT2Config(), init=lambda shape, std: np.zeros(shape, np.float32, order="F"))
assert sum(p.size for p in whole.parameters()) == 124_439_808
del whole

# %%
_, axis = plt.subplots(figsize=(7, 2.6))
left = np.zeros(len(sizes))
for part in count(1, 1):
    share = [100 * count(n_layer, C)[part] / published for n_layer, C, published in sizes.values()]
    axis.barh(list(sizes), share, left=left, label=part)
    left += share
axis.invert_yaxis()
axis.set_xlabel("per cent of all parameters")
axis.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1), fontsize=8, frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# In the smallest model, nearly a third of all numbers is the token table; in the largest, a
# twentieth. The MLPs always have twice as much as attention. And the norms, which decided over
# success and failure in lesson 6, are so few that you cannot see their bar.
#
# ## A model to look into
#
# A GPT-2 of three blocks, trained on our tale for a moment. It is GPT-2 in everything but size and
# its tokens, which are characters: what you see below is what happens in the large ones.

# %%
config = GPT2Config(n_layer=3, n_head=4, n_embd=64, vocab_size=tokenizer.vocab_size, n_positions=32)
model = GPT2(config)
hold_in(model, "float64")  # 16 digits, so that it writes the same text on every machine
windows = Windows(tokenizer.encode(story), 32, stride=1)
optimizer = optim.AdamW(model.parameters(), lr=3e-3)
for step in range(300):
    loss = model.loss(*windows.batch(0, step, 16))
    loss.backward()
    optim.clip_grad_norm(model.parameters(), 1.0)  # shortens gradients that are too long (lesson 8)
    optimizer.step()
    optimizer.zero_grad()
print(f"{sum(p.size for p in model.parameters()):,} parameters, loss {loss.item():.1f}")
assert loss.item() < 1.3

# %% [markdown]
# ## One prompt through all of it
#
# Here is the whole model on one screen, from ids to logits, with nothing but the package's layers.
# Read it beside `gpt2.py`, where the same lines stand in the modules' `__call__`.


# %%
def forward(model, ids, told=lambda name, x: None):
    """Logits (B, T, V) of ids (B, T); `told` is called with each step's name and result."""
    parameter = dict(model.named_parameters())
    n_layer, H, C = model.config.n_layer, model.config.n_head, model.config.n_embd
    B, T = ids.shape

    def linear(x, name):
        return layers.linear(x, parameter[f"{name}.weight"], parameter[f"{name}.bias"])

    def norm(x, name):
        return layers.layer_norm(x, parameter[f"{name}.weight"], parameter[f"{name}.bias"])

    wte, wpe = parameter["transformer.wte.weight"], parameter["transformer.wpe.weight"]
    tokens = layers.embedding(ids, wte)
    told("each token's vector", tokens)
    places = layers.embedding(np.arange(T), wpe)
    told("each place's vector", places)
    x = tokens + places
    told("the residual stream", x)
    for i in range(n_layer):
        block = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        told(f"block {i}: queries, keys and values", qkv)
        heads = layers.self_attention(qkv.reshape(B, T, 3, H, C // H))
        told(f"block {i}: what each head found", heads)
        x = x + linear(heads.reshape(B, T, C), f"{block}.attn.c_proj")
        hidden = layers.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        told(f"block {i}: inside the MLP", hidden)
        x = x + linear(hidden, f"{block}.mlp.c_proj")
        told(f"block {i}: the stream after it", x)
    x = norm(x, "transformer.ln_f")
    logits = layers.linear(x, wte.T)  # each token's logit: how well its own vector fits
    told("logits", logits)
    return logits


prompt = "The fox went down the"
ids = tokenizer.encode(prompt)[None]  # (1, T): a batch of one text
print(f"{prompt!r} -> ids of shape {ids.shape}")
with no_grad():
    logits = forward(model, ids, lambda name, x: print(f"{name:35} {x.shape}"))
    assert np.allclose(logits.numpy(), model(ids).numpy(), atol=1e-4)
p = layers.softmax(logits).numpy()[0, -1]
best = np.argsort(-p)[:3]
print("next:", ", ".join(f"{tokenizer.decode([i])!r} {p[i]:.0%}" for i in best))
assert tokenizer.decode(best[:1]) == " "

# %% [markdown]
# The stream has the same shape, (B, T, C), from the embeddings to the last norm. This is what makes
# it possible to stack as many blocks as one likes.
#
# ## Is it GPT-2?
#
# That our lines equal this package's shows little: both could be wrong in the same way. The
# repository keeps numbers that *Hugging Face's Transformers* has computed, on PyTorch, for a small
# GPT-2 with random weights. We load these weights by their names, and compare the logits.

# %%
repository = Path(micrograd_gpt.__file__).parents[1]
reference = load_file(repository / "tests" / "data" / "gpt2_reference.safetensors")
theirs = GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=67, n_positions=16))
for name, parameter in theirs.named_parameters():
    parameter.data[...] = reference[f"weight.{name}"]

with no_grad():
    ours = forward(theirs, reference["inputs"][0]).numpy()  # (3, 16, 67)
error = np.abs(ours - reference["logits"]).max() / np.abs(reference["logits"]).max()
print(f"{ours.size} logits; all equal to within a hundred-thousandth")
assert error < 1e-5

# %% [markdown]
# ## Watching a prediction take form
#
# Since the stream keeps its shape, we may stop after any block, apply the last norm and the head,
# and ask: *what would you say now?* This is called the **logit lens**. A row for each stop; in each
# cell the character that the model would put next, the darker the surer it is.

# %%
stops = {}


def keep(name, x):
    if "stream" in name:
        stops[name.removesuffix(": the stream after it")] = x


text = "The fox went down the hill and"
ids = tokenizer.encode(text)[None]
ln_f, wte = model.transformer.ln_f, model.transformer.wte.weight
with no_grad():
    forward(model, ids, keep)
    says = [layers.softmax(layers.linear(ln_f(x), wte.T)).numpy()[0] for x in stops.values()]
sure = np.stack([p.max(-1) for p in says])  # (stops, T)
choice = np.stack([p.argmax(-1) for p in says])


def visible(character):
    return {" ": "␣", "\n": "↵"}.get(character, character)


_, axis = plt.subplots(figsize=(10, 2.4))
axis.imshow(sure, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for (row, column), token_id in np.ndenumerate(choice):
    color = "white" if sure[row, column] > 0.6 else "black"
    character = visible(tokenizer.decode([token_id]))
    axis.text(column, row, character, ha="center", va="center", color=color)
axis.set_xticks(range(len(text)), [visible(c) for c in text])
axis.set_yticks(range(len(stops)), ["embedding", *(f"after {name}" for name in list(stops)[1:])])
axis.set_xlabel("what it has read so far; in the cells, what it expects next")
plt.tight_layout()
plt.show()

right = [int((row[:-1] == ids[0, 1:]).sum()) for row in choice]
print(f"right, of the {len(text) - 1} characters that came next: {right[0]} from the embedding,")
print("and after each block", *right[1:])
assert right[-1] > 15 and right[-1] > right[0] + 10

# %% [markdown]
# Read a column from top to bottom. From the embedding alone, the model can only repeat what it has
# just read: of all the vectors in the table, a token's own fits it best. The blocks turn what *was*
# into what *comes*. The beginnings of words stay unsure to the end, and rightly so: after "The ",
# the tale may go on in many ways.
#
# ## Writing
#
# `generation/ten_lines.py` is the loop of lesson 4, for a model that looks back: compute the logits
# of the last place, draw, append, repeat. (A temperature below 1 makes likely characters likelier.)

# %%
start = tokenizer.encode("The fox")[None]
print(tokenizer.decode(sample(model, start, 150, temperature=0.7, seed=1)[0]))

# %% [markdown]
# After a moment with one page of text, it spells some words and knows what the tale is about. With
# 124 million parameters and forty gigabytes of text, the same lines become GPT-2.
#
# **Read next:** [`gpt2.py`](../micrograd_gpt/gpt2.py), the whole model, and
# [`generation/ten_lines.py`](../micrograd_gpt/generation/ten_lines.py).
#
# ## Exercises
#
# 1. Each number of a matrix is used for one product and one sum for each token. (The two tables are
#    only looked up, but that of the tokens serves as the head as well.) How many operations is that
#    for a token of 124M? How much memory do its parameters take in `float32`, of four bytes each?
# 2. How many parameters would 124M have if its head were a matrix of its own?
# 3. Change the last character of a text. Which logits change, and which must not? Check it: this
#    test finds a forgotten mask in any model.
#
# ## Solutions
#
# **1.** Two operations, a product and a sum, for each number in the blocks and in the head. (The
# dot products between queries and keys come on top, and grow with the length of the text.)

# %%
parts = count(12, 768)
multiplied = parts["attention"] + parts["MLP"] + parts["token table"]  # as the head
print(f"{2 * multiplied / 1e9:.2f} billion operations a token, {124_439_808 * 4 / 1e6:.0f} MB")
assert math.isclose(2 * multiplied, 0.247e9, rel_tol=0.01)

# %% [markdown]
# **2.** One more table of tokens: a third more.

# %%
print(f"{124_439_808 + 50257 * 768:,}")
assert 124_439_808 + 50257 * 768 == 163_037_184

# %% [markdown]
# **3.** Only those of the last place. All others have not seen it.

# %%
changed = ids.copy()
changed[0, -1] = tokenizer.encode("x")[0]
with no_grad():
    before, after = model(ids).numpy(), model(changed).numpy()
assert np.allclose(before[:, :-1], after[:, :-1], atol=1e-5)
assert not np.allclose(before[:, -1], after[:, -1], atol=0.1)
print("nobody has looked ahead")
