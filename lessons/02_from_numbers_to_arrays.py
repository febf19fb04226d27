# %% [markdown]
# # 2. From numbers to arrays
#
# **Afterwards you can** write the backward of any operation on arrays, broadcasting and matrix
# products included, and check it so well that a mistake of one percent does not slip through.
#
# **The idea.** The gradient of an array is an array of the **same shape**: one slope for each
# element. Almost everything follows from the shapes. Where the forward *copies* a number, the
# backward *adds up*; where the forward adds up, the backward copies. (The *forward* of an operation
# computes its result; its *backward* turns the result's gradient into those of its inputs.)

# %%
import matplotlib.pyplot as plt
import numpy as np

from micrograd_gpt import Tensor
from micrograd_gpt.tensor import fit

rng = np.random.default_rng(0)

# %% [markdown]
# ## Why arrays
#
# Lesson 1's tape had a `Number` for every multiplication. GPT-2 multiplies more than a hundred
# million times for each word that it reads, so that a tape of numbers would be slow and enormous. A
# tape of arrays has one entry for each *operation on an array*, a few hundred in all, and NumPy
# does the multiplications inside of it. If NumPy is new to you, here is all that you need of it:

# %%
table = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
print("the shape:", table.shape, "2 rows (axis 0) of 3 columns (axis 1)")
print("element by element:", (table * table).tolist())
print("the sum over axis 0, which then is gone:", table.sum(axis=0).tolist())
print("… or stays, with size 1:", table.sum(axis=0, keepdims=True).tolist())
print("a row made a column, by a new axis 1:", table[0][:, None].tolist())
print("transposed, rows made columns:", table.T.tolist())
print("matrix product, (2, 3) @ (3, 2):", (table @ table.T).tolist())

# %% [markdown]
# Otherwise all stays as in lesson 1. An operation still computes its result and says how a gradient
# goes back:

# %%
x = rng.standard_normal((2, 3))  # random numbers, mostly between -2 and 2
y = rng.standard_normal((2, 3))


def multiply_backward(grad, x, y):
    """Gradients of x and y, where `grad` is the gradient of x * y."""
    return grad * y, grad * x  # lesson 1's two slopes, element by element


# %% [markdown]
# `grad` is how fast the loss moves with each element of the result. We write it as an argument
# because the operation does not know what comes after it, and need not.
#
# ## The judge: central differences, for arrays
#
# Before we derive anything, we need a judge that does not know calculus. Pick one element, move it
# by a tiny step to both sides, and look at the loss. To make a single number, a *loss*, out of an
# array, we multiply it by random weights and add up. Then each element of the array moves the loss
# as fast as its weight says: `grad` is exactly these weights.


# %%
def measured_gradients(function, arrays, weights, step=1e-6):
    """The gradients of (function(*arrays) * weights).sum(), by moving one element at a time."""
    gradients = []
    for array in arrays:
        gradient = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            kept = array[i]
            array[i] = kept + step
            above = (function(*arrays) * weights).sum()
            array[i] = kept - step
            below = (function(*arrays) * weights).sum()
            array[i] = kept
            gradient[i] = (above - below) / (2 * step)
        gradients.append(gradient)
    return gradients


def judge(name, function, backward, *arrays):
    """Assert that `backward(grad, *arrays)` agrees with what is measured, to a millionth."""
    weights = rng.standard_normal(function(*arrays).shape)
    worst = 0.0
    measured = measured_gradients(function, arrays, weights)
    for ours, truth in zip(backward(weights, *arrays), measured, strict=True):
        assert ours.shape == truth.shape, f"{name}: shape {ours.shape} instead of {truth.shape}"
        worst = max(worst, np.abs(ours - truth).max() / np.abs(truth).max())
    assert worst < 1e-6, f"{name}: the gradient is wrong by {worst:.1%}"
    print(f"{name}: right to within a millionth")


judge("x * y", np.multiply, multiply_backward, x, y)

# %% [markdown]
# A judge must be able to say no. Here is a backward that is wrong by one percent:

# %%
try:
    judge("x * y", np.multiply, lambda grad, x, y: (grad * y * 1.01, grad * x), x, y)
except AssertionError as verdict:
    print("refused:", verdict)
else:
    raise AssertionError("the judge let a wrong gradient pass")

# %% [markdown]
# How tiny should the step be? If it is too large, the curve bends within it. If it is too small,
# both losses agree in almost all of their 16 digits, and the difference is noise. Measure it, on a
# slope that we know exactly: that of `exp` at 1 is $e$.

# %%
steps = 10.0 ** np.arange(-13, 0, 0.25)
slopes = (np.exp(1 + steps) - np.exp(1 - steps)) / (2 * steps)
one_sided = (np.exp(1 + steps) - np.exp(1)) / steps

plt.figure(figsize=(6, 3.2))
plt.loglog(steps, np.abs(slopes / np.e - 1), label="a step to each side")
plt.loglog(steps, np.abs(one_sided / np.e - 1), "--", label="a step to one side")
plt.axvline(1e-6, color="gray", linewidth=0.8)
plt.text(1.3e-6, 3e-2, "our step", color="gray")
plt.xlabel("step")
plt.ylabel("relative error of the slope")
plt.ylim(1e-13, 1)
plt.legend()
plt.show()

# %% [markdown]
# On the right, the error falls with the *square* of the step if it goes to both sides, but only
# with the step itself if it goes to one. On the left, noise rules. A step of about a millionth lies
# safely in the valley. It needs the 16 digits of `float64`: with the 7 of `float32`, the valley is
# shallow, and no judge could tell right from wrong by a millionth.
#
# ## Broadcasting
#
# NumPy lets you add a row to every row of a matrix: `(4, 3) + (3,)`. The row is *copied* four
# times, without taking memory. This is called broadcasting. In lesson 1, `b` was added to every
# prediction; here is how to do it for all of them at once.
#
# A number that is used four times moves the loss along four paths, and their slopes **add up**. So
# the gradient of the row is the sum of `grad` over the four rows:


# %%
def add_row_backward(grad, matrix, row):
    return grad, grad.sum(axis=0)


matrix, row = rng.standard_normal((4, 3)), rng.standard_normal(3)
judge("matrix + row", np.add, add_row_backward, matrix, row)

# %% [markdown]
# In general, NumPy aligns two shapes at their *ends*, puts axes of size 1 in front of the shorter
# one, and stretches every axis of size 1. The way back undoes this in two steps: sum over the axes
# that were put in front, and sum, keeping the axis, where the size was 1.


# %%
def unbroadcast(grad, shape):
    """The sum of `grad` over whatever was copied, so that it has this shape."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return grad.sum(axis=stretched, keepdims=True)


def add_backward(grad, a, b):
    return unbroadcast(grad, a.shape), unbroadcast(grad, b.shape)


for shapes in [(4, 3), (3,)], [(4, 1), (1, 3)], [(2, 1, 3), (4, 1)], [(), (2, 2)]:
    a, b = (rng.standard_normal(shape) for shape in shapes)
    judge(f"{shapes[0]} + {shapes[1]}", np.add, add_backward, a, b)

    grad = rng.standard_normal(np.broadcast_shapes(*shapes))  # the package's function, the same
    assert np.allclose(unbroadcast(grad, a.shape), fit(grad, a.shape, grad.dtype))

# %% [markdown]
# In the package this stands in one place, `fit` in `tensor.py`, and the walk back calls it for
# every gradient. Therefore `Tensor.__add__` can return `(grad, grad)` and leave the rest to it.
#
# A picture of a column plus a row: what is copied on the way forward is summed on the way back.

# %%
column, row = np.array([[0.0], [3.0], [6.0], [9.0]]), np.array([[0.0, 1.0, 2.0]])
grad = rng.integers(-3, 4, size=(4, 3)).astype(float)
tables = [
    ("column (4, 1)", column),
    ("row (1, 3)", row),
    ("column + row (4, 3)", column + row),
    ("its gradient (4, 3)", grad),
    ("column's gradient:\nsums along the rows", unbroadcast(grad, (4, 1))),
    ("row's gradient:\nsums down the columns", unbroadcast(grad, (1, 3))),
]
figure, axes = plt.subplots(2, 3, figsize=(8, 5.4))
for i, (axis, (title, table)) in enumerate(zip(axes.flat, tables, strict=True)):
    colors = ("Blues", 0, 16) if i < 3 else ("RdBu", -11, 11)
    axis.imshow(table, cmap=colors[0], vmin=colors[1], vmax=colors[2])
    for (r, c), value in np.ndenumerate(table):
        axis.text(c, r, f"{value:.0f}", ha="center", va="center")
    axis.set(xlim=(-0.5, 2.5), ylim=(3.5, -0.5))
    axis.set_title(title, fontsize=10)
    axis.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Matrix products
#
# `z = x @ w` is the workhorse: almost all of GPT-2's arithmetic. Write one element out:
# $z_{ij} = \sum_k x_{ik} w_{kj}$.
#
# How does the loss move with $x_{ik}$? This number goes into every element of row $i$ of the
# result, into $z_{ij}$ with the slope $w_{kj}$. Multiply along each path and add up the paths. With
# $\mathrm{dx}$ for the gradient of `x`:
#
# $$\mathrm{dx}_{ik} = \sum_j \mathrm{grad}_{ij}\, w_{kj}$$
#
# which is a matrix product again, `grad @ w.T`. In the same way, `dw = x.T @ grad`. If you forget
# it, let the shapes tell you: `x` is (n, k), `w` is (k, m) and `grad` is (n, m), and there is only
# one product of `grad` and `w` that has the shape of `x`.


# %%
def matmul_backward(grad, x, w):
    return grad @ w.T, x.T @ grad


x, w = rng.standard_normal((5, 4)), rng.standard_normal((4, 3))
judge("x @ w", np.matmul, matmul_backward, x, w)

# %% [markdown]
# The backward does two products for each one of the forward. This is where the rule comes from that
# a step of training takes three times the arithmetic of the forward alone.
#
# ## A small network, by hand and by tape
#
# Put the three together. A *layer* is a matrix product and an added row, its *bias*. We take one, a
# `tanh`, a second layer without a bias, and a sum of squares as the loss. By hand, we go through it
# backwards, one line for each line of the forward; the package's tape finds the same.

# %%
inputs = rng.standard_normal((6, 4))
w1, b1, w2 = (rng.standard_normal(shape) for shape in [(4, 8), (8,), (8, 2)])

# forward
before = inputs @ w1 + b1  # (6, 8)
hidden = np.tanh(before)  # (6, 8)
output = hidden @ w2  # (6, 2)
loss = (output * output).sum()

# backward, from the last line to the first
d_output = 2 * output
d_hidden, d_w2 = matmul_backward(d_output, hidden, w2)
d_before = d_hidden * (1 - hidden * hidden)
_, d_b1 = add_backward(d_before, before, b1)
_, d_w1 = matmul_backward(d_before, inputs, w1)

# the same on the package's tape
t1, tb, t2 = (Tensor(a, requires_grad=True) for a in (w1, b1, w2))
output_t = (Tensor(inputs) @ t1 + tb).tanh() @ t2
loss_t = (output_t * output_t).sum()
loss_t.backward()

assert np.isclose(loss_t.item(), loss)
for by_hand, by_tape in zip((d_w1, d_b1, d_w2), (t1.grad, tb.grad, t2.grad), strict=True):
    assert np.allclose(by_hand, by_tape, rtol=1e-9)
print("three gradients, by hand and by tape: equal")

# %% [markdown]
# **Read next:** [`tensor.py`](../micrograd_gpt/tensor.py), from top to bottom. Most operations
# there are two or three lines, of which the last has a backward like yours. Pass over three things
# that are there for later: `@definition` marks what a faster function may stand in for, `versions`
# notice an array that was changed before the backward needed it, and `operands` has the error
# messages.
#
# ## Exercises
#
# 1. Write the backward of `x.mean(axis=1)`. The forward adds up, so the backward copies.
# 2. Write the backward of `x[[0, 2, 2]]`, which picks rows, one of them twice. This is how a model
#    looks up each word's row in a table, and a word may occur twice.
# 3. The judge multiplies by *random* weights. Suppose that it took ones. Find a wrong backward of
#    `x.T` for a square `x` that it would then let pass.
#
# ## Solutions
#
# **1.** Each element moves its row's mean by `1 / n`, and the gradient has to get its axis back.


# %%
def mean_backward(grad, x):
    n = x.shape[1]
    return (np.broadcast_to(grad[:, None] / n, x.shape),)


judge("x.mean(axis=1)", lambda x: x.mean(axis=1), mean_backward, rng.standard_normal((3, 5)))

# %% [markdown]
# **2.** Zero everywhere, and `grad` added where it was picked. `dx[picked] += grad` would be wrong:
# NumPy carries it out once for row 2, not twice. `np.add.at` adds every time.

# %%
picked = [0, 2, 2]


def pick_backward(grad, x):
    dx = np.zeros_like(x)
    np.add.at(dx, picked, grad)
    return (dx,)


judge("x[[0, 2, 2]]", lambda x: x[picked], pick_backward, rng.standard_normal((4, 3)))

# %% [markdown]
# **3.** `x.T` only moves numbers about. If all weights are one, the gradient is one everywhere, and
# a backward that forgets to transpose looks right:

# %%
square = rng.standard_normal((3, 3))
ones = np.ones((3, 3))
(truth,) = measured_gradients(np.transpose, [square], ones)
forgetful = ones  # instead of ones.T
assert np.allclose(forgetful, truth, atol=1e-6)
print("weights of one: the forgetful backward passes")

try:
    judge("x.T", np.transpose, lambda grad, x: (grad,), square)
except AssertionError as verdict:
    print("random weights:", str(verdict).split(" is ")[0], "is wrong")
else:
    raise AssertionError("the judge let a wrong gradient pass")

judge("x.T", np.transpose, lambda grad, x: (grad.T,), square)
