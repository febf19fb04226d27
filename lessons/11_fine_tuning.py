# %% [markdown]
# # 11. Fine-tuning
#
# **Afterwards you can** make a classifier out of a language model with a handful of labels, change
# how a model writes by training half a per cent of its numbers, and say what each way costs.
#
# **The idea.** To predict a text well, a model has to find out things that nobody told it about.
# **Fine-tuning** puts to use what it has found. A few examples are enough, for they need not teach
# the model anything new: they only say which of the things it knows is meant.

# %%
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np

from micrograd_gpt import Tensor, nn, no_grad, optim
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.tokenizers import WordTokenizer
from micrograd_gpt.tuning.batches import padded
from micrograd_gpt.tuning.classifier import GPT2Classifier, set_layers
from micrograd_gpt.tuning.lora import LoRALinear, add_lora, trained_parameters

# %% [markdown]
# ## A guest book
#
# At an inn there is a guest book. The guests are brief: *warm soup, quiet room*, or *sour bread*.
# And each of them is either pleased with everything or with nothing. Nobody has written down who
# was pleased; there are only the entries. Here are a thousand of them.

# %%
GOOD = ["lovely", "warm", "fresh", "sweet", "kind", "quiet", "bright", "rich"]
BAD = ["nasty", "cold", "stale", "sour", "rude", "noisy", "dim", "thin"]
THINGS = ["soup", "bread", "cake", "tea", "pie", "room", "bed", "lamp", "garden", "music"]
rng = np.random.default_rng(0)


def entry(words, fewest=3, most=5):
    """Three to five remarks, each one of these words and a thing, on a line of its own."""
    count = rng.integers(fewest, most + 1)
    return "\n" + " ".join(f"{rng.choice(words)} {rng.choice(THINGS)}" for _ in range(count))


book = [entry((BAD, GOOD)[rng.integers(2)]) for _ in range(1000)]
print(*book[:5])

tokenizer = WordTokenizer.from_text("".join(book))
SPACE, NEWLINE = (int(tokenizer.encode(mark)[0]) for mark in " \n")


def encode(text):
    """Ids of the words; the spaces between them say nothing, so we leave them out."""
    ids = tokenizer.encode(text)
    return ids[ids != SPACE]


# %% [markdown]
# ## First, a language model
#
# It is trained as in lesson 4 and lesson 7: predict the next word. Entries have different lengths,
# so the shorter ones are **padded** up to the longest. What stands in the padding must not be
# learned: a target of -100 does not count.


# %%
def inputs_and_targets(entries):
    """Ids (B, T), and what comes after each, up to the line's end: -100 in the padding."""
    texts = [np.append(encode(text), NEWLINE) for text in entries]
    inputs = padded([text[:-1] for text in texts])
    targets = np.full(inputs.shape, -100)
    for row, text in zip(targets, texts, strict=True):
        row[: len(text) - 1] = text[1:]
    return inputs, targets


def new_model():
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 16}
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, **shape))
    hold_in(model, "float64")  # 16 digits, so that it learns the same on every machine
    return model


STEPS = 200
model = new_model()
ids, targets = inputs_and_targets(book)
optimizer = optim.AdamW(model.parameters())
losses = []
for step in range(STEPS):
    optimizer.lr = optim.cosine_schedule(
        step, max_steps=STEPS, warmup_steps=10, learning_rate=2e-3, min_lr=2e-4
    )
    rows = rng.integers(0, len(book), 24)
    loss = model.loss(ids[rows], targets[rows])
    loss.backward()
    optim.clip_grad_norm(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

# %% [markdown]
# How low can the loss get? We wrote the book ourselves, so we can tell. An entry has four remarks
# on average. Each thing is one of ten, a surprise of $\ln 10$. The first word is one of sixteen,
# $\ln 16$. Where the entry ends is one of three, $\ln 3$. And each *later* word? For whoever has
# understood that a guest is pleased or is not, it is one of eight; for everyone else it is one of
# sixteen.

# %%
words = 2 * 4 + 1  # of an entry on average, its end included
always = math.log(16) + 4 * math.log(10) + math.log(3)
understood = (always + 3 * math.log(8)) / words
not_understood = (always + 3 * math.log(16)) / words

smooth = np.convolve(losses, np.ones(10) / 10, mode="valid")
plt.figure(figsize=(6, 3.2))
plt.plot(smooth)
plt.axhline(not_understood, color="gray", linestyle=":", label="moods not understood")
plt.axhline(understood, color="gray", linestyle="--", label="moods understood")
plt.ylim(2, 3)
plt.xlabel("step")
plt.ylabel("loss (nats per word)")
plt.legend()
plt.show()
print(f"at the end {smooth[-1]:.2f}, and nobody can have less than {understood:.2f}")
assert abs(np.mean(losses[-50:]) - understood) < 0.03

# %% [markdown]
# A model that knows the words, their order and their frequencies, and nothing about moods, cannot
# get below the upper line. This one passes it after some thirty steps, and ends on the lower one.
# So it has found out that there are two kinds of guests. Nobody had told it. *Predicting* was
# enough.
#
# ## What does it see at the end of an entry?
#
# At the end of an entry of three or four remarks, the model has to guess how it goes on. So by then
# it must have put the mood somewhere in its last vector. This vector has 64 numbers; the two
# directions in which the entries differ most make a picture of it. (They come from a singular value
# decomposition; here it is enough that it turns the cloud of points until its broadest side faces
# us.)


# %%
def last_vectors(model, entries):
    """What the head would read at the last word of each entry, (entries, C)."""
    texts = [encode(text) for text in entries]
    lengths = np.array([len(text) for text in texts])
    with no_grad():
        x = model.hidden(padded(texts)).numpy()  # (B, T, C)
    return x[np.arange(len(texts)), lengths - 1]


_, axes = plt.subplots(1, 2, figsize=(8, 3.6))
for axis, title, body in zip(
    axes, ("a new model", "the trained model"), (new_model(), model), strict=True
):
    for mood, color in ((GOOD, "tab:blue"), (BAD, "tab:orange")):
        entries = [entry(mood, most=4) for _ in range(150)]
        if mood is GOOD:
            cloud = last_vectors(body, book)
            broadest = np.linalg.svd(cloud - cloud.mean(0), full_matrices=False)[2][:2]
        x, y = broadest @ (last_vectors(body, entries) - cloud.mean(0)).T
        name = "pleased" if mood is GOOD else "not pleased"
        axis.scatter(x, y, s=8, color=color, label=name)
    axis.set(title=title, xticks=[], yticks=[])
axes[1].legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# In the new model, the two moods lie all over each other. In the trained one, they are apart, and a
# straight line could part them.
#
# ## A classifier: a new head
#
# That straight line is all we need. Take off the head that gives a score to each word of the
# vocabulary, and put on one that gives a score to each *label*. It reads the vector of the last
# word, which has seen all the others. Everything below it stays.

# %%
classifier = GPT2Classifier(model, ["not pleased", "pleased"])


def texts_and_lengths(entries):
    texts = [encode(text) for text in entries]
    return padded(texts), np.array([len(text) for text in texts])


some = book[:6]
by_hand = last_vectors(model, some) @ classifier.score.weight.numpy().T  # (6, C) @ (C, 2)
assert np.allclose(classifier(*texts_and_lengths(some)).numpy(), by_hand)
print("scores of six entries:", by_hand.shape)

# %% [markdown]
# Now we read eight entries ourselves, and label them. To make it hard, these eight contain only
# *three* of the eight words of each mood, and the test contains only the other five. So no word
# that it is tested on has ever had a label.


# %%
def labelled(count, words, fewest=3, most=4):
    """Entries and their labels, 0 or 1 in turn, made of these words of each mood."""
    labels = np.arange(count) % 2
    return [entry((BAD, GOOD)[label][words], fewest, most) for label in labels], labels


few, few_labels = labelled(8, slice(0, 3))
test, test_labels = labelled(400, slice(3, 8))


def copy_of(model):
    twin = new_model()
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.data[...] = q.data
    return twin


def fine_tune(body, which, lr, steps=30):
    """Teach the labels to a classifier on this body: the classifier, its accuracy on the test."""
    classifier = GPT2Classifier(body, ["not pleased", "pleased"])
    set_layers(classifier, which)
    optimizer = optim.AdamW(trained_parameters(classifier), lr=lr)
    for _ in range(steps):
        classifier.loss(*texts_and_lengths(few), few_labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with no_grad():
        given = classifier(*texts_and_lengths(test)).numpy().argmax(-1)
    return classifier, (given == test_labels).mean()


tuned, accuracy = {}, {}
for name, body, which, lr in (
    ("new model, all", new_model(), "all", 0.001),
    ("trained, the head alone", copy_of(model), "head", 0.01),
    ("trained, the last block", copy_of(model), "last", 0.001),
    ("trained, all", copy_of(model), "all", 0.001),
):
    tuned[name], accuracy[name] = fine_tune(body, which, lr)
    count = sum(p.size for p in trained_parameters(tuned[name]))
    print(f"{name:25} {count:7,} numbers trained, {accuracy[name]:4.0%} right")
assert accuracy["new model, all"] < 0.75
assert min(list(accuracy.values())[1:]) > 0.9

# %% [markdown]
# The new model learns the eight entries by heart, and on words without a label it can do little but
# guess. The trained model has seen eight labels and knows what is meant by all sixteen words,
# because *in its own mind* they were sorted already. 128 numbers are enough to read it off.
#
# So it is with real texts. GPT-2 has read forty gigabytes, and much of what makes a message spam,
# or a review a good one, is sorted in it before you show it the first label:
#
#     python finetune_gpt2.py classify --model 124M --data spam.tsv --out spam
#
# Real moods are not so neatly apart, so there it pays to let the last block learn, or all of them.
#
# ## Changing how a model writes
#
# The landlord has an idea: the model is to write the guest book from now on, and only praise. How
# does it write so far?

# %%
good, bad = (np.array([encode(word)[0] for word in mood]) for mood in (GOOD, BAD))


def habits(model):
    """Of 200 entries that the model writes: how many per cent of all its words of mood are praise,
    and how many of these are among the last five, of which the examples below have none."""
    start = np.full((200, 1), NEWLINE)
    written = model.generate(start, max_new_tokens=10, seed=0)
    praise, blame = np.isin(written, good).sum(), np.isin(written, bad).sum()
    others = np.isin(written, good[3:]).sum()
    return 100 * praise / (praise + blame), 100 * others / praise


before = habits(model)
print(f"praise {before[0]:.0f} %; of it, by the last five words {before[1]:.0f} %")

# %% [markdown]
# Half praise, half blame, and five of the eight words make five eighths of the praise. Now eight
# entries for it to learn from, which again use only three of the words. First we train *all*
# numbers, with the same loss as in the beginning.

# %%
examples = inputs_and_targets([entry(GOOD[:3]) for _ in range(8)])


def learn_praise(model, lr, steps=15):
    """Train what may be trained in the model on the examples."""
    optimizer = optim.AdamW(trained_parameters(model), lr=lr)
    for _ in range(steps):
        model.loss(*examples).backward()
        optimizer.step()
        optimizer.zero_grad()


whole = copy_of(model)
learn_praise(whole, lr=0.001)
after_all = habits(whole)
print(f"praise {after_all[0]:.0f} %; of it, by the last five words {after_all[1]:.0f} %")
assert after_all[0] > 85 and after_all[1] < 40

# %% [markdown]
# It has learned to praise, and it has forgotten words: five out of eight hardly occur any more. We
# gave it a hundred thousand numbers to move and eight lines to move them by, and it moved them in
# every way that fits the eight lines.
#
# ## LoRA: small changes
#
# What did the training *do* to a matrix $W$? Take the matrix after it, and subtract the one before.
# A singular value decomposition takes a matrix apart into simple pieces, each a column times a row,
# from the largest to the smallest. How much of the whole do the first few make up? (The measure is
# the sum of the squares of all numbers.)

# %%
name = "transformer.h.1.attn.c_attn.weight"  # queries, keys and values of the second block
old, new = (dict(m.named_parameters())[name].numpy() for m in (model, whole))
plt.figure(figsize=(6, 3))
shares = {}
for label, matrix in (("the matrix itself", old), ("what training changed in it", new - old)):
    sizes = np.linalg.svd(matrix, compute_uv=False)
    shares[label] = np.cumsum(sizes**2) / (sizes**2).sum()
    plt.plot(np.arange(1, 17), 100 * shares[label][:16], marker=".", label=label)
plt.xlabel("so many of the largest pieces")
plt.ylabel("per cent of the whole")
plt.ylim(0, 105)
plt.legend()
plt.show()
matrix_share, change_share = (share[3] for share in shares.values())
print(
    f"four of 64 pieces make up {matrix_share:.0%} of the matrix, {change_share:.0%} of the change"
)
assert change_share > 0.8 and matrix_share < 0.5

# %% [markdown]
# Of the 64 pieces of the change, a few do nearly everything. So what the training had to say was
# simple. **LoRA** (low-rank adaptation; Hu et al. 2021, arXiv:2106.09685) turns this around. It
# freezes $W$, and trains only a few pieces to add to it: a matrix $A$ with $r$ columns, and a
# matrix $B$ with $r$ rows. The layer then computes
#
# $$x W + b + \tfrac{\alpha}{r}\,(x A)\,B$$
#
# with $\alpha$ for scale. $A$ begins at random and $B$ at zero, so the model begins as it was.

# %%
plain = nn.Linear(64, 192)
lora = LoRALinear(plain, rank=2, alpha=4, draws=nn.Draws(0))
x = rng.standard_normal((5, 64)).astype(np.float32)
assert np.array_equal(lora(Tensor(x)).numpy(), plain(Tensor(x)).numpy())  # at the beginning

A, B = lora.lora_A, lora.lora_B  # (64, 2) and (2, 192)
B.data = rng.standard_normal(B.shape).astype(np.float32)  # as if it had learned something
W, b = plain.weight.numpy(), plain.bias.numpy()
by_hand = x @ W + b + 4 / 2 * (x @ A.numpy()) @ B.numpy()
assert np.allclose(lora(Tensor(x)).numpy(), by_hand, atol=1e-4)
print(f"W has {W.size:,} numbers, A and B have {A.size + B.size:,}")

# %% [markdown]
# Now the landlord's wish again. We add a single piece, $r = 1$, to each of the two `c_attn`, and
# train nothing else. An addition is worth nothing without the model that it is for. So we save that
# model first, and tell the addition where it is.

# %%
folder = TemporaryDirectory()  # it goes when Python ends
base, adapter = Path(folder.name, "base"), Path(folder.name, "adapter")
model.save_pretrained(base)

praising = copy_of(model)
add_lora(praising, rank=1, base=str(base))
count, total = (
    sum(p.size for p in ps) for ps in (trained_parameters(praising), model.parameters())
)
learn_praise(praising, lr=0.02, steps=10)
after_lora = habits(praising)
print(f"{count} numbers trained, {count / total:.1%} of them all")
print(f"praise {after_lora[0]:.0f} %; of it, by the last five words {after_lora[1]:.0f} %")
assert after_lora[0] > 80 and after_lora[1] > 50

# %% [markdown]
# It praises nearly as much, and it still has all its words. 512 numbers do not learn eight lines by
# heart in ten steps. What they can do is turn the one switch that the model had already: the mood.
#
# It also saves memory. AdamW keeps two more numbers for each that is trained (lesson 4), and
# gradients are kept for these alone. And a file with the additions is small: one model can be
# stored once, with an addition for each customer. When it is used, the piece is simply added to the
# matrix, $W + \frac{\alpha}{r} A B$, and no time is lost.

# %%
praising.save_pretrained(adapter)  # the additions alone
for path in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
    print(f"{path.name:26} {path.stat().st_size / 1000:4.0f} kB")

folded = GPT2.from_pretrained(adapter)  # a plain GPT2: its c_attn are W + α/r A B
assert not any("lora" in name for name, _ in folded.named_parameters())
ids = inputs_and_targets(book[:3])[0]
with no_grad():
    assert np.allclose(folded(ids).numpy(), praising(ids).numpy(), atol=1e-3)

# %% [markdown]
# The format of these files is that of PEFT, the library that most people use for LoRA, and each
# reads the other's. Let us check a number against it. PEFT reports that it trains 294,912 numbers
# in GPT-2 of 124M, by rank 8 on `c_attn`.

# %%
large = GPT2(GPT2Config(), init=lambda shape, std: np.zeros(shape, np.float32, order="F"))
add_lora(large, rank=8)
trained = sum(p.size for p in trained_parameters(large))
print(f"{trained:,} of {sum(p.size for p in large.parameters()):,}")
assert trained == 294_912 == 12 * 8 * (768 + 3 * 768)
del large

# %% [markdown]
# In real life, this is
#
#     python finetune_gpt2.py classify --model 124M --data spam.tsv --out spam --lora-rank 8
#
# and `docs/fine_tuning.md`, `docs/instructions.md` and `docs/lora.md` say more.
#
# When to take what? Begin with the head: it costs nothing, and shows what the model knows already.
# LoRA is for little data or little memory. Train everything if you have many examples, and they are
# unlike what the model has read.
#
# **Read next:** [`tuning/classifier.py`](../micrograd_gpt/tuning/classifier.py), then
# [`tuning/lora.py`](../micrograd_gpt/tuning/lora.py) up to `LoRALinear`, and
# [`finetune_gpt2.py`](../finetune_gpt2.py), which is the training script with examples in place of
# a text.
#
# ## Exercises
#
# 1. Let the classifier read the *first* token of each entry in place of the last. How many does it
#    get right, and why?
# 2. $B$ begins at zero. What would happen if $A$ began at zero as well? Look at their gradients.
# 3. The praising model never quite stops blaming. Predict what happens to its praise and its words
#    if it goes on learning for 100 steps, and try it.
#
# ## Solutions
#
# **1.** Half of them, as by guessing. The mask lets no token see what comes after it, and the first
# one, the new line, is the same in every entry: so all get the same label. If a classifier is no
# better than chance, look at the place that it reads. In a padded batch it is easily the padding.

# %%
ids, lengths = texts_and_lengths(test)
with no_grad():
    given = tuned["trained, all"](ids, np.ones_like(lengths)).numpy().argmax(-1)
print(f"{(given == test_labels).mean():.0%} right")
assert (given == test_labels).mean() == 0.5

# %% [markdown]
# **2.** Nothing would happen, ever. The gradient of $A$ is multiplied by $B$, and that of $B$ by
# $A$ (lesson 2: the backward of a matrix product). If both are zero, so are both gradients. If only
# one is, that one gets a gradient, moves, and then the other learns too.

# %%
for start_of_A in ("random", "zero"):
    layer = LoRALinear(plain, rank=2, alpha=4, draws=nn.Draws(0))
    if start_of_A == "zero":
        layer.lora_A.data = np.zeros((64, 2), np.float32)
    layer(Tensor(x)).sum().backward()
    moved = {name: bool(np.any(getattr(layer, name).grad)) for name in ("lora_A", "lora_B")}
    print(f"A begins {start_of_A}: has it a gradient? {moved}")
    assert moved == {"lora_A": False, "lora_B": start_of_A == "random"}

# %% [markdown]
# **3.** Even one piece learns by heart if it has the time: words that the examples lack become
# rarer. Few numbers make it harder to forget, and stopping early does the rest. `finetune_gpt2.py`
# therefore measures on examples that it does not learn from, and keeps the best.

# %%
learn_praise(praising, lr=0.02, steps=100)
longer = habits(praising)
print(f"praise about {round(longer[0], -1):.0f} %; of it, by the last five words, less than before")
assert longer[1] < after_lora[1] - 5
