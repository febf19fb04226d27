# %% [markdown]
# # 1. A number's gradient
#
# **Afterwards you can** say what a gradient is, work one out by hand with the chain rule, and
# build the machine that does it for you: a *tape*, in forty lines. You will then find the same
# machine in `micrograd_gpt/tensor.py`, where it trains GPT-2.
#
# **The idea.** A model learns by asking, of each of its numbers: *if I made you a little larger,
# would the error grow or shrink, and how fast?* The answer is a slope, called the **gradient**.
# Each operation knows its own small slope. The chain rule multiplies slopes along a path, and adds
# up the paths. That is all of it.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np

from micrograd_gpt import Tensor

# %% [markdown]
# ## One prediction and its error
#
# Suppose someone does not know how Fahrenheit is made from Celsius, and believes that it is
# `w * x + b` for some numbers `w` and `b`. (To keep the numbers small, we count both in tens of
# degrees.) The first guess is `w = 1`, `b = 1`. At 20 °C, which is 68 °F, it says 30 °F and is far
# off. We measure how far by the square of the difference, and call it the *loss*.


# %%
def loss_at(w, b, x=2.0, y=6.8):
    prediction = w * x + b
    error = prediction - y
    return error**2


print(f"the loss is {loss_at(1, 1):.2f}")

# %% [markdown]
# Which way should `w` go? The honest, slow answer: try it. Move `w` by a tiny step and look at what
# the loss does. A step to each side is more accurate than one to a single side; this is called a
# **central difference**, and it will be our judge from now on.

# %%
step = 1e-4
slope_w = (loss_at(1 + step, 1) - loss_at(1 - step, 1)) / (2 * step)
slope_b = (loss_at(1, 1 + step) - loss_at(1, 1 - step)) / (2 * step)
print(f"slope for w: {slope_w:.3f}    slope for b: {slope_b:.3f}")

# %% [markdown]
# Both are negative: making `w` or `b` larger makes the loss smaller. And `w` counts twice as much,
# because it is multiplied by `x = 2` on its way.
#
# GPT-2 has 124 million such numbers. Trying each one would take 248 million runs of the model for
# *one* step of learning. We need all slopes at once.
#
# ## The chain rule, on paper
#
# The loss is made in three small steps, and each has a slope that school taught:
#
# | step | its slope |
# | --- | --- |
# | `prediction = w * x + b` | towards `w` it is `x`, towards `b` it is 1 |
# | `error = prediction - y` | towards `prediction` it is 1 |
# | `loss = error ** 2` | towards `error` it is `2 * error` |
#
# If `w` moves by a little, `prediction` moves `x` times as much, `error` just as much as that, and
# `loss` moves `2 * error` times as much as that. So the slopes along the way are **multiplied**:

# %%
error = 1 * 2.0 + 1 - 6.8
by_hand_w = 2 * error * 1 * 2.0  # loss to error, error to prediction, prediction to w
by_hand_b = 2 * error * 1 * 1
print(f"by hand: {by_hand_w:.3f} and {by_hand_b:.3f}")
assert math.isclose(by_hand_w, slope_w, rel_tol=1e-6)
assert math.isclose(by_hand_b, slope_b, rel_tol=1e-6)

# %% [markdown]
# Look at the two products: `2 * error * 1` stands in both. Whoever starts **at the loss** and walks
# backwards works that part out once, and every number above gets its share of it. This is why one
# walk is enough for 124 million slopes. Computing the loss is called the *forward*, and this walk
# the *backward*.
#
# One case is missing: a number that is used twice. In `w * w`, if `w` moves by a little, the
# product moves `w` times as much because of the first factor, and as much again because of the
# second. The slopes of the two paths **add up**, to `2 * w`, which is what school says of the slope
# of $w^2$.
#
# ## A tape
#
# Now let the computer do the paperwork. A `Number` remembers which numbers it was made from, and
# its slope towards each. The forward then leaves a record behind, the *tape*, and `backward` walks
# it from the end to the beginning.


# %%
class Number:
    """A value that remembers how it was made."""

    def __init__(self, value, name="", parents=()):
        self.value, self.name = value, name
        self.parents = parents  # pairs: a number that went in, and the slope towards it
        self.grad = 0.0  # the slope of the loss towards this number, once it is known

    def __add__(self, other):
        other = as_number(other)
        return Number(self.value + other.value, "+", [(self, 1.0), (other, 1.0)])

    def __mul__(self, other):
        other = as_number(other)
        slopes = [(self, other.value), (other, self.value)]
        return Number(self.value * other.value, "×", slopes)

    def __pow__(self, n):
        return Number(self.value**n, f"power {n}", [(self, n * self.value ** (n - 1))])

    def tanh(self):
        t = math.tanh(self.value)
        return Number(t, "tanh", [(self, 1 - t * t)])

    def __sub__(self, other):
        return self + as_number(other) * -1.0

    def backward(self):
        self.grad = 1.0  # the loss moves exactly as much as itself
        for number in reversed(tape_below(self)):
            for parent, slope in number.parents:
                parent.grad += number.grad * slope  # multiply along a path, add up the paths


def as_number(x):
    return x if isinstance(x, Number) else Number(float(x))


def tape_below(last):
    """All numbers that went into `last`, each after the numbers it was made from."""
    tape, seen = [], set()

    def visit(number):
        if number not in seen:
            seen.add(number)
            for parent, _ in number.parents:
                visit(parent)
            tape.append(number)

    visit(last)
    return tape


# %% [markdown]
# Two lines deserve a second look.
#
# - `parent.grad += …`, not `=`, for numbers that are used more than once.
# - `reversed(tape_below(self))`. A number may pass its gradient on only when it has *all* of it.
#   The list has every number after those it was made from, so backwards, every number comes after
#   all those that it went into.
#
# Our example again:

# %%
w, b = Number(1.0, "w"), Number(1.0, "b")
loss = (w * Number(2.0, "x") + b - Number(6.8, "y")) ** 2
loss.backward()
print(f"loss {loss.value:.2f}, gradients {w.grad:.3f} and {b.grad:.3f}")
assert math.isclose(w.grad, by_hand_w) and math.isclose(b.grad, by_hand_b)

# %% [markdown]
# Here is that tape as a picture: a box for every number, yellow for those that we put in. (There is
# a −1 among them because `Number` computes `a - b` as `a + b * -1`.) Values flow to the right;
# afterwards the gradients flow back to the left. Follow them from the loss to `w`: the square sends
# −7.6, which is `2 * error`, to the last sum; both sums hand it on unchanged, since their slopes
# are 1; and the product with `x = 2` doubles it. (Code that only draws, here and later, is not
# needed to follow the lesson.)


# %%
def draw(last):
    """The tape below `last`: a box for every number, with its value and its gradient."""
    tape = tape_below(last)
    column, used = {}, {}
    for number in tape:
        column[number] = 1 + max((column[parent] for parent, _ in number.parents), default=-1)
    for number in reversed(tape):  # an input stands right before its first use
        for parent, _ in number.parents:
            used[parent] = min(used.get(parent, 99), column[number])
    places, height = {}, {}
    for number in tape:
        x = column[number] if number.parents else used[number] - 1
        height[x] = height.get(x, 1) - 1
        places[number] = (x, height[x])
    plt.figure(figsize=(10, 3.2))
    for number, place in places.items():
        for parent, _ in number.parents:
            arrow = {"arrowstyle": "->", "color": "gray", "shrinkA": 32, "shrinkB": 34}
            plt.annotate("", place, places[parent], arrowprops=arrow)
        label = f"{number.name or number.value}\nvalue {number.value:.2f}\ngrad {number.grad:.2f}"
        color = "lightyellow" if not number.parents else "white"
        box = {"boxstyle": "round", "facecolor": color, "edgecolor": "gray"}
        plt.text(*place, label, ha="center", va="center", fontsize=9, bbox=box)
    plt.xlim(-0.5, max(x for x, _ in places.values()) + 0.5)
    plt.ylim(min(y for _, y in places.values()) - 0.5, 0.5)
    plt.axis("off")
    plt.show()


draw(loss)

# %% [markdown]
# ## The same in the package
#
# `Tensor` in `micrograd_gpt/tensor.py` is this class, grown up: its values are whole arrays (the
# next lesson), it keeps a function for each operation instead of a ready slope, and its walk is a
# loop where our `visit` calls itself, so that a tape of a million operations is no trouble. The
# heart is the same.
#
# Is the result the same too? Let both compute something winding, in which `a` is used four times,
# from many random numbers. A `Tensor` records only what depends on those with `requires_grad=True`.


# %%
def winding(a, b):
    c = a * b + b**3
    d = (c - a).tanh() * a
    return d * d + c + a


rng = np.random.default_rng(0)
for values in rng.uniform(-2, 2, size=(100, 2)).tolist():
    a, b = map(Number, values)
    winding(a, b).backward()

    a_tensor, b_tensor = (Tensor(v, requires_grad=True, dtype="float64") for v in values)
    winding(a_tensor, b_tensor).backward()
    assert math.isclose(a.grad, a_tensor.grad, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(b.grad, b_tensor.grad, rel_tol=1e-9, abs_tol=1e-12)
print("100 random points: our gradients and Tensor's are equal")

# %% [markdown]
# ## Learning
#
# With gradients in hand, learning is a loop of three steps: compute the loss, walk back, move each
# number a little *against* its gradient. How little is up to us: the gradient times a small number,
# the **learning rate**. Five readings of two thermometers are enough to discover that a degree
# Celsius is 1.8 degrees Fahrenheit, and that water freezes at 32 of them.

# %%
celsius = [-1.0, 0.0, 1.0, 2.0, 3.0]  # in tens of degrees
fahrenheit = [1.4, 3.2, 5.0, 6.8, 8.6]

learning_rate = 0.02
w, b, losses = Number(1.0), Number(1.0), []
for _ in range(200):
    loss = Number(0.0)
    for x, y in zip(celsius, fahrenheit, strict=True):
        loss = loss + (w * x + b - y) ** 2
    loss.backward()
    losses.append(loss.value)
    w = Number(w.value - learning_rate * w.grad)  # new numbers, whose gradients are 0 again
    b = Number(b.value - learning_rate * b.grad)

print(f"w = {w.value:.3f}, b = {b.value:.3f}, last loss {losses[-1]:.6f}")
plt.figure(figsize=(6, 3))
plt.semilogy(losses)
plt.xlabel("step")
plt.ylabel("loss")
plt.title("Learning Fahrenheit from five readings")
plt.show()
assert abs(w.value - 1.8) < 1e-3 and abs(b.value - 3.2) < 1e-3

# %% [markdown]
# On this scale, where each mark is a thousandth of the one above, the loss falls in a straight
# line: every step removes the same share of what is left. Try a learning rate of 0.06. Every step
# then overshoots by more than it corrects, and the loss explodes.
#
# GPT-2 is trained by this loop. It has more numbers, and a better rule for how far each should move
# (lesson 4), but the loss, the tape and the walk back are what you have just written.
#
# **Read next**, in [`tensor.py`](../micrograd_gpt/tensor.py): `Tensor.__mul__` and `tanh` beside
# ours, and `walk_back` beside our `backward`. The rest of the file comes after lesson 2.
#
# ## Exercises
#
# 1. Write `exp(x)` and `divide(a, b)` for `Number`s, and check the slope of `1 / (1 + exp(-x))` at
#    `x = 0.5` against that of `sigmoid()`, which a `Tensor` has.
# 2. Replace `+=` in `backward` by `=`. For which of these does the gradient of `a` go wrong, and
#    why: `a * 3`, `a + a`, `(a * 2) * (a * 5)`?
# 3. Pass 1.0 through `tanh` thirty times in a row. How large is the gradient that arrives at the
#    beginning? Suppose that a model is thirty layers deep, each with a `tanh`: how would the first
#    layers learn?
#
# ## Solutions
#
# Try first: a wrong attempt teaches more than a right answer that you only read.
#
# **1.** The slope of `exp` is `exp` itself. A quotient is a product with a power of −1, which we
# have.


# %%
def exp(x):
    y = math.exp(x.value)
    return Number(y, "exp", [(x, y)])


def divide(a, b):
    return as_number(a) * as_number(b) ** -1


x = Number(0.5)
divide(1.0, exp(x * -1.0) + 1.0).backward()

x_tensor = Tensor(0.5, requires_grad=True, dtype="float64")
x_tensor.sigmoid().backward()
print(f"{x.grad:.6f} and {x_tensor.grad:.6f}")
assert math.isclose(x.grad, x_tensor.grad)

# %% [markdown]
# **2.** `a * 3` is right either way, since `a` is used once. In the other two, `a` is used twice;
# with `=` the second path overwrites the first. Here is the broken walk:


# %%
def broken_backward(last):
    last.grad = 1.0
    for number in reversed(tape_below(last)):
        for parent, slope in number.parents:
            parent.grad = number.grad * slope


expressions = {
    "a * 3": lambda a: a * 3,
    "a + a": lambda a: a + a,
    "(a * 2) * (a * 5)": lambda a: (a * 2) * (a * 5),
}
for text, expression in expressions.items():
    right, broken = Number(4.0), Number(4.0)
    expression(right).backward()
    broken_backward(expression(broken))
    print(f"{text:18} right {right.grad:5.1f}   with = {broken.grad:5.1f}")
    assert (right.grad == broken.grad) == (text == "a * 3")

# %% [markdown]
# **3.** Every `tanh` multiplies by a slope below 1, so the gradient dwindles with each layer.

# %%
first = Number(1.0)
last = first
for _ in range(30):
    last = last.tanh()
last.backward()
print(f"after 30 times tanh, the gradient is {first.grad:.4f}")
assert 0 < first.grad < 0.01

# %% [markdown]
# Less than a hundredth arrives: the first layers would learn a hundred times more slowly than the
# last. Lesson 6 shows GPT-2's remedy, a path on which nothing is multiplied: the *residual stream*.
