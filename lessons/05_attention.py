# %% [markdown]
# # 5. Attention in five steps
#
# **Afterwards you can** build causal attention with many heads from a dot product up, read a
# picture of it, and say what queries, keys and values are for.
#
# **The idea.** The bigram model forgot everything but the last token. Attention lets each token
# look back at all that came before and take, from each, as much as it finds useful: a **weighted
# mean**, whose weights are computed from the tokens themselves.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np

from micrograd_gpt import Tensor, functional, layers
from micrograd_gpt.tensor import where

# %% [markdown]
# In a model, each token is a vector of hundreds of learned numbers. For this lesson we choose them,
# so that we can see what happens: five numbers a word, each with a meaning. We write T for how many
# words there are, here 8, and C for how many numbers ("channels") each has, here 5.

# %%
words = ["the", "fox", "saw", "a", "lamp", "and", "it", "shone"]
features = ["animal", "thing", "action", "pronoun", "small word"]
x = np.array(
    [
        [0, 0, 0, 0, 1],  # the
        [1, 0, 0, 0, 0],  # fox
        [0, 0, 1, 0, 0],  # saw
        [0, 0, 0, 0, 1],  # a
        [0, 1, 0, 0, 0],  # lamp
        [0, 0, 0, 0, 1],  # and
        [0, 0, 0, 1, 0],  # it
        [0, 0, 1, 0, 0],  # shone
    ],
    float,
)  # (T, C)


def draw(*tables):
    """Pairs of a title and a matrix, side by side; a row for each word, blank where about 0."""
    _, axes = plt.subplots(1, len(tables), figsize=(3.6 * len(tables), 3.6), squeeze=False)
    for axis, (title, table) in zip(axes[0], tables, strict=True):
        names = words if table.shape[1] == len(words) else features
        axis.imshow(np.where(np.isfinite(table), table, np.nan), cmap="Blues", vmin=0)
        for (row, column), value in np.ndenumerate(table):
            text = f"{value:.1f}" if value >= 0.05 else ""
            text = "−∞" if value == -np.inf else text
            dark = value > 0.6 * table.max()
            color = "white" if dark else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axis.set_yticks(range(len(words)), words)
        axis.set_title(title, fontsize=10)
    plt.tight_layout()
    plt.show()


# %% [markdown]
# ## Step 1: dot products, or how alike are two words?
#
# The dot product of two vectors multiplies them element by element and adds up. It is large where
# both are large in the same places. `x @ x.T` has the dot products of every word with every word: a
# row for the word that looks, a column for the word that it looks at.

# %%
alike = x @ x.T  # (T, T)
draw(("the words, x", x), ("how alike: x @ x.T", alike))
assert alike[words.index("saw"), words.index("shone")] == 1
assert alike[words.index("fox"), words.index("lamp")] == 0

# %% [markdown]
# ## Step 2: softmax, or scores become shares
#
# We want a weighted mean, so the weights of each row have to be positive and add up to 1. That is
# softmax again, which lesson 4 used for probabilities. (The scores are multiplied by 3 first, so
# that one sees the preference.)


# %%
def softmax(scores):
    exp = np.exp(scores - scores.max(-1, keepdims=True))  # at most 1, so that nothing overflows;
    return exp / exp.sum(-1, keepdims=True)  # what was taken off cancels out in the quotient


shares = softmax(3 * alike)
mixed = shares @ x  # (T, T) @ (T, C): each row a weighted mean of all words' vectors
draw(("shares: softmax(3 × scores)", shares), ("weighted means: shares @ x", mixed))
assert np.allclose(shares.sum(-1), 1)

# %% [markdown]
# Each word has now taken up something of the words that are *like itself*. That is not much use.
# When we read "it", we do not look for another "it". We look for a *thing*.
#
# ## Step 3: queries, keys and values
#
# So every word gets three vectors in place of one, each by a matrix product:
#
# - its **query** says what it is looking for;
# - its **key** says what it offers to those who look;
# - its **value** is what it hands over to those who found it.
#
# A score is the dot product of one word's query with another's key. In a model, the three matrices
# are learned. We write ours by hand: a pronoun asks for a thing, and an action asks who did it.

# %%
ANIMAL, THING, ACTION, PRONOUN, SMALL = range(5)
w_query = np.zeros((5, 5))
w_query[PRONOUN, THING] = 10  # a pronoun looks for things
w_query[ACTION, ANIMAL] = w_query[ACTION, THING] = 10  # an action looks for whoever did it
w_key = np.eye(5)  # x @ np.eye(5) is x: each word offers what it is
w_value = np.eye(5)  # and hands over what it is

query, key, value = x @ w_query, x @ w_key, x @ w_value  # each (T, D), here D = 5
scores = query @ key.T / math.sqrt(5)
shares = softmax(scores)
draw(("scores: q @ k.T / √D", scores), ("shares", shares), ("shares @ v", shares @ value))
assert shares[words.index("it"), words.index("lamp")] > 0.9

# %% [markdown]
# Look at the row of "it": it has found the lamp, and is itself a thing now. A word that looks for
# nothing, as "the", has equal scores for all, and takes the plain mean.
#
# Why divide by $\sqrt D$? A dot product adds up $D$ terms. If these are random, of either sign,
# most of them cancel, and the sum is about $\sqrt D$ in size. Without the division, wide vectors
# would make large scores, and softmax would give everything to one word and no gradient to the
# others (exercise 2).
#
# ## Step 4: the causal mask, or no looking ahead
#
# "saw" has found the fox *and the lamp*. But a model that is to predict the next word must not see
# the words to come. (If it did, it would learn nothing but to peek.) So every score for a later
# word is set to minus infinity before the softmax, and $e^{-\infty}$ is a share of exactly 0.

# %%
may_look = np.tri(len(words), dtype=bool)  # row: who looks; true up to its own place
masked = np.where(may_look, scores, -np.inf)
shares = softmax(masked)
draw(("scores, masked", masked), ("shares", shares), ("shares @ v", shares @ value))
saw, fox, lamp = (words.index(word) for word in ("saw", "fox", "lamp"))
assert shares[saw, lamp] == 0 and shares[saw, fox] > 0.9

# %% [markdown]
# The triangle brings a second gift: each row now knows only its own word and those before, so every
# row can be trained to predict its next word. A text of 1024 tokens is 1024 exercises at once.
#
# ## Step 5: many heads, or several questions at a time
#
# At its own place, "shone" asks *who acts?*, and both the fox and the lamp answer. One weighted
# mean has to serve all questions. So the model does the whole thing several times, in **heads**
# with their own queries, keys and values, and puts their results side by side. Ours: head 1 asks
# "what does the pronoun stand for?", head 2 asks "which animal acts?"

# %%
w_query_1, w_query_2 = np.zeros((5, 5)), np.zeros((5, 5))
w_query_1[PRONOUN, THING] = 10
w_query_2[ACTION, ANIMAL] = 10


def attend(query, key, value):
    """Steps 1 to 4, with any number of axes in front: (…, T, D) -> (…, T, D), and the shares."""
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])  # as key.T, of each head
    may_look = np.tri(query.shape[-2], dtype=bool)
    shares = softmax(np.where(may_look, scores, -np.inf))
    return shares @ value, shares


queries = np.stack([x @ w_query_1, x @ w_query_2])  # (H, T, D): heads are one more axis in front
keys = values = np.stack([x, x])
out, shares = attend(queries, keys, values)
side_by_side = np.concatenate(list(out), axis=-1)  # (T, H × D)
draw(("head 1: pronoun → thing", shares[0]), ("head 2: action → animal", shares[1]))
print("'it' in head 1:   ", dict(zip(features, out[0, 6].round(2).tolist(), strict=True)))
print("'shone' in head 2:", dict(zip(features, out[1, 7].round(2).tolist(), strict=True)))

# %% [markdown]
# In GPT-2, a last matrix product (`c_proj`) mixes what the heads have found. The smallest GPT-2, of
# 124 million parameters, has twelve heads of 64 numbers in each of its twelve layers.
#
# ## The same in the package
#
# `layers.attention` is these steps, line by line; open it and compare.
# `functional.attention_forward` is the same fused to one operation, on plain arrays. Both must
# agree with ours, on random numbers and in the shapes of a real model: B texts at a time (a
# *batch*), H heads, T tokens, D numbers. (`p` and `key` are for dropout, which sets random shares
# to 0 while training; here it is off.)

# %%
B, H, T, D = 2, 4, 16, 8
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, B, H, T, D))
ours, _ = attend(q, k, v)

theirs = layers.attention(Tensor(q), Tensor(k), Tensor(v)).numpy()
fused, _ = functional.attention_forward(q, k, v, p=0.0, key=())
assert np.allclose(ours, theirs, rtol=1e-10) and np.allclose(ours, fused, rtol=1e-10)
print("ours, the package's and the fused one: equal to ten digits")

# %% [markdown]
# And the gradients? If we write the steps with tensors, the tape finds their backward. GPT-2 uses
# `self_attention`, which takes queries, keys and values as one array (B, T, 3, H, D), and whose
# fused form has a backward that was worked out by hand.

# %%
qkv = rng.standard_normal((B, T, 3, H, D))
weights = rng.standard_normal((B, T, H, D))  # the random weights of lesson 2's judge

step_by_step = Tensor(qkv, requires_grad=True)
q, k, v = (step_by_step[:, :, i].swapaxes(1, 2) for i in range(3))  # each (B, H, T, D)
scores = where(np.tri(T, dtype=bool), q @ k.swapaxes(-1, -2) / math.sqrt(D), -np.inf)
exp = scores.exp()
((exp / exp.sum(-1, keepdims=True)) @ v).swapaxes(1, 2).backward(weights)

at_once = Tensor(qkv, requires_grad=True)
layers.self_attention(at_once).backward(weights)
assert np.allclose(step_by_step.grad, at_once.grad, rtol=1e-8, atol=1e-10)
print("the gradients are equal too")

# %% [markdown]
# **Read next:** `attention`, `self_attention` and `causal_mask` in
# [`layers.py`](../micrograd_gpt/layers.py), then `attention_forward` in
# [`functional.py`](../micrograd_gpt/functional.py). Its backward can wait.
#
# ## Exercises
#
# 1. Attention has no idea of *order*. Show it: shuffle the first seven words of our sentence, and
#    the last word's result stays the same. What could a model do about that?
# 2. Take random queries and keys with D = 4, 64 and 1024. What is the largest share in a row of 64
#    keys, on average, with the division by $\sqrt D$ and without?
# 3. Let each word's vector be its *place* alone: eight numbers, all 0 but for a single 1. Write a
#    `w_query` by which each word looks at the word just before it. (Heads like this are found in
#    GPT-2.)
#
# ## Solutions
#
# **1.** The last row sees all words, and a weighted mean does not depend on the order of what is
# averaged. GPT-2 adds to each word's vector a second vector that stands for its place (lesson 6).

# %%
order = np.append(rng.permutation(7), 7)
print(" ".join(words[i] for i in order))
straight, _ = attend(x @ w_query, x, x)
shuffled, _ = attend(x[order] @ w_query, x[order], x[order])
assert np.allclose(straight[-1], shuffled[-1])
assert not np.allclose(straight[:-1], shuffled[:-1])

# %% [markdown]
# **2.** Without it, wide vectors give nearly everything to one key. With it, the width makes no
# difference.

# %%
for D in (4, 64, 1024):
    q, k = rng.standard_normal((2, 200, 64, D))
    products = q @ k.swapaxes(-1, -2)
    without = softmax(products).max(-1).mean()
    with_it = softmax(products / math.sqrt(D)).max(-1).mean()
    print(f"D = {D:4}: the largest share is {with_it:.2f}, without the division {without:.2f}")
assert without > 0.9 and with_it < 0.2

# %% [markdown]
# **3.** The query of place `i` has to be the key of place `i - 1`: ones just below the diagonal.
# The first word has nobody before it, asks for nothing, and can see only itself.

# %%
places = np.eye(8)
w_previous = 30 * np.eye(8, k=-1)  # row i, column i - 1
_, shares = attend(places @ w_previous, places, places)
draw(("looking at the word before", shares))
assert np.allclose(np.diag(shares, k=-1), 1, atol=1e-3)
