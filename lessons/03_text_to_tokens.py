# %% [markdown]
# # 3. Text to tokens
#
# **Afterwards you can** say what a token is, train a tokenizer of your own, encode a text with it
# exactly as GPT-2 does, and explain why a prompt should not end with a space.
#
# **The idea.** A model computes with numbers, so a text has to be cut into pieces, the **tokens**,
# that stand in a numbered list, the **vocabulary**. Short pieces make long sequences; long pieces
# make a huge vocabulary in which most entries are rare. *Byte-pair encoding* lets the text decide:
# begin with single bytes, and again and again join the pair of neighbours that is most frequent.

# %%
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt

from micrograd_gpt.text.byte_pairs import BytePairTokenizer, GPT2Tokenizer, gpt2_merges
from micrograd_gpt.text.merges import spelled, unspelled
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer, StreamDecoder, WordTokenizer

HERE = Path(__file__).parent if "__file__" in globals() else Path()  # a notebook runs in its folder
story = (HERE / "story.txt").read_text("utf-8")
print(story.split('"')[0])

# %% [markdown]
# A short tale, which will serve us in the next lessons too.
#
# ## Characters, words, bytes
#
# Three simple ways to cut it, with the package's own tokenizers:

# %%
sentence = '"A lamp should shine," said the fox.'
simple = {
    "characters": CharTokenizer.from_text(story),
    "words": WordTokenizer.from_text(story),
    "bytes": ByteTokenizer(),
}
for name, tokenizer in simple.items():
    ids = tokenizer.encode(sentence)
    print(f"{name:11} vocabulary {tokenizer.vocab_size:4}, {len(ids):2} tokens, first {ids[:6]}")
    assert tokenizer.decode(ids) == sentence

# %% [markdown]
# (The 257th byte token marks the end of a text, and so does one of the words; another one of the
# words stands for every unknown word.) Each way has a weakness:
#
# - **Characters** and **bytes** make long sequences, and the model has to learn spelling before it
#   can learn anything else.
# - **Words** make short sequences, but a word that was not in the training text cannot be said:

# %%
unseen = simple["words"].encode("the fox danced")
print(repr(simple["words"].decode(unseen)))
assert simple["words"].unknown in unseen

# %% [markdown]
# Bytes have one great virtue. A computer stores every text, in every language, as a sequence of
# bytes (in UTF-8, one for an English letter, two for an é), so nothing is ever unknown. Byte-pair
# encoding keeps that, and makes the sequences short.
#
# ## Byte-pair encoding from nothing
#
# First, cut the text into words, with the space *before* a word as a part of it. Marks in a row are
# a "word" too, and so is white space. Merges will happen only inside of these, so that no token
# spans two words. GPT-2's pattern also knows digits, apostrophes and all the alphabets; for our
# tale, letters are enough.

# %%
PATTERN = (
    r" ?[A-Za-z]+"  # letters, with the space before them
    r"| ?[^\sA-Za-z]+"  # marks, in the same way
    r"|\s+(?!\S)|\s+"  # white space, but for a last space that belongs to what follows
)
words = Counter(re.findall(PATTERN, story))
print(words.most_common(8))

# %% [markdown]
# Then each word becomes a list of single bytes, and training is a loop: count all pairs of
# neighbours, join the most frequent everywhere, note it. This is called a *merge*.


# %%
def join(parts, pair):
    """The parts of a word with every such pair of neighbours joined, leftmost first."""
    joined, i = [], 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined


def train(words, n_merges):
    """The merges that these words (with their counts) suggest, in order."""
    cut = {word: [bytes([b]) for b in word.encode("utf-8")] for word in words}
    merges = []
    for _ in range(n_merges):
        pairs = Counter()
        for word, parts in cut.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:  # every word is a single token
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # equal counts: any fixed rule
        merges.append(best)
        cut = {word: join(parts, best) for word, parts in cut.items()}
    return merges


merges = train(words, 100)
for i, (left, right) in enumerate(merges[:12]):
    print(f"merge {i:2}: {left.decode()!r:7} + {right.decode()!r:5} = {(left + right).decode()!r}")

# %% [markdown]
# Watch ` the` grow: first `he`, then a space and a `t`, then the two together. Nobody told the
# program what a word is; it only counted.
#
# Encoding a new text repeats the merges, **in the order in which they were learned**. Of all the
# pairs in a word that have a merge, the one learned earliest goes first:


# %%
def encode_word(word, rank):
    """The tokens, as bytes, of one word; `rank` says which merge comes when."""
    parts = [bytes([b]) for b in word.encode("utf-8")]
    while True:
        pairs = [pair for pair in pairwise(parts) if pair in rank]
        if not pairs:
            return parts
        parts = join(parts, min(pairs, key=lambda pair: rank[pair]))


rank = {pair: i for i, pair in enumerate(merges)}
print([part.decode() for word in re.findall(PATTERN, sentence) for part in encode_word(word, rank)])

# %% [markdown]
# The vocabulary is the 256 bytes and, after them, what each merge makes. Is it right? The package
# computes the same encoding by quite another program (the library tiktoken, written in Rust). We
# give it our vocabulary and merges and compare the ids of the whole tale. (It takes them as files
# keep them, with a visible character for each byte: `spelled` writes ` the` as `Ġthe`, and
# `unspelled` goes back.)

# %%
vocabulary = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
number = {token: i for i, token in enumerate(vocabulary)}


def encode(text, rank, number):
    return [number[part] for word in re.findall(PATTERN, text) for part in encode_word(word, rank)]


package = BytePairTokenizer(
    {spelled(token): i for token, i in number.items()},
    [(spelled(left), spelled(right)) for left, right in merges],
)
ids = encode(story, rank, number)
assert ids == package.encode(story).tolist()
assert package.decode(ids) == story
print(f"{len(story)} bytes are {len(ids)} tokens, as the package says too")

# %% [markdown]
# ## GPT-2's vocabulary
#
# OpenAI ran the same loop for 50,000 merges. With the 256 bytes and a token for the end of a text,
# that makes 50,257 tokens, and they travel in this package. *Our* encoder, with *their* merges,
# must give the ids that GPT-2 was trained on; "The dog" is 464 and 3290 to every GPT-2 tokenizer.

# %%
gpt2 = GPT2Tokenizer()
gpt2_rank = {
    (unspelled(left), unspelled(right)): i for i, (left, right) in enumerate(gpt2_merges())
}
gpt2_number = {token: i for i, token in enumerate(gpt2.tokens)}

assert encode("The dog", gpt2_rank, gpt2_number) == [464, 3290]
assert encode(story, gpt2_rank, gpt2_number) == gpt2.encode(story).tolist()
print(f"{gpt2.vocab_size} tokens in GPT-2's vocabulary; the tale is {len(gpt2.encode(story))}")

# %% [markdown]
# The same sentence, cut in five ways:

# %%
cuts = {
    **simple,
    "our 100 merges": package,
    "GPT-2": gpt2,
}
colors = ["#cfe3ff", "#ffe1c4", "#d5f0d0", "#f3d3ea"]
figure, axis = plt.subplots(figsize=(9, 2.4))
for row, (name, tokenizer) in enumerate(cuts.items()):
    ids = tokenizer.encode(sentence)
    axis.text(-0.6, -row, f"{name}, {len(ids)}", ha="right", va="center")
    place = 0
    for i, token_id in enumerate(ids):
        text = tokenizer.decode([token_id])
        box = plt.Rectangle((place, -row - 0.4), len(text), 0.8, color=colors[i % len(colors)])
        axis.add_patch(box)
        for offset, character in enumerate(text):
            x = place + offset + 0.5
            axis.text(x, -row, character, ha="center", va="center", family="monospace")
        place += len(text)
axis.set(xlim=(-9, len(sentence)), ylim=(-len(cuts) + 0.4, 0.6))
axis.axis("off")
plt.show()

# %% [markdown]
# ## ` the` is not `the`
#
# The space belongs to the word behind it. So the same word has several ids, according to what
# stands before it and how it is written:

# %%
for text in ["the", " the", "The", " The", " THE"]:
    print(f"{text!r:7} {gpt2.encode(text).tolist()}")
assert gpt2.encode("the").tolist() == [1169] and gpt2.encode(" the").tolist() == [262]

# %% [markdown]
# To the model, 1169 and 262 are as different as any two numbers; that they mean the same is
# something it has to learn. What is gained? Almost every word in a text follows a space, and the
# space costs no token of its own.
#
# There is a trap in it. If your prompt is `"The dog "`, with a space at its end, that space is a
# token of its own. But in the training texts the space before a word was nearly always *inside* the
# next token; the model has hardly ever seen what follows a lone space, and is likely to continue
# badly. End a prompt with a letter or a mark.

# %%
print("without:", gpt2.encode("The dog").tolist(), "  with:", gpt2.encode("The dog ").tolist())
assert gpt2.encode("The dog ").tolist() == [464, 3290, 220]

# %% [markdown]
# ## How many merges?
#
# Every merge makes the text shorter and the vocabulary longer. The first merges gain most:

# %%
many = train(words, 240)
lengths = []
for count in range(0, 241, 20):
    some = {pair: i for i, pair in enumerate(many[:count])}
    lengths.append(sum(n * len(encode_word(word, some)) for word, n in words.items()))

plt.figure(figsize=(6, 3.2))
plt.plot(range(0, 241, 20), lengths, marker=".", label="our merges")
plt.axhline(len(gpt2.encode(story)), color="gray", linestyle="--", label="GPT-2's 50,000")
plt.xlabel("merges learned from the tale")
plt.ylabel("tokens in the tale")
plt.ylim(0)
plt.legend()
plt.show()
assert lengths[0] == len(story) and all(a >= b for a, b in pairwise(lengths))

# %% [markdown]
# With 240 merges, our tokenizer comes close to GPT-2's on this tale, since it was made for this
# tale and for nothing else (exercise 3).
#
# **Read next:** [`text/tokenizers.py`](../micrograd_gpt/text/tokenizers.py), where the three simple
# tokenizers fit on a page, and the beginning of
# [`text/byte_pairs.py`](../micrograd_gpt/text/byte_pairs.py), with GPT-2's pattern.
#
# ## Exercises
#
# 1. People like to ask language models how many letters r there are in "strawberry". What does
#    GPT-2 see of the word? And of " strawberry"?
# 2. How many tokens is 🦊 to GPT-2? Decode the first of them alone. What must a program do that
#    shows a text while it is being produced?
# 3. Encode the sentence `"Le renard a trouvé une lampe."` with our merges and with GPT-2's. How
#    many bytes does a token stand for, in this sentence and in the tale?
#
# ## Solutions
#
# **1.** It sees a few numbers, and not one letter. What it knows of spelling, it has had to pick up
# from texts that speak of spelling.

# %%
for text in ["strawberry", " strawberry"]:
    ids = gpt2.encode(text)
    print(f"{text!r:13} {ids.tolist()} {[gpt2.decode([i]) for i in ids]}")
assert len(gpt2.encode(" strawberry")) == 1

# %% [markdown]
# **2.** The fox is four bytes in UTF-8 and three tokens to GPT-2. A part of a character cannot be
# shown, so the program must wait until the character is complete. `StreamDecoder` does.

# %%
fox = gpt2.encode("🦊")
print(fox.tolist(), "the first alone:", repr(gpt2.decode(fox[:1])))
stream = StreamDecoder(gpt2)
shown = [stream.feed(i) for i in fox.tolist()]
print(shown)
assert shown == [""] * (len(fox) - 1) + ["🦊"]

# %% [markdown]
# **3.** Our tokenizer has never seen French, and GPT-2's has seen little of it.

# %%
french = "Le renard a trouvé une lampe."
for name, tokenizer in [("ours", package), ("GPT-2's", gpt2)]:
    for language, text in [("the tale", story), ("French", french)]:
        ratio = len(text.encode("utf-8")) / len(tokenizer.encode(text))
        print(f"{name:8} {language:9} {ratio:.1f} bytes a token")
assert len(package.encode(french)) > len(gpt2.encode(french))
