# %% [markdown]
# # 4. A bigram model, trained
#
# **Afterwards you can** train a language model, say what its loss and its perplexity mean, know how
# low the loss can get, and draw a first text from it.
#
# **The idea.** A language model does one thing: given what came before, it gives each token of the
# vocabulary a *probability* to come next. The smallest one looks only at the last token, and is
# nothing but a table. Yet its training is, line for line, the training of GPT-2.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from micrograd_gpt import layers, nn, no_grad, optim
from micrograd_gpt.text.tokenizers import CharTokenizer

HERE = Path(__file__).parent if "__file__" in globals() else Path()  # a notebook runs in its folder
story = (HERE / "story.txt").read_text("utf-8")
tokenizer = CharTokenizer.from_text(story)
ids = tokenizer.encode(story)
inputs, targets = ids[:-1], ids[1:]  # after each character comes the next
V = tokenizer.vocab_size
print(f"{len(inputs)} pairs of neighbours, {V} different characters")

# %% [markdown]
# ## From scores to probabilities
#
# The model is a table with a row for each character: how much, after this one, does it favour each
# character as the next? These scores are called **logits**. They may be any numbers. *Softmax*
# makes probabilities of them: `exp` makes them positive, and dividing by their sum makes them add
# up to 1.
#
# In the package, an `nn.Parameter` is a `Tensor` that is to be learned, an `nn.Module` knows the
# parameters among its attributes, and `layers` has what models compute. `layers.embedding` picks
# rows of a table (lesson 2, exercise 2).


# %%
class Bigram(nn.Module):
    """Logits of the next token, from the last one alone."""

    def __init__(self, vocab_size):
        zeros = np.zeros((vocab_size, vocab_size), np.float32)
        self.table = nn.Parameter(zeros)  # row: what was last; column: what may come next

    def __call__(self, ids):
        return layers.embedding(ids, self.table)  # (…) -> (…, V): the rows of these ids

    def loss(self, ids, targets):
        return layers.cross_entropy(self(ids), targets)


model = Bigram(V)
probabilities = layers.softmax(model(inputs[:1])).numpy()[0]
print(f"before training, every character has the probability 1/{V} = {probabilities[0]:.4f}")
assert np.allclose(probabilities, 1 / V)

# %% [markdown]
# ## The loss: how surprised was the model?
#
# Now let the text speak. At each place, look up the probability that the model gave to the
# character that really came. A good model gives it a high one. We measure the *surprise*, $-\ln p$:
# zero for $p = 1$, and the larger the smaller $p$ is. Its mean over the text is the
# **cross-entropy**, the loss of every language model. With the natural logarithm, it is counted in
# *nats*.
#
# The **perplexity**, $e^{\text{loss}}$, says the same in a way that one can imagine: the model is
# as unsure as if it had to choose among so many equally likely tokens. Before training, that is all
# of them.

# %%
with no_grad():  # looking only: no tape is needed
    loss = model.loss(inputs, targets).item()
print(f"loss {loss:.3f} nats, perplexity {math.exp(loss):.1f}")
assert math.isclose(loss, math.log(V), rel_tol=1e-5)

# %% [markdown]
# This is a test that is worth keeping for life: an untrained model with a vocabulary of $V$ must
# start at a loss of about $\ln V$. For GPT-2 that is $\ln 50257 = 10.8$. A run that starts
# elsewhere has a mistake in it.
#
# ## The gradient of the loss
#
# It has a beautiful form: *what the model said, minus what came*. For the logits of one place, the
# gradient is the vector of the probabilities, with 1 taken off at the character that came. Every
# character that did not come is pushed down by as much as was wrongly given to it.
#
# School calculus is enough to see it. With the logits $z_j$, and $c$ for the character that came,
# the surprise is $-\ln \left(e^{z_c} / \sum_j e^{z_j}\right) = \ln \sum_j e^{z_j} - z_c$. The slope
# of the first term towards $z_i$ is $e^{z_i} / \sum_j e^{z_j}$, the probability; that of $-z_c$ is
# −1, for $i = c$ only. The tape agrees:

# %%
with no_grad():
    expected = layers.softmax(model(inputs)).numpy()  # (N, V) for N pairs
expected[np.arange(len(targets)), targets] -= 1  # in each row, at the column of its target
expected /= len(targets)  # the loss is a mean

logits = layers.embedding(inputs, model.table)
logits_alone = nn.Parameter(logits.numpy().copy())  # a leaf, so that we can see its gradient
layers.cross_entropy(logits_alone, targets).backward()
assert np.allclose(logits_alone.grad, expected, atol=1e-8)
print("the gradient is probabilities minus what came")

# %% [markdown]
# ## How low can it get?
#
# For this small model we know the answer before we train. The best table says, in each row, how
# often each character *did* follow: then what the model says, minus what came, adds up to zero over
# the text, and no slope is left to go down. Count, divide, and measure the surprise:

# %%
counts = np.zeros((V, V))
np.add.at(counts, (inputs, targets), 1)
best = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # (V, V), each row adds up to 1
floor = -np.log(best[inputs, targets]).mean()
print(f"no bigram model can have a loss below {floor:.3f} on this text")

# %% [markdown]
# Why train, then, if one can count? Because counting stops here. To look at the last *two*
# characters, the table needs $V^2$ rows; for ten, six thousand million million, nearly all of them
# empty. GPT-2 looks at 1024 tokens. It computes its logits instead of looking them up, and what it
# computes with can only be found by following the gradient. So let us practise that where we know
# the right answer.
#
# ## Training
#
# Each step: the loss, the walk back, a small move. Lesson 1 moved each number by its gradient times
# the learning rate, `lr`. **AdamW**, which trains nearly all language models, is wiser in two ways.
#
# - It moves by a running mean of the gradients, `m`, in which noise cancels out.
# - It divides that by the usual *size* of the gradients of this number, the root of a running mean
#   of their squares, `v`. So each number moves by about `lr` in each step, whether its gradients
#   are large or tiny. Rare characters learn as fast as frequent ones.
#
# (The W is for *weight decay*: each step also pulls large weights a little towards zero. Our table
# is to match the counts exactly, so we turn that off.)

# %%
optimizer = optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
losses = []
for _ in range(300):
    loss = model.loss(inputs, targets)
    loss.backward()
    optimizer.step()  # moves every parameter
    optimizer.zero_grad()  # or the next gradients would be added to these
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, perplexity {math.exp(losses[-1]):.1f}")

plt.figure(figsize=(6, 3.2))
plt.plot(losses, label="AdamW")
plt.axhline(math.log(V), color="gray", linestyle=":", label="knowing nothing: ln V")
plt.axhline(floor, color="gray", linestyle="--", label="the best there is: counting")
plt.xlabel("step")
plt.ylabel("loss (nats per character)")
plt.ylim(0)
plt.legend()
plt.show()
assert floor <= losses[-1] < floor + 0.02

# %% [markdown]
# It found, by its gradients alone, what counting finds. Look at both tables. Dark means likely. In
# this tale, `j` is always followed by `u` and `v` by `e`, and a comma mostly by a space.

# %%
with no_grad():
    learned = layers.softmax(model(np.arange(V))).numpy()  # (V, V)
figure, axes = plt.subplots(1, 2, figsize=(10, 5.2))
names = [{" ": "␣", "\n": "↵"}.get(c, c) for c in tokenizer.vocabulary]
for axis, table, title in zip(axes, (best, learned), ("counted", "learned"), strict=True):
    axis.imshow(table, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="next character", ylabel="last character", title=title)
    axis.set_xticks(range(V), names, fontsize=7)
    axis.set_yticks(range(V), names, fontsize=7)
plt.tight_layout()
plt.show()
often = counts.sum(1) >= 20  # where there is enough to learn from
print(f"largest difference, in rows of 20 pairs or more: {np.abs(best - learned)[often].max():.2f}")
assert np.abs(best - learned)[often].max() < 0.03

# %% [markdown]
# ## The first text
#
# To write, draw a character by its probabilities, append it, and go on from there.


# %%
def write(model, length, seed):
    rng = np.random.default_rng(seed)
    written = [int(tokenizer.encode("\n")[0])]
    for _ in range(length):
        with no_grad():
            p = layers.softmax(model(np.array(written[-1:]))).numpy()[0].astype(np.float64)
        written.append(int(rng.choice(V, p=p / p.sum())))  # 1 in all 16 digits, not only in 7
    return tokenizer.decode(written).strip()


print(write(Bigram(V), 120, seed=1), "\n\n… and after training …\n")
print(write(model, 240, seed=1))

# %% [markdown]
# From noise to something that sounds like English heard through a wall. The words have about the
# right length; `th` and `an` come often. More cannot be asked of a model that has forgotten
# everything but the last character. What is missing is a way to look back: *attention*, the next
# lesson.
#
# **Read next:** `embedding`, `linear`, `softmax`, `log_softmax` and `cross_entropy` in
# [`layers.py`](../micrograd_gpt/layers.py), and `adamw_update` in
# [`optim.py`](../micrograd_gpt/optim.py), where AdamW is seven lines.
#
# ## Exercises
#
# 1. By hand: three characters came, to which the model had given the probabilities ½, ¼ and ¼. What
#    are the loss and the perplexity?
# 2. Train by 300 plain steps (`p.data -= lr * p.grad`) instead of AdamW's, with an `lr` of 1, of 10
#    and of 100. Where does each end up? (To forget a gradient, set `p.grad = None`.)
# 3. Split the tale: train on the first 90 %, and measure on the last 10 % every step. Does the loss
#    there keep falling too? What goes wrong, and which table would be better than the counted one?
#
# ## Solutions
#
# **1.** The surprises are $\ln 2$, $2 \ln 2$ and $2 \ln 2$; their mean is $\frac53 \ln 2 ≈ 1.155$.
# The perplexity is $2^{5/3} ≈ 3.17$.

# %%
logits = np.log([[0.5, 0.25, 0.25]] * 3).astype(np.float32)
loss = layers.cross_entropy(nn.Parameter(logits), [0, 1, 2]).item()
print(f"{loss:.3f} nats, perplexity {math.exp(loss):.2f}")
assert math.isclose(loss, 5 / 3 * math.log(2), rel_tol=1e-6)

# %% [markdown]
# **2.** A larger step is better for a long while, since the gradients of rare characters are tiny.
# From 10 to 100 nothing is gained: the rows of frequent characters then jump to and fro. AdamW,
# whose steps fit each number, comes closest.

# %%
for lr in (1, 10, 100):
    plain = Bigram(V)
    for _ in range(300):
        loss = plain.loss(inputs, targets)
        loss.backward()
        plain.table.data -= lr * plain.table.grad
        plain.table.grad = None
    print(f"lr {lr:3}: loss {loss.item():.1f}")
print(f"AdamW : loss {losses[-1]:.1f}, and the floor is {floor:.1f}")

# %% [markdown]
# **3.** It falls, turns, and rises, while the training loss still falls. This is *overfitting*: a
# pair that the first part happens not to have gets a probability near 0, and when it does come, the
# surprise is enormous. The counted table is the extreme of it: it gives such a pair a probability
# of exactly 0, and its loss is infinite. Better is a table that keeps a little for everything, such
# as the counts plus a tenth. Stopping at the lowest point helps as well; `train_gpt2.py` keeps the
# model of that moment in `out/best/`.

# %%
split = int(0.9 * len(inputs))
partial = Bigram(V)
optimizer = optim.AdamW(partial.parameters(), lr=0.1, weight_decay=0.0)
trained, held_out = [], []
for _ in range(600):
    loss = partial.loss(inputs[:split], targets[:split])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with no_grad():
        held_out.append(partial.loss(inputs[split:], targets[split:]).item())
    trained.append(loss.item())
print(f"training {trained[-1]:.2f}, held out {held_out[-1]:.2f}, its lowest {min(held_out):.2f}")

counted = np.zeros((V, V))
np.add.at(counted, (inputs[:split], targets[:split]), 1)
for more in (0.0, 0.1):
    table = (counted + more) / (counted + more).sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        smoothed = -np.log(table[inputs[split:], targets[split:]]).mean()
    print(f"held out, with counts plus {more}: {smoothed:.2f}")

plt.figure(figsize=(6, 3))
plt.plot(trained, label="trained on")
plt.plot(held_out, label="held out")
plt.axvline(int(np.argmin(held_out)), color="gray", linestyle=":", label="stop here")
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()
assert min(held_out) < held_out[-1] - 0.05 and smoothed < held_out[-1]
