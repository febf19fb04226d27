# %% [markdown]
# # 6. The block
#
# **Afterwards you can** derive the backward of LayerNorm on paper and check it, put a GPT-2 block
# together from its parts, and say why its norms stand before the branches and not behind them.
#
# **The idea.** A deep model needs a road on which a signal can travel through all layers, forward
# and back, without being multiplied at every turn. That road is the **residual stream**: each part
# reads from it, and *adds* to it. Everything else in the block is there to keep it in good order.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from micrograd_gpt import Tensor, functional, layers, optim
from micrograd_gpt.gpt2 import GPT2, Block, GPT2Config
from micrograd_gpt.nn import Draws, normal
from micrograd_gpt.text.tokenizers import CharTokenizer
from micrograd_gpt.text.windows import Windows
from micrograd_gpt.variants import PostNormBlock, SinusoidalPositions, VariantConfig, VariantGPT2

HERE = Path(__file__).parent if "__file__" in globals() else Path()  # a notebook runs in its folder
story = (HERE / "story.txt").read_text("utf-8")
tokenizer = CharTokenizer.from_text(story)
rng = np.random.default_rng(0)

# %% [markdown]
# ## LayerNorm, forward
#
# Vectors that are added to again and again grow. LayerNorm takes each token's vector by itself and
# brings it to mean 0 and variance 1 (the variance is the mean square of the deviations from the
# mean). Then it scales and shifts each channel by learned numbers, the weight and the bias, so that
# the model can have other sizes where it needs them.


# %%
def norm_forward(x, weight, bias, eps=1e-5):
    """x (N, C): N rows of C channels."""
    mean = x.mean(-1, keepdims=True)  # (N, 1)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    r = 1 / np.sqrt(variance + eps)  # one over the standard deviation; eps keeps it finite
    n = (x - mean) * r  # the normalised rows
    return n * weight + bias, n, r


x = 3 + 5 * rng.standard_normal((4, 8))
weight, bias = rng.standard_normal((2, 8))
y, n, r = norm_forward(x, weight, bias)
print("means", n.mean(-1).round(6) + 0, "variances", n.var(-1).round(3))
assert np.allclose(y, layers.layer_norm(Tensor(x), Tensor(weight), Tensor(bias)).numpy())

# %% [markdown]
# ## LayerNorm, backward, on paper
#
# The gradient of `y` arrives; call it $g$. The last line is easy: $y = n \cdot w + b$ has the
# slopes $dw = \sum g \cdot n$ and $db = \sum g$ over the rows (they were broadcast, lesson 2), and
# hands on $dn = g \cdot w$. What is left is the way from $n$ to $x$, for one row of $C$ numbers,
# with the mean $\mu$ and the variance $v$:
#
# $$n_j = (x_j - \mu)\, r, \qquad \mu = \frac1C \sum_k x_k, \qquad
# r = (v + \varepsilon)^{-1/2}, \qquad v = \frac1C \sum_k (x_k - \mu)^2$$
#
# Move one number, $x_i$, a little. *Every* $n_j$ of the row moves, along three paths.
#
# 1. Directly, if $j = i$. The slope is $r$.
# 2. Through the mean, which moves by $\frac1C$. That gives $-\frac1C\, r$ for every $j$.
# 3. Through $r$. The variance moves by $\frac2C (x_i - \mu)$. (The mean moves too, but that does
#    not matter here: the deviations add up to 0.) Then $r$ moves by $-\frac12 r^3$ times that,
#    which is $-\frac1C\, r^2 n_i$; and $n_j$ moves by $(x_j - \mu)$ times that, which is
#    $-\frac1C\, r\, n_j n_i$.
#
# Add up the paths, and then, as always, multiply by what arrives, $dn_j$, and sum over all $j$. A
# sum over $j$, divided by $C$, is a mean over the row:
#
# $$dx_i = \sum_j dn_j\; r \left(\delta_{ij} - \frac1C - \frac1C\, n_j n_i\right)
# = r \left(dn_i - \mathrm{mean}(dn) - n_i\, \mathrm{mean}(dn \cdot n)\right)$$
#
# ($\delta_{ij}$ is 1 where $i = j$, else 0.) Three lines of code:


# %%
def norm_backward(g, n, r, weight):
    """Gradients of x, weight and bias."""
    dn = g * weight
    dx = r * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))
    return dx, (g * n).sum(0), g.sum(0)


g = rng.standard_normal(x.shape)
dx, dweight, dbias = norm_backward(g, n, r, weight)

# %% [markdown]
# Three judges: central differences; the package's tape, which has never seen our formula and finds
# its way through the composition in `layers.py`; and the package's own fused backward.

# %%
step = 1e-5
measured = np.zeros_like(x)
for i in np.ndindex(x.shape):
    moved = np.zeros_like(x)
    moved[i] = step
    above = (norm_forward(x + moved, weight, bias)[0] * g).sum()
    below = (norm_forward(x - moved, weight, bias)[0] * g).sum()
    measured[i] = (above - below) / (2 * step)
assert np.allclose(dx, measured, rtol=1e-6, atol=1e-8)

tensors = [Tensor(a, requires_grad=True) for a in (x, weight, bias)]
layers.layer_norm(*tensors).backward(g)
for ours, tensor in zip((dx, dweight, dbias), tensors, strict=True):
    assert np.allclose(ours, tensor.grad)

mean = x.mean(-1, keepdims=True)
fused = functional.layer_norm_backward(g, x, weight, mean, r)
assert all(np.allclose(a, b) for a, b in zip((dx, dweight, dbias), fused, strict=True))
print("all three agree")

# %% [markdown]
# The formula has a meaning. Adding a constant to a row does not change what LayerNorm makes of it,
# and neither does stretching it (but for `eps`). So there is nothing to gain along these two
# directions, and the gradient must have no part in them: what the two means take away is just that.

# %%
print("along the ones:", np.abs(dx.sum(-1)).max().round(6), " along n:", end=" ")
print(np.abs((dx * n).sum(-1)).max().round(4))
assert np.allclose(dx.sum(-1), 0) and np.allclose((dx * n).sum(-1), 0, atol=1e-4)

# %% [markdown]
# ## GELU: a soft gate
#
# Between two matrix products there must be something that is not a straight line, or the two would
# be no more than one. The simplest is ReLU, which sets negative numbers to 0. GELU is its soft
# brother: $x$ times the probability that a random number (from the normal distribution) is below
# $x$. Large numbers pass; negative ones fade out, and still have a slope, so that they can learn.
#
# GPT-2 computes an approximation by `tanh` (`layers.gelu`). How good is it?

# %%
xs = np.linspace(-4, 4, 801)
exact = xs * 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in xs]))
curve = Tensor(xs, requires_grad=True)
gelu = layers.gelu(curve)
gelu.backward(np.ones_like(xs))
print(f"GPT-2's GELU differs from the exact one by at most {np.abs(gelu.data - exact).max():.4f}")
assert np.abs(gelu.data - exact).max() < 5e-4

plt.figure(figsize=(6, 3.2))
plt.plot(xs, np.maximum(xs, 0), color="gray", linestyle="--", label="ReLU")
plt.plot(xs, gelu.data, label="GELU")
plt.plot(xs, curve.grad, label="slope of GELU")
plt.xlabel("x")
plt.ylim(-0.4, 3)
plt.legend()
plt.show()

# %% [markdown]
# ## The block, put together
#
# A block has two **branches**. Each reads the stream through a LayerNorm, works out something, and
# adds it to the stream: first attention, which moves information *between* tokens, then the MLP
# (multi-layer perceptron), which works on each token *by itself*. The MLP widens the vector to four
# times its width, applies GELU, and narrows it again. `layers.linear` is a matrix product and a
# bias. In the package:

# %%
C, H = 32, 2
block = Block(
    GPT2Config(n_layer=1, n_head=H, n_embd=C),
    normal(0),  # draws the initial weights, with the seed 0
    Draws(0),  # for dropout, which GPT2Config leaves off
)


def block_by_hand(x):
    b, t, _ = x.shape
    normed = layers.layer_norm(x, block.ln_1.weight, block.ln_1.bias)
    qkv = layers.linear(normed, block.attn.c_attn.weight, block.attn.c_attn.bias)  # (B, T, 3C)
    heads = layers.self_attention(qkv.reshape(b, t, 3, H, C // H))  # (B, T, H, D)
    mixed = heads.reshape(b, t, C)  # the heads side by side
    x = x + layers.linear(mixed, block.attn.c_proj.weight, block.attn.c_proj.bias)

    normed = layers.layer_norm(x, block.ln_2.weight, block.ln_2.bias)
    hidden = layers.gelu(layers.linear(normed, block.mlp.c_fc.weight, block.mlp.c_fc.bias))
    return x + layers.linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias)


stream = Tensor(rng.standard_normal((2, 10, C)).astype(np.float32))
assert np.allclose(block(stream).numpy(), block_by_hand(stream).numpy(), atol=1e-6)
print("the block by hand equals gpt2.Block")

# %% [markdown]
# ## Why add?
#
# In lesson 1, a gradient that came through thirty `tanh`s had dwindled to a hundredth. Add each
# result to its input instead (a tenth of it, since the branches of a model begin small), and the
# slope of a step is 1 *plus* something:

# %%
through, added = (Tensor(1.0, requires_grad=True, dtype="float64") for _ in range(2))
a, b = through, added
for _ in range(30):
    a = a.tanh()
    b = b + 0.1 * b.tanh()
a.backward()
b.backward()
print(f"slope through 30 layers: {through.grad:.3f}, through 30 that add: {added.grad:.3f}")
assert through.grad < 0.01 and added.grad > 1

# %% [markdown]
# ## Why is the norm before, and not behind?
#
# The first Transformer (2017) had its LayerNorms *on* the stream, behind each addition. GPT-2 moved
# them into the branches. It looks like a detail. But a norm on the stream multiplies everything
# that travels along, forward and back, and a deep model has dozens of them; in a branch, it leaves
# the road free. Let three models of twelve blocks try to learn our tale: GPT-2's, the one with
# norms behind (both are in the package), and one whose parts replace the stream instead of adding
# to it.
#
# All start from random weights of ordinary size, at which a product of matrices neither grows nor
# shrinks.


# %%
class NothingAdded(Block):
    """A block without residual additions."""

    def __call__(self, x, past=None):  # `past` is for writing text, and None here
        return self.mlp(self.ln_2(self.attn(self.ln_1(x), past)))


def ordinary(seed):
    """Draws initial matrices at which x @ w is about as large as x; embeddings stay small."""
    rng = np.random.default_rng(seed)

    def draw(shape, std):
        is_embedding = shape[0] in (tokenizer.vocab_size, 16)
        size = 0.03 if is_embedding else 1 / math.sqrt(shape[0])
        return (size * rng.standard_normal(shape)).astype(np.float32)

    return draw


# All pieces of 16 characters. batch(seed, step, n) draws n of them: the inputs, and as the targets
# the same pieces one character later.
windows = Windows(tokenizer.encode(story), 16, stride=1)


def race(block_class, init, steps=80):
    """The losses of a model of twelve such blocks, trained with a constant learning rate."""
    position = "post" if block_class is PostNormBlock else "pre"
    shape = {"n_layer": 12, "n_head": 2, "n_embd": 32, "n_positions": 16}
    config = VariantConfig(vocab_size=tokenizer.vocab_size, norm_position=position, **shape)
    model = VariantGPT2(config, init=init)
    if block_class is NothingAdded:
        model.transformer.h = [NothingAdded(config, init, model.draws) for _ in range(12)]
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model.loss(*windows.batch(0, step, 16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


curves = {
    "norm before (GPT-2)": race(Block, ordinary(0)),
    "norm behind": race(PostNormBlock, ordinary(0)),
    "nothing added": race(NothingAdded, ordinary(0)),
}
plt.figure(figsize=(6, 3.2))
for name, losses in curves.items():
    plt.plot(losses, label=name, linestyle="--" if name == "nothing added" else "-")
    print(f"{name:20} mean loss of the last 20 steps: {np.mean(losses[-20:]):.1f}")
counts = np.bincount(tokenizer.encode(story))
frequencies = counts / counts.sum()
unigram = -(frequencies * np.log(frequencies)).sum()
plt.axhline(unigram, color="gray", linestyle=":", label="knowing only frequencies")
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()
before, behind, nothing = (np.mean(losses[-20:]) for losses in curves.values())
assert before < behind - 0.05 and before < nothing - 0.05 and before < unigram

# %% [markdown]
# Only one of them learns more than how frequent each character is; the curves of the two others lie
# on each other. Models with norms behind *can* be trained, and were; they want a learning rate that
# begins small and grows slowly (lesson 8). With the norms before, the road is free from the first
# step.
#
# At its end, after the last block, the stream has become large by so many additions; so GPT-2 has
# one more norm there, `ln_f`.
#
# ## Where am I? Positions
#
# Attention does not see order (lesson 5, exercise 1), so each token's vector gets a second one
# added, for its place. The first Transformer used fixed waves, fast in the first channels and ever
# slower in the later ones, like the hands of a clock: at place $t$, $\sin(t / 10000^{c/C})$ in each
# even channel $c$, and the cosine of the same in the channel after it. GPT-2 has a table, `wpe`,
# and *learns* it. Let a small GPT-2 read the tale for a few seconds, and lay its table beside the
# waves.

# %%
T, C = 32, 64
model = GPT2(
    GPT2Config(n_layer=2, n_head=4, n_embd=C, vocab_size=tokenizer.vocab_size, n_positions=T)
)
optimizer = optim.AdamW(model.parameters(), lr=3e-3)
windows_of_32 = Windows(tokenizer.encode(story), T, stride=1)
for step in range(300):
    loss = model.loss(*windows_of_32.batch(0, step, 16))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.1f}, where the best bigram model has 1.8")
assert loss.item() < 1.2

learned = model.transformer.wpe.weight.numpy()  # (T, C)
waves = SinusoidalPositions(T, C).waves.numpy()  # (T, C)


def likeness(table):
    """The cosine of every pair of rows: 1 where they point the same way."""
    directions = table / np.linalg.norm(table, axis=1, keepdims=True)
    return directions @ directions.T


_, axes = plt.subplots(2, 2, figsize=(8, 6.5), height_ratios=[1, 2])
for column, (name, table) in enumerate([("fixed waves", waves), ("learned", learned)]):
    top, bottom = axes[:, column]
    largest = np.abs(table).max()
    top.imshow(table, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    top.set(title=name, xlabel="channel", ylabel="place")
    bottom.imshow(likeness(table), cmap="RdBu", vmin=-1, vmax=1)
    bottom.set(title="how alike two places are", xlabel="place", ylabel="place")
plt.tight_layout()
plt.show()

for table in (waves, learned):
    alike = likeness(table)
    near = np.mean(np.diag(alike, k=1))
    far = np.mean(np.diag(alike, k=T // 2))
    assert near > far + 0.1

# %% [markdown]
# The tables look nothing alike, but their likenesses have something in common: places that are near
# each other have vectors that are alike, and those far apart less so. The waves were made like
# that. Nobody told the model; so far it has learned to tell the beginning from the end.
#
# **Read next:** in [`functional.py`](../micrograd_gpt/functional.py) `layer_norm_forward` and
# `layer_norm_backward`, where your formula stands, and after them the rest of the file; then
# [`nn.py`](../micrograd_gpt/nn.py).
#
# ## Exercises
#
# 1. What does LayerNorm make of a row of equal numbers? And what would it do without `eps`?
# 2. Many newer models use *RMSNorm*, which leaves out the mean: $n = x / \sqrt{\mathrm{mean}(x^2) +
#    \varepsilon}$. Derive its backward; two of the three paths are left. Check it by the tape.
# 3. GPT-2 begins with small weights (of about 0.02), and with smaller ones still where a branch
#    ends: `normal(0)` draws them. Let "norm before" and "norm behind" race from these. What do you
#    find, and why?
#
# ## Solutions
#
# **1.** All deviations are 0, and 0 times anything is 0: the row becomes the bias. Without `eps` it
# would be 0 / 0, "not a number", which soon fills the whole model.

# %%
equal, _, _ = norm_forward(np.full((1, 8), 7.0), weight, bias)
assert np.allclose(equal, bias)
with np.errstate(all="ignore"):
    without_eps, _, _ = norm_forward(np.full((1, 8), 7.0), weight, bias, eps=0.0)
print("without eps:", without_eps[0, :3])
assert np.isnan(without_eps).all()

# %% [markdown]
# **2.** The path through the mean falls away, and its term with it.

# %%
r_rms = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
n_rms = x * r_rms
dx_rms = r_rms * (g - n_rms * (g * n_rms).mean(-1, keepdims=True))

tensor = Tensor(x, requires_grad=True)
(tensor / ((tensor * tensor).mean(-1, keepdims=True) + 1e-5).sqrt()).backward(g)
assert np.allclose(dx_rms, tensor.grad)
print("the tape agrees")

# %% [markdown]
# **3.** Both learn now. With weights this small, the branches add little to the stream at first. So
# the norms on it, from the second one on, find a vector that is normalised already, and let
# everything pass. Careful initial weights and norms in the right place are two remedies for the
# same trouble, and GPT-2 takes both.

# %%
gentle = {name: race(kind, normal(0)) for name, kind in [("pre", Block), ("post", PostNormBlock)]}
for name, losses in gentle.items():
    print(f"{name:5} mean loss of the last 20 steps: {np.mean(losses[-20:]):.1f}")
    assert np.mean(losses[-20:]) < unigram - 0.3
