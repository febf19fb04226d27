# %% [markdown]
# # 8. Training
#
# **Afterwards you can** say what the schedule, accumulation, clipping and half precision each do to
# a run, and tell from a loss curve what has gone wrong.
#
# **The idea.** The loop is that of lesson 1: loss, walk back, step. A real training script
# surrounds it with four answers to four troubles. Bring the trouble about, and you understand the
# answer.

# %%
from contextlib import nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

from micrograd_gpt import optim
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.text.windows import Windows

HERE = Path(__file__).parent if "__file__" in globals() else Path()  # a notebook runs in its folder
story = (HERE / "story.txt").read_text("utf-8")
tokenizer = CharTokenizer.from_text(story)
windows = Windows(tokenizer.encode(story), 24, stride=1)
STEPS = 120


def new_model():
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 48, "n_positions": 24}
    return GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, **shape))


def good_batch(step):
    return windows.batch(0, step, 8)


def train(schedule, batch=good_batch, precision=nullcontext, forget=True):
    """The losses of a new model, trained with the learning rate `schedule(step)` at each step.

    The other arguments bring about the troubles below, or their answers.
    """
    model = new_model()
    optimizer = optim.AdamW(model.parameters())
    losses = []
    for step in range(STEPS):
        optimizer.lr = schedule(step)
        with precision():
            loss = model.loss(*batch(step))
            loss.backward()
        optimizer.step()
        if forget:
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def smooth(losses, n=8):
    """The mean over each step and the n - 1 before it: a curve that the eye can read."""
    means = np.convolve(losses, np.ones(n) / n, mode="valid")
    return np.concatenate([np.full(n - 1, np.nan), means])  # nan: nothing is drawn


def plot(curves, title):
    plt.figure(figsize=(6, 3.2))
    for name, losses in curves.items():
        plt.plot(smooth(losses), label=name)
    plt.xlabel("step")
    plt.ylabel("loss")
    plt.title(title)
    plt.legend()
    plt.show()


# %% [markdown]
# ## The learning rate, and its schedule
#
# How far to step is the one setting that matters most. Too small, and nothing happens; too large,
# and each step lands on the other side of the valley.

# %%
curves = {f"lr {lr}": train(lambda step, lr=lr: lr) for lr in (0.0003, 0.003, 0.1)}
plot(curves, "Three constant learning rates")
ends = {name: float(np.mean(losses[-20:])) for name, losses in curves.items()}
assert ends["lr 0.003"] < ends["lr 0.0003"] and ends["lr 0.003"] < ends["lr 0.1"]

# %% [markdown]
# Large steps are right in the middle of a run, and wrong at both ends. At the beginning, AdamW
# knows the usual size of its gradients from a handful of batches only, so one **warms up**. At the
# end, the noise of the batches shakes the model around the bottom, and small steps let it settle:
# the rate falls along half a **cosine**. Here is the package's schedule, and what it does at a rate
# that is too large to be held constant:


# %%
def schedule(step):
    return optim.cosine_schedule(
        step, max_steps=STEPS, warmup_steps=10, learning_rate=0.01, min_lr=0.001
    )


rates = [schedule(step) for step in range(STEPS)]
plt.figure(figsize=(6, 2))
plt.plot(rates)
plt.xlabel("step")
plt.ylabel("learning rate")
plt.show()
assert 0.0099 < max(rates) < 0.0101 and rates[0] < 0.002 and rates[-1] < 0.0011

constant = train(lambda step: 0.01)
warmed_up = train(lambda step: max(rates) if step > 10 else rates[step])
scheduled = train(schedule)
curves = {
    "0.01 from the start": constant,
    "warm-up to 0.01": warmed_up,
    "warm-up to 0.01, then cosine": scheduled,
}
plot(curves, "The schedule")
assert np.mean(scheduled[-20:]) < np.mean(constant[-20:]) - 0.3
assert np.mean(warmed_up[-20:]) < np.mean(constant[-20:]) - 0.3

# %% [markdown]
# In a run as short as this one, the warm-up does nearly all of the work; the cosine has its share
# in long runs. The rate of 0.003 from the picture before ends as low without either, but we had to
# search for it. With a warm-up, a rate three times as large does no harm: the schedule forgives.
#
# ## Accumulation: a large batch on a small machine
#
# A larger batch has a less noisy gradient, but it may not fit into memory. Since the loss is a
# mean, so is its gradient; and a mean over 32 texts is the mean of the means over four times 8. So:
# four walks back, each with a quarter of the loss, whose gradients *add up* in `.grad`, and only
# then a step. It is not an approximation. (In `float64`, rounding cannot hide a difference.)

# %%
at_once, in_parts = new_model(), new_model()
for model in (at_once, in_parts):
    hold_in(model, "float64")
ids, targets = windows.batch(0, 0, 32)
at_once.loss(ids, targets).backward()
for part in range(4):
    rows = slice(8 * part, 8 * part + 8)
    (in_parts.loss(ids[rows], targets[rows]) * 0.25).backward()
for p, q in zip(at_once.parameters(), in_parts.parameters(), strict=True):
    assert np.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)
print("32 at once and 4 times 8: the same gradients")

# %% [markdown]
# ## Clipping: one bad batch
#
# Somewhere in forty gigabytes there is a page of garbage, and its gradient is huge. **Clipping**
# measures the length of the whole gradient, over all parameters (its *norm*, the root of the sum of
# all squares), and shortens it to at most 1, without changing its direction. A run of plain
# gradient steps shows it best: we make the loss of step 60 fifty times as large for the walk back.


# %%
def plain_steps(clip):
    model, losses = new_model(), []
    for step in range(STEPS):
        loss = model.loss(*good_batch(step))
        (loss * (50.0 if step == 60 else 1.0)).backward()
        optim.clip_grad_norm(model.parameters(), clip)
        for p in model.parameters():
            p.data -= 0.1 * p.grad
            p.grad = None
        losses.append(loss.item())
    return losses


unclipped, clipped = plain_steps(np.inf), plain_steps(1.0)
plot({"not clipped": unclipped, "clipped": clipped}, "A bad batch at step 60")
assert np.mean(unclipped[61:71]) > np.mean(clipped[61:71]) + 0.2
assert np.mean(clipped[-20:]) < np.mean(clipped[40:60]) + 0.1

# %% [markdown]
# Without clipping, one step undoes sixty. AdamW is less easily thrown, since it divides by the
# usual size of a gradient; but a bad batch also spoils what it takes to be usual, for many steps.
# `train_gpt2.py` notes the norm in `metrics.jsonl`: where it jumps, look at the data of that step.
#
# ## Half precision
#
# Numbers of 16 bits need half the memory, and graphics cards multiply them many times faster. There
# are two kinds, and each has its weakness:

# %%
bfloat16 = ml_dtypes.bfloat16
print(
    "a small change, 1 + 0.001:  float16", np.float16(1 + 0.001), " bfloat16", bfloat16(1 + 0.001)
)
with np.errstate(over="ignore"):
    print("a large number, 100000:     float16", np.float16(1e5), "   bfloat16", bfloat16(1e5))
    print("a tiny number, 1e-8:        float16", np.float16(1e-8), "   bfloat16", bfloat16(1e-8))
    assert np.isinf(np.float16(1e5)) and np.float16(1e-8) == 0
assert bfloat16(1 + 0.001) == 1 and bfloat16(1e-8) > 0

# %% [markdown]
# - `bfloat16` has the range of `float32`, but only between two and three digits, where `float32`
#   has seven. Most steps of AdamW change a weight by less than that, and would round to *nothing*.
#   So the weights themselves stay in `float32`, and only the matrix products are computed in half
#   precision. LayerNorm, softmax and loss stay in `float32` too.
# - `float16` has one more digit, but a small range: tiny gradients become 0, large ones infinite.
#   So the loss is multiplied by a large number before the walk back, and the gradients are divided
#   by it afterwards (`runs/loss_scaler.py`).
#
# With that care, the curve is the same to the eye (`compute_in` does what the first point says):

# %%
half = train(schedule, precision=lambda: compute_in("bfloat16"))
plot({"float32": scheduled, "bfloat16": half}, "Matrix products in half precision")
assert abs(np.mean(half[-20:]) - np.mean(scheduled[-20:])) < 0.1

# %% [markdown]
# ## What has gone wrong here?
#
# Four runs, each with one mistake in it. *(1)* The learning rate is much too large. *(2)*
# `zero_grad` was forgotten. *(3)* The targets are the inputs, not the tokens after them. *(4)* The
# inputs and the targets come from different texts. Look at the picture only, and guess: which is
# which?


# %%
def own_inputs(step):
    ids, _ = good_batch(step)
    return ids, ids


def strangers(step):
    return good_batch(step)[0], good_batch(step + 1000)[1]


wrong = {
    "A": train(schedule, batch=own_inputs),
    "B": train(lambda step: 0.3),
    "C": train(schedule, batch=strangers),
    "D": train(schedule, forget=False),
}
_, axes = plt.subplots(1, 4, figsize=(11, 2.8), sharey=True)
for axis, (name, losses) in zip(axes, wrong.items(), strict=True):
    axis.plot(smooth(scheduled), color="lightgray", label="a good run")
    axis.plot(smooth(losses), color="tab:red")
    axis.set(title=name, xlabel="step", ylim=(0, 6))
axes[0].set_ylabel("loss")
axes[0].legend()
plt.tight_layout()
plt.show()

counts = np.bincount(tokenizer.encode(story))
frequencies = counts / counts.sum()
unigram = -(frequencies * np.log(frequencies)).sum()
final = {name: np.mean(losses[-20:]) for name, losses in wrong.items()}
assert final["A"] < 0.5 and abs(final["C"] - unigram) < 0.2
assert final["B"] > np.mean(scheduled[-20:]) + 0.5

# %% [markdown]
# - **A** is *(3)*. A loss that falls to almost nothing, within moments, is too good to be true: the
#   answer is in the question. Whenever a run is much better than expected, look for a leak.
# - **B** is *(1)*. The loss shoots up at once, and then stays far above the good run.
# - **C** is *(4)*. It falls to the loss of one who knows only how frequent each character is (here
#   2.9) and stops there: the model can learn nothing from its inputs. To find this loss for a text
#   of yours, shuffle the inputs on purpose.
# - **D** is *(2)*. It falls for a moment, then rises: every step still carries all the gradients of
#   the past, and goes where the slope *was*. It is easily taken for too large a learning rate.
#
# And a good run? It begins at $\ln V$, falls steeply, bends, and goes on falling slowly. The loss
# on text that was held out tells when to stop (lesson 4, exercise 3).
#
# **Read next:** the rest of [`optim.py`](../micrograd_gpt/optim.py), then
# [`train_gpt2.py`](../train_gpt2.py), the training loop from its first line to its last.
#
# ## Exercises
#
# 1. Show that clipping keeps the direction: after it, all gradients are the old ones times one
#    number.
# 2. Keep the weights themselves to what `bfloat16` can hold: round them after each step
#    (`p.data.astype(bfloat16)`, and back to `np.float32`). Take a tenth of the learning rates
#    above, as large models do. What becomes of the curve?
# 3. Someone accumulates four losses, but forgets the quarter. What changes for plain gradient
#    steps? And for AdamW?
#
# ## Solutions
#
# **1.** Compare the gradients before and after.

# %%
model = new_model()
model.loss(*good_batch(0)).backward()
before = [p.grad.copy() for p in model.parameters()]
norm = optim.clip_grad_norm(model.parameters(), 0.1)
for old, p in zip(before, model.parameters(), strict=True):
    assert np.allclose(p.grad, old * (0.1 / norm), rtol=1e-4, atol=1e-9)
print("all times the same number, 0.1 / norm")

# %% [markdown]
# **2.** A weight moves only by whole distances from one `bfloat16` to the next; steps that are
# smaller than half of that are lost. In this short run it learns a little worse.

# %%
model = new_model()
optimizer = optim.AdamW(model.parameters())
rounded = []
for step in range(STEPS):
    optimizer.lr = schedule(step) / 10
    loss = model.loss(*good_batch(step))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    for p in model.parameters():
        p.data = p.data.astype(bfloat16).astype(np.float32)
    rounded.append(loss.item())
wide = train(lambda step: schedule(step) / 10)
plot({"weights in float32": wide, "weights in bfloat16": rounded}, "Where small steps are lost")
assert np.mean(rounded[-20:]) > np.mean(wide[-20:])

# %% [markdown]
# **3.** The gradient is four times as large. A plain step becomes four times as long. AdamW divides
# by the usual size of the gradients, which is four times as large too, and takes the same step. (To
# the divisor it adds `eps`, so that it is never 0; small enough, that makes no difference.)

# %%
results = []
for factor in (1.0, 4.0):
    model = new_model()
    hold_in(model, "float64")
    optimizer = optim.AdamW(model.parameters(), eps=1e-12)
    for step in range(3):
        (model.loss(*good_batch(step)) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    results.append(model.transformer.h[0].mlp.c_fc.weight.numpy())
assert np.allclose(*results, atol=1e-5)
print("AdamW: the same weights to five digits")
