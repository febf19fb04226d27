# %% [markdown]
# # 9. Decoding
#
# **Afterwards you can** turn a model's probabilities into a text in five ways (greedy, temperature,
# top-k, top-p, beams), say which one to use when, and explain two ways of writing faster that
# change nothing in the text.
#
# **The idea.** The model gives every token a probability to come next, and no more. *Which* token
# is written is decided outside of it, in a few lines that you can change without any training.

# %%
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from micrograd_gpt import no_grad, optim
from micrograd_gpt.arrays.precision import hold_in
from micrograd_gpt.generation import filters
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.tokenizers import WordTokenizer
from micrograd_gpt.text.windows import Windows

HERE = Path(__file__).parent if "__file__" in globals() else Path()  # a notebook runs in its folder
story = (HERE / "story.txt").read_text("utf-8")

# %% [markdown]
# In this lesson the tokens are whole words and marks, so that we can read what the model thinks.
# (The white space between them is left out.) A small GPT-2 reads our tale for some seconds. Then it
# knows it well, but not quite by heart.

# %%
tokenizer = WordTokenizer.from_text(story)
SPACES = tokenizer.encode(" \n")


def encode(text):
    ids = tokenizer.encode(text).astype(np.int64)
    return ids[~np.isin(ids, SPACES)]


def decode(ids):
    return " ".join(tokenizer.decode([int(i)]) for i in ids)


T, V = 96, tokenizer.vocab_size  # the longest text that the model can read; how many words
model = GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=48, vocab_size=V, n_positions=T))
hold_in(model, "float64")  # 16 digits, so that it writes the same text on every machine
windows = Windows(encode(story), T, stride=1)
optimizer = optim.AdamW(model.parameters())
STEPS = 250
for step in range(STEPS):
    optimizer.lr = optim.cosine_schedule(step, STEPS, 10, learning_rate=0.006, min_lr=0.0006)
    loss = model.loss(*windows.batch(0, step, 4))
    loss.backward()
    optim.clip_grad_norm(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
print(f"{V} words, loss {loss.item():.1f}")
assert loss.item() < 0.7


# %% [markdown]
# ## One distribution, and what can be done to it
#
# In the tale, the hare can run and jump, the owl can see and fly, the bear can sleep. So what comes
# after "I can"? The model has an opinion; these three settings change it before a word is drawn:
#
# - **Temperature** divides the logits before the softmax. Below 1, likely words become likelier
#   still; above 1, the differences shrink. Towards 0, only the likeliest is left. To take that one
#   always is called **greedy** decoding.
# - **Top-k** keeps the $k$ likeliest words. The probability of the others is shared out among them.
# - **Top-p** keeps as many words as it takes to reach the probability $p$ together: few where the
#   model is sure, many where it is not.


# %%
def softmax(scores):
    exp = np.exp(scores - scores.max())
    return exp / exp.sum()


def with_temperature(scores, temperature):
    return scores / temperature


def top_k(scores, k):
    kth_best = np.sort(scores)[-k]
    return np.where(scores < kth_best, -np.inf, scores)


def top_p(scores, p):
    best_first = np.argsort(-scores)
    together = np.cumsum(softmax(scores)[best_first])
    count = 1 + int(np.searchsorted(together, p))  # up to the place where p is reached
    kept = np.full_like(scores, -np.inf)
    kept[best_first[:count]] = scores[best_first[:count]]
    return kept


def next_scores(ids):
    """The logits of the word after these ids, (V,)."""
    with no_grad():
        return model(ids[None], last_only=True).numpy()[0, 0]


scores = next_scores(encode("I can"))
ways = {
    "as the model says": scores,
    "temperature 0.5": with_temperature(scores, 0.5),
    "temperature 2": with_temperature(scores, 2.0),
    "top-k 3": top_k(scores, 3),
    "top-p 0.8": top_p(scores, 0.8),
}
assert np.allclose(ways["temperature 2"], filters.temperature(scores, 2.0))
assert np.array_equal(ways["top-k 3"], filters.top_k(scores, 3))
assert np.array_equal(ways["top-p 0.8"], filters.top_p(scores, 0.8))

shown = np.argsort(-scores)[:10]
_, axes = plt.subplots(1, 5, figsize=(11, 2.8), sharex=True, sharey=True)
for axis, (name, changed) in zip(axes, ways.items(), strict=True):
    axis.barh(range(10), softmax(changed)[shown])
    axis.set_yticks(range(10), [decode([i]) for i in shown])
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("probability")
axes[0].invert_yaxis()
plt.tight_layout()
plt.show()

# %% [markdown]
# Each panel is a distribution of its own: it adds up to 1. Ours equal the package's
# (`generation/filters.py`), and those are tested against Transformers'.
#
# To *draw* a word from such a distribution, put the probabilities end to end on a line from 0 to 1,
# throw a random number on it, and see whose piece it hits. Do that often, and each word comes as
# often as its probability says:


# %%
def draw(probabilities, rng):
    return int(np.searchsorted(np.cumsum(probabilities), rng.random(), side="right"))


p = softmax(scores)
rng = np.random.default_rng(0)
drawn = np.bincount([draw(p, rng) for _ in range(20_000)], minlength=V) / 20_000
for i in shown[:4]:
    print(f"{decode([i]):6} probability {p[i]:.2f}, drawn {drawn[i]:.2f}")
assert np.abs(drawn - p).max() < 0.015

# %% [markdown]
# ## What they write
#
# The loop is the one you know: scores, change them, choose, append, again.


# %%
def write(prompt, n, change, seed):
    """Continue a prompt by n words; `change` says what becomes of the scores."""
    rng = np.random.default_rng(seed)
    ids = encode(prompt)
    for _ in range(n):
        ids = np.append(ids, draw(softmax(change(next_scores(ids))), rng))
    return ids


def greedy(scores):
    return np.where(scores == scores.max(), 0.0, -np.inf)  # the best has all the probability


choices = {
    "greedy": greedy,
    "temperature 0.5": lambda scores: with_temperature(scores, 0.5),
    "as it is": lambda scores: scores,
    "temperature 2": lambda scores: with_temperature(scores, 2.0),
    "top-k 3": lambda scores: top_k(scores, 3),
    "top-p 0.8": lambda scores: top_p(scores, 0.8),
}
for name, change in choices.items():
    print(f"{name:16} {decode(write('The fox', 26, change, seed=4))}")

package = model.generate(encode("The fox"), max_new_tokens=26, temperature=0, end_of_text=None)
assert np.array_equal(package, write("The fox", 26, greedy, seed=0))

# %% [markdown]
# Greedy says the same thing every time, and goes round in circles: the text so far repeats itself,
# so the model expects it to go on repeating. Large models do that too. A high temperature picks
# words out of a hat. What one usually wants lies between the two: a temperature a little below 1,
# or top-p around 0.9, which cuts off the long tail of words that are unlikely one by one, but many.
#
# ## Beam search: the likeliest text
#
# The likeliest next *word* need not begin the likeliest *text*. How likely is a text? The product
# of the probabilities of its words, or, so that it does not become too small for a number, the sum
# of their logarithms. **Beam search** keeps several beginnings in play, the **beams**. Each step
# extends every beam by every word, and keeps the best by the probability of the whole text so far.


# %%
def log_probability(ids, start):
    """The logarithm of the probability of ids[start:], given what is before."""
    with no_grad():
        logits = model(ids[None, :-1]).numpy()[0]  # (T - 1, V): row i is about word i + 1
    log_p = filters.log_softmax(logits)
    places = np.arange(start - 1, len(ids) - 1)
    return log_p[places, ids[places + 1]].sum()


def beam_search(ids, n, beams):
    found = [(0.0, ids)]
    for _ in range(n):
        longer = []
        for score, text in found:
            log_p = filters.log_softmax(next_scores(text))
            for word in np.argsort(-log_p)[:beams]:  # others cannot be among the best
                longer.append((score + log_p[word], np.append(text, word)))
        found = sorted(longer, key=lambda pair: -pair[0])[:beams]
    return found[0]


start = encode("The")
for beams in (1, 2, 6):
    score, text = beam_search(start, 9, beams)
    print(f"beams: {beams}, probability {np.exp(score):.3f}: {decode(text)}")
    assert np.isclose(score, log_probability(text, len(start)))

found = model.generate(start, max_new_tokens=9, num_beams=6, end_of_text=None)
assert np.array_equal(found, text)

# %% [markdown]
# One beam is greedy decoding. It takes the likeliest word at each turn, and then has to live with
# it. Two beams keep a second-best beginning alive for a while, and it turns out to lead to a
# likelier text: a sentence of the tale.
#
# Is that the best there is? Over two words we can look at *all* continuations, $V^2$ of them, in
# one batch. If there are as many beams as words, the search must find the best of all:

# %%
pairs = np.stack([np.repeat(start, V), np.arange(V)], axis=1)  # (V, 2): "The" and every word
with no_grad():
    log_p = filters.log_softmax(model(pairs).numpy())  # (V, 2, V)
all_scores = log_p[0, 0][:, None] + log_p[:, 1]  # (V, V): of every first and second word
best = np.unravel_index(all_scores.argmax(), all_scores.shape)
score, text = beam_search(start, 2, beams=V)
assert np.array_equal(text[1:], best) and np.isclose(score, all_scores.max())
print(f"the best of {all_scores.size:,} texts: {decode(text)}")

# %% [markdown]
# Beam search is good where there is one right answer, as in translation. For a story it is not: the
# likeliest text is a dull one.
#
# ## The KV cache: never read twice
#
# So far, each new word made the model read the whole text again. But because of the causal mask,
# nothing that comes later can change what was computed for an earlier word. And what do later words
# need of it? Look at lesson 5: only its **keys and values**, in each layer. So these are kept, and
# each step computes one new row.

# %%
ids = encode(story)[None, :T]
cache = KVCache(model)
with no_grad():
    at_once = model(ids).numpy()
    one_by_one = [model(ids[:, i : i + 1], cache).numpy() for i in range(T)]
assert np.allclose(np.concatenate(one_by_one, axis=1), at_once, rtol=0, atol=1e-10)
print(f"{T} words one by one, with the cache: the same logits")
print("rows computed without it:", sum(range(1, T + 1)), " with it:", T)
assert sum(range(1, T + 1)) == T * (T + 1) // 2

# %% [markdown]
# Without the cache, the work for a text grows with the square of its length. To write 1024 tokens,
# it is five hundred times as much. The price is memory: two vectors for each token in each layer
# (exercise 3).
#
# How large is the gain on *your* machine? Here is a larger model (its weights are random, which
# makes no difference to the time), and what one more token costs after so many others. And while we
# are measuring: with the cache, what does a step cost that reads not one token, but several?

# %%
shape = {"n_layer": 4, "n_head": 8, "n_embd": 512, "vocab_size": 512, "n_positions": 512}
larger = GPT2(GPT2Config(**shape))
ids = np.random.default_rng(0).integers(512, size=(1, 512))
cache = KVCache(larger)


def milliseconds(start, end, cache):
    """The best of three times that a pass over ids[start:end] took."""
    times = []
    for _ in range(3):
        if cache is not None:
            cache.length = start  # forget what is after it
        begun = time.perf_counter()
        larger(ids[:, start:end], cache, last_only=True)
        times.append(1000 * (time.perf_counter() - begun))
    return min(times)


lengths, counts = (16, 64, 128, 256, 384, 496), (1, 2, 4, 8, 12, 16)
with no_grad():
    larger(ids, cache)  # fills the cache
    without_it = [milliseconds(0, n + 1, None) for n in lengths]
    with_it = [milliseconds(n, n + 1, cache) for n in lengths]
    together = [milliseconds(496, 496 + n, cache) for n in counts]

_, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.plot(lengths, without_it, marker=".", label="reading all again")
left.plot(lengths, with_it, marker=".", label="with the KV cache")
left.set(xlabel="tokens before it", ylabel="milliseconds", title="One more token")
left.legend()
right.plot(counts, np.multiply(counts, together[0]), marker=".", label="one after another")
right.plot(counts, together, marker=".", label="in one pass")
right.set(xlabel="tokens", title="Several tokens, with the cache")
right.legend()
for axis in (left, right):
    axis.set_ylim(0)
plt.tight_layout()
plt.show()

# %% [markdown]
# On the left, the gain. On the right, an opportunity: several tokens in one pass cost far less than
# one after another. For a single token, most of the time goes into *fetching* the weights from
# memory, and for several they need to be fetched only once. If only we knew the next tokens!
#
# ## Speculation: guess, then check
#
# So **guess** them, by any cheap means, and let the model check all the guesses in one pass. It
# gives, at each place, the word that it would have written itself. As long as the guesses agree,
# they are accepted. At the first that does not, the model's own word is taken, and the remaining
# guesses are thrown away. So every word in the result is the model's own choice: a bad guess costs
# time, but does not change the text. (Unless two words are equally likely to the last digit, and
# rounding decides between them.)
#
# Where do guesses come from? Texts repeat themselves. We look for the last place where the same two
# words stood, and guess that the same words follow again.


# %%
def guess(ids, most=8, run=2):
    """What followed the last `run` words where they stood before; often nothing."""
    for end in range(len(ids) - 1, run - 1, -1):
        if np.array_equal(ids[end - run : end], ids[-run:]):
            return ids[end : end + most]
    return ids[:0]


def speculate(ids, length):
    """Greedy decoding with guesses: the text, and for each pass the words that it added."""
    passes = []
    while len(ids) < length:
        guesses = guess(ids)[: length - len(ids) - 1]
        with no_grad():
            logits = model(np.concatenate([ids, guesses])[None]).numpy()[0]
        own = logits[len(ids) - 1 :].argmax(-1)  # the model's word at each guessed place, and after
        right = int(np.cumprod(own[:-1] == guesses).sum())  # guesses before the first wrong one
        passes.append(own[: right + 1])
        ids = np.concatenate([ids, passes[-1]])
    return ids, passes


# The second paragraph of the tale is the prompt; the third tells nearly the same again.
prompt = encode(story.split("\n\n")[1])
plain = model.generate(prompt, max_new_tokens=T - len(prompt), temperature=0, end_of_text=None)
fast, passes = speculate(prompt, T)
assert np.array_equal(fast, plain)
print(f"the same {T - len(prompt)} words in {len(passes)} passes, one in each pair of brackets:")
print(*(f"[{decode(words)}]" for words in passes))
assert len(passes) < 0.8 * (T - len(prompt))


# %% [markdown]
# (This small loop reads the whole text in each pass, to keep it short. The package does the same
# with the KV cache: `--speculate prompt-lookup`.) It pays wherever a text repeats itself, as code
# does. A finer rule does the same for drawn words (Leviathan et al. 2023, arXiv:2211.17192), and a
# small model may do the guessing for a large one; the principle is always this one.
#
# **Read next:** [`generation/sampling.py`](../micrograd_gpt/generation/sampling.py), whose `decode`
# is all of this in one loop, and
# [`generation/kv_cache.py`](../micrograd_gpt/generation/kv_cache.py).
#
# ## Exercises
#
# 1. Which of the settings above can never change what *greedy* decoding writes, and why? What about
#    a penalty that makes words less likely that were already said?
# 2. At which temperature is the entropy of the distribution after "I can" exactly 1 nat? Find it by
#    halving an interval again and again.
# 3. How large is the KV cache of 124M, for 1024 tokens in `float32`? Compare it with the weights
#    (498 MB).
#
# ## Solutions
#
# **1.** Temperature, top-k and top-p: none of them changes which word is the likeliest. A penalty
# does; it was invented because greedy decoding goes round in circles.

# %%
for changed in ways.values():
    assert changed.argmax() == scores.argmax()

penalised = filters.repetition_penalty(scores, [scores.argmax()], 2.0)
print(f"likeliest: {decode([scores.argmax()])}, once said: {decode([penalised.argmax()])}")
assert penalised.argmax() != scores.argmax()

# %% [markdown]
# **2.** The entropy is the mean surprise (lesson 4). It grows with the temperature, so the middle
# of the interval tells in which half the answer lies.


# %%
def entropy(temperature):
    p = softmax(scores / temperature)
    return -(p * np.log(p)).sum()


low, high = 0.1, 10.0
for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if entropy(middle) < 1 else (low, middle)
print(f"temperature {middle:.2f}, entropy {entropy(middle):.2f}")
assert np.isclose(entropy(middle), 1)

# %% [markdown]
# **3.** Two vectors of 768 numbers for each of 12 layers and 1024 tokens, four bytes each: about a
# seventh of the weights. Every further text that is written at the same time needs its own.

# %%
size = 2 * 12 * 1024 * 768 * 4
print(f"{size / 1e6:.0f} MB")
assert size == 75_497_472

small = KVCache(model)  # the same sum for our model, whose numbers have eight bytes
assert small.data.nbytes == 2 * 2 * T * 48 * 8
