"""What the fuzz test calls: a program for every public operation, module, optimizer and kernel.

A program makes its arguments and calls something with them. Its results, and the arrays that it was
allowed to write to, are those of the definitions, whichever kernels compute them; or it raises.
A `@definition` needs a function that makes its arguments, a method of `Tensor` a call in
`OPERATIONS`; the fuzz test names those that have none.
"""

from __future__ import annotations

import contextvars
import importlib
import inspect
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from fuzz_arguments import Arguments

import micrograd_gpt
from micrograd_gpt import Tensor, functional, layers, nn, no_grad, optim, tensor, variants
from micrograd_gpt.arrays import int8
from micrograd_gpt.arrays.precision import compute_in, hold_in
from micrograd_gpt.arrays.stand_ins import highest_level
from micrograd_gpt.generation.context import next_logits
from micrograd_gpt.generation.filters import likeliest
from micrograd_gpt.generation.kv_cache import KVCache
from micrograd_gpt.gpt2 import GPT2, GPT2Config, through_blocks
from micrograd_gpt.kernels import linear_cross_entropy
from micrograd_gpt.layers import IGNORE
from micrograd_gpt.tensor import concatenate, stack, where

Program = Callable[[Arguments], Any]

PROGRAMS: dict[str, Program] = {}
ARGUMENTS: dict[Any, Callable[[Arguments], Any]] = {}  # by definition


def program(function: Program) -> Program:
    PROGRAMS[function.__name__.replace("_", " ")] = function
    return function


def arguments_of(definition: Any) -> Callable[[Program], Program]:
    def register(make: Program) -> Program:
        ARGUMENTS[definition] = make
        return make

    return register


NEED_AN_EXTRA = (
    "micrograd_gpt.evaluation.harness",
    *(f"micrograd_gpt.runs.{name}" for name in ("exchange", "mpi", "together")),
)


def definitions() -> dict[str, Any]:
    """Every definition of the package by name, those that are methods of a class included."""
    found: dict[int, tuple[str, Any]] = {}
    for info in pkgutil.walk_packages(micrograd_gpt.__path__, "micrograd_gpt."):
        if info.name in NEED_AN_EXTRA:
            continue
        module = importlib.import_module(info.name)
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        for value in [x for owner in (module, *classes) for x in vars(owner).values()]:
            if hasattr(value, "definition") and hasattr(value, "stand_ins"):
                where_it_is = value.__module__.removeprefix("micrograd_gpt.")
                found[id(value)] = f"{where_it_is}.{value.__qualname__}", value
    return dict(found.values())


def with_gradients(a: Arguments, result: Any) -> Any:
    """The result of an operation, then what its backward adds to the leaves."""
    for leaf in a.leaves:
        if a.chance(a.rate / 10):  # a gradient that was there before, of its own memory
            grad = a.array(*leaf.shape, written=True, finite=True)
            held = [array for other in a.leaves for array in (other.data, other.grad)]
            shared = any(np.may_share_memory(grad, array) for array in held if array is not None)
            leaf.grad = None if shared else grad
    if isinstance(result, Tensor) and result.requires_grad and a.chance(0.9):
        result.backward(a.array(*result.shape, finite=True))
        return [result, *(leaf.grad for leaf in a.leaves)]
    return result


def calling(definition: Any) -> Program:
    """The program that calls a definition with the arguments made for it."""

    def call(a: Arguments) -> Any:
        arguments = ARGUMENTS[definition](a)
        if a.chance(0.05):
            names = inspect.signature(definition).parameters
            return with_gradients(a, definition(**dict(zip(names, arguments, strict=False))))
        if a.chance(0.1):
            with no_grad():
                return definition(*arguments)
        return with_gradients(a, definition(*arguments))

    return call


# ------------------------------------------------------------------------------------------ layers


@arguments_of(layers.embedding)
def _(a: Arguments) -> Any:
    vocabulary, width = a.sizes(2)
    return a.ids(*a.lead(), below=vocabulary), a.tensor(vocabulary, width)


@arguments_of(layers.linear)
def _(a: Arguments) -> Any:
    k, m = a.sizes(2)
    bias = a.tensor(m) if a.chance(0.7) else None
    return a.tensor(*a.lead(), k), a.tensor(k, m), bias


@arguments_of(layers.layer_norm)
def _(a: Arguments) -> Any:
    width = a.size()
    x = a.tensor(*a.lead(), width)
    return x, a.tensor(width), a.tensor(width), a.number(1e-5, 0.1)


@arguments_of(variants.silu)
def _(a: Arguments) -> Any:
    return a.tensor(*a.lead(), a.size()), a.number(1.0, 1.702)


@arguments_of(variants.scaled_queries)
def _(a: Arguments) -> Any:
    return a.tensor(*a.lead(), 3 * a.size()), a.number(1.0, 0.25)


@arguments_of(variants.exact_gelu)
@arguments_of(layers.gelu)
@arguments_of(layers.softmax)
@arguments_of(layers.log_softmax)
def _(a: Arguments) -> Any:
    return (a.tensor(*a.lead(), a.size()),)


def heads(a: Arguments, make: Callable[..., Any], older: bool = True) -> list[Any]:
    """Queries (B, H, T, D), keys and values (B, H, S, D), mostly with S >= T."""
    a.masks = True
    b, h, d = a.size(4), a.size(4), a.size(17)
    t, s = a.size(), a.size(33)
    s = t + (s if older and a.chance(0.5) else 0) - a.chance(a.rate / 4)
    return [make(b, h, t, d), make(b, h, s, d), make(b, h, s, d)]


def dropped(a: Arguments) -> tuple[Any, Any]:
    """A probability of dropout and a key."""
    return (a.number(0.3, 0.5), a.key()) if a.chance(0.25) else (0.0, ())


@arguments_of(layers.attention)
def _(a: Arguments) -> Any:
    leaf = a.chance(0.3)
    return *heads(a, lambda *shape: a.tensor(*shape, leaf=leaf)), *dropped(a)


@arguments_of(layers.self_attention)
def _(a: Arguments) -> Any:
    a.masks = True
    b, t, h, d = a.size(4), a.size(), a.size(4), a.size(17)
    return a.tensor(b, t, 3, h, d), *dropped(a)


@arguments_of(layers.dropout_forward)
def _(a: Arguments) -> Any:
    return a.array(*a.lead(), a.size()), a.number(0.2, 0.5), a.key()


@arguments_of(layers.cross_entropy)
def _(a: Arguments) -> Any:
    lead, vocabulary = a.lead(), a.size()
    return a.tensor(*lead, vocabulary), a.ids(*lead, below=vocabulary, ignore=True)


@arguments_of(layers.linear_cross_entropy)
def _(a: Arguments) -> Any:
    lead, width, vocabulary = a.lead(), a.size(), a.size()
    x, weight = a.tensor(*lead, width), a.tensor(vocabulary, width)
    return x, weight, a.ids(*lead, below=vocabulary, ignore=True)


@program
def dropout(a: Arguments) -> Any:
    x = a.tensor(*a.lead(), a.size())
    return with_gradients(a, layers.dropout(x, a.number(0.2, 0.5), a.key()))


# ------------------------------------------------------------------------- the same on arrays


@arguments_of(functional.linear_forward)
def _(a: Arguments) -> Any:
    n, k, m = a.sizes(3)
    return a.array(n, k), a.array(k, m), a.array(m) if a.chance(0.7) else None


@arguments_of(int8.product)
def _(a: Arguments) -> Any:
    n, k, m = a.sizes(3)
    return a.array(n, k), int8.quantised(a.array(k, m), a.pick((0, 1)))


@arguments_of(functional.linear_backward)
def _(a: Arguments) -> Any:
    n, k, m = a.sizes(3)
    return a.array(n, m), a.array(n, k), a.array(k, m)


@arguments_of(functional.layer_norm_forward)
def _(a: Arguments) -> Any:
    n, width = a.sizes(2)
    return a.array(n, width), a.array(width), a.array(width), a.number(1e-5, 0.1)


@arguments_of(functional.layer_norm_backward)
def _(a: Arguments) -> Any:
    n, width = a.sizes(2)
    statistics = a.array(n, 1), a.array(n, 1, positive=True)
    return a.array(n, width), a.array(n, width), a.array(width), *statistics


@arguments_of(functional.gelu_forward)
def _(a: Arguments) -> Any:
    return (a.array(*a.lead(), a.size()),)


@arguments_of(functional.gelu_backward)
def _(a: Arguments) -> Any:
    shape = *a.lead(), a.size()
    return a.array(*shape), a.array(*shape)


@arguments_of(functional.attention_forward)
def _(a: Arguments) -> Any:
    return *heads(a, a.array), *dropped(a)


@arguments_of(functional.attention_backward)
def _(a: Arguments) -> Any:
    a.masks = True
    b, h, t, d = a.size(4), a.size(4), a.size(), a.size(17)
    q, k, v, grad = (a.array(b, h, t, d) for _ in range(4))
    p, key = dropped(a)
    try:
        saved = functional.attention_forward.definition(q, k, v, p, key)
    except Exception:  # with wrong arguments, no forward says what was saved
        return grad, q, k, v, a.array(b, h, t, d), a.array(b, h, t), p, key
    out, log_total = (a.spoil(a.place(array.astype(a.dtype))) for array in saved)
    return grad, q, k, v, out, log_total, p, key


@arguments_of(functional.cross_entropy_forward)
def _(a: Arguments) -> Any:
    n, vocabulary = a.sizes(2)
    return a.array(n, vocabulary), a.ids(n, below=vocabulary, ignore=True)


@arguments_of(linear_cross_entropy.linear_cross_entropy_forward)
def _(a: Arguments) -> Any:
    n, width, vocabulary = a.sizes(3)
    x, weight = a.array(n, width), a.array(vocabulary, width)
    return x, weight, a.ids(n, below=vocabulary, ignore=True), a.pick((True, False))


@arguments_of(tensor.add_at)
def _(a: Arguments) -> Any:
    n, width = a.sizes(2)
    total = a.array(n, width, written=True)
    if a.chance(0.6):
        rows = a.lead()
        return total, a.ids(*rows, below=n), a.array(*rows, width)
    index = a.index(n, width)
    return total, index, a.array(*np.shape(np.zeros((n, width))[index]))


# ------------------------------------------------------------------------------------- optimizer


def gradient_of(a: Arguments, shape: tuple[int, ...], order: str = "C") -> Any:
    grad = a.array(*shape, written=True)
    return np.asfortranarray(grad) if order == "F" and isinstance(grad, np.ndarray) else grad


@arguments_of(optim.adamw_update)
def _(a: Arguments) -> Any:
    rows = []
    for _ in range(a.pick((1, 2, 5))):
        shape = tuple(a.lead())
        p, m = (a.array(*shape, written=True) for _ in range(2))
        v = a.array(*shape, written=True, positive=True)
        rows.append((p, a.array(*shape), m, v, a.number(0.0, 0.1)))
    settings = a.number(1e-3, 0.1), a.number(0.9, 0.0), a.number(0.95, 0.999)
    return rows, *settings, a.number(1e-8, 1e-3), a.number(1, 2, 1000)


@arguments_of(optim.clip_grad_norm)
def _(a: Arguments) -> Any:
    parameters = []
    for _ in range(a.pick((0, 1, 2, 5))):
        shape = tuple(a.lead())
        parameter = Tensor(np.zeros(shape, a.dtype), requires_grad=True)
        parameter.grad = None if a.chance(0.1) else gradient_of(a, shape)
        parameters.append(parameter)
    return parameters, a.number(1.0, 0.1, 1e6), a.number(1.0, 1024.0)


@program
def training_with_changed_parameters(a: Arguments) -> Any:
    """Steps of AdamW, between which somebody replaces data, gradients or moments."""
    shapes = [tuple(a.lead()) for _ in range(a.pick((1, 3)))]
    parameters = [Tensor(a.array(*shape, written=True), requires_grad=True) for shape in shapes]
    optimizer = optim.AdamW(parameters, lr=a.number(0.1, 0.01), eps=1e-4)
    for step in range(3):
        for i, (shape, parameter) in enumerate(zip(shapes, parameters, strict=True)):
            parameter.grad = a.array(*shape, written=True)
            if step and a.chance(0.3):
                replaced = a.array(*shape, written=True, positive=True)
                what = a.pick(("data", "grad", "m", "v"))
                if what in ("data", "grad"):
                    setattr(parameter, what, replaced)
                else:
                    getattr(optimizer, what)[i] = replaced
        norm = optim.clip_grad_norm(parameters, a.number(1.0, 100.0)) if a.chance(0.5) else 0.0
        optimizer.step()
    return [norm, *(p.data for p in parameters), *optimizer.m, *optimizer.v]


# ------------------------------------------------------------------------- operations of Tensor


@arguments_of(Tensor.__pow__)
def _(a: Arguments) -> Any:
    x = a.tensor(*a.lead(), positive=a.chance(0.7))
    return x, a.number(2, 0.5, -1, 0, 3, True) if a.chance(0.7) else operand(a, x.shape)


@arguments_of(Tensor.__matmul__)
def _(a: Arguments) -> Any:
    n, k, m = a.sizes(3)
    batch = a.sizes(2, 4)
    left = a.pick(((k,), (n, k), (*batch, n, k), (1, n, k)))
    right = a.pick(((k,), (k, m), (*batch, k, m), (batch[1], k, m)))
    return a.tensor(*left), a.tensor(*right) if a.chance(0.8) else a.array(*right)


def axis(a: Arguments, ndim: int) -> Any:
    return a.pick((None, 0, -1, ndim - 1, ndim + a.chance(a.rate), (0, -1), (0, 0), 1.5, ()))


@arguments_of(Tensor.sum)
@arguments_of(Tensor.mean)
def _(a: Arguments) -> Any:
    x = a.tensor(*a.lead(), a.size())
    return x, axis(a, x.ndim), a.pick((False, True))


def operand(a: Arguments, shape: tuple[int, ...]) -> Any:
    """A tensor, an array or a number that combines with a tensor of this shape."""
    other = tuple(a.pick((n, n, 1)) for n in shape)[a.pick((0, 0, 1)) :]
    kind = a.pick(("tensor", "tensor", "array", "number"))
    if kind == "number":
        return a.number(2, 0.5, True, np.float32(3), np.float64(3), np.int64(2))
    return a.tensor(*other) if kind == "tensor" else a.array(*other)


def two_sided(name: str) -> Program:
    def call(a: Arguments) -> Any:
        shape = *a.lead(), a.size()
        x = a.tensor(*shape)
        return with_gradients(a, getattr(x, name)(operand(a, shape)))

    return call


def one_sided(name: str) -> Program:
    def call(a: Arguments) -> Any:
        return with_gradients(a, getattr(a.tensor(*a.lead(), positive=a.chance(0.7)), name)())

    return call


OPERATIONS: dict[str, Program] = {
    **{name: two_sided(name) for name in ("__add__", "__sub__", "__mul__", "__truediv__")},
    **{name: two_sided(name) for name in ("__radd__", "__rsub__", "__rmul__", "__rtruediv__")},
    "__rpow__": two_sided("__rpow__"),
    **{
        name: two_sided(name)
        for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
    },
    **{
        name: one_sided(name)
        for name in ("exp", "log", "sqrt", "tanh", "sigmoid", "relu", "__neg__", "__abs__")
    },
    **{name: one_sided(name) for name in ("item", "numpy", "detach")},
    **{name: one_sided(name) for name in ("__bool__", "__len__", "__repr__")},
    **{name: one_sided(name) for name in ("__int__", "__float__", "__array__")},
}


def operation(name: str) -> Callable[[Program], Program]:
    def register(call: Program) -> Program:
        OPERATIONS[name] = call
        return call

    return register


@operation("__rmatmul__")
def _(a: Arguments) -> Any:
    n, k, m = a.sizes(3)
    return with_gradients(a, a.array(*a.pick(((k,), (n, k)))) @ a.tensor(k, m))


@operation("__iter__")
def _(a: Arguments) -> Any:
    items = list(a.tensor(*a.lead(), a.size()))
    return with_gradients(a, sum(items[1:], items[0] * 2))


@operation("__format__")
def _(a: Arguments) -> Any:
    return format(a.tensor(*a.lead()), a.pick((".2f", "", ">9", "d")))


@operation("max")
def _(a: Arguments) -> Any:
    x = a.tensor(*a.lead(), a.size())
    return with_gradients(a, x.max(axis(a, x.ndim), a.pick((False, True))))


@operation("reshape")
def _(a: Arguments) -> Any:
    x = a.tensor(*a.sizes(3, 8))
    b, c, d = (*x.shape, 1, 1, 1)[:3]
    return with_gradients(a, x.reshape(*a.pick(((-1,), (b * c, d), (b, -1), ((d, c, b),), (7,)))))


@operation("transpose")
def _(a: Arguments) -> Any:
    x = a.tensor(*a.sizes(3, 8))
    return with_gradients(
        a, x.transpose(*a.pick(((), (1, 0, 2), ((2, 0, 1),), (0, -1), (0, 0, 1))))
    )


@operation("swapaxes")
def _(a: Arguments) -> Any:
    return with_gradients(a, a.tensor(*a.sizes(3, 8)).swapaxes(a.pick((0, -1, 5)), a.pick((1, 2))))


@operation("__getitem__")
def _(a: Arguments) -> Any:
    shape = a.sizes(2, 17)
    return with_gradients(a, a.tensor(*shape)[a.index(*shape)])


@operation("astype")
def _(a: Arguments) -> Any:
    dtype = a.pick(("float16", "float32", "float64", "bfloat16", "int32", "bool"))
    return with_gradients(a, a.tensor(*a.lead()).astype(dtype))


@operation("to")
def _(a: Arguments) -> Any:
    return with_gradients(a, a.tensor(*a.lead()).to(a.pick(("cpu", "cpu", "nowhere"))))


@operation("backward")
def _(a: Arguments) -> Any:
    x = a.tensor(*a.lead())
    y = x * 2 + x
    y.backward(a.array(*y.shape) if a.chance(0.8) else None)
    return [leaf.grad for leaf in a.leaves]


@program
def where_of_tensors(a: Arguments) -> Any:
    shape = *a.lead(), a.size()
    mask = a.place(a.rng.random(shape) < 0.5) if a.chance(0.7) else a.array(*shape)
    return with_gradients(a, where(mask, a.tensor(*shape), operand(a, shape)))


@program
def concatenate_tensors(a: Arguments) -> Any:
    shape = a.sizes(2, 8)
    parts = [a.tensor(*shape) for _ in range(a.pick((1, 2, 3)))]
    return with_gradients(a, concatenate(parts, a.pick((0, 1, -1, 2))))


@program
def stack_tensors(a: Arguments) -> Any:
    shape = a.lead()
    parts = [a.tensor(*shape) for _ in range(a.pick((1, 2, 3)))]
    return with_gradients(a, stack(parts, a.pick((0, 1, -1, -2, 5))))


@program
def data_of_a_tensor_changed_before_backward(a: Arguments) -> Any:
    """Arrays that a backward needs get other contents, or the tensor another array: the gradients
    are of no use, but nothing else may break."""
    n, k, m = a.sizes(3)
    x, w, b = (
        Tensor(a.array(*s, written=True), requires_grad=True) for s in ((n, k), (k, m), (m,))
    )
    y = layers.gelu(layers.layer_norm(layers.linear(x, w, b), b, b))
    changed = a.pick((x, w, b))
    if a.chance(0.5):
        changed.data[...] = a.array(*changed.shape)
    else:
        changed.data = a.array(*changed.shape)
    y.sum().backward()
    return None


# ----------------------------------------------------------- what is changed before the backward


def changed_ids(a: Arguments, ids: Any, vocabulary: int) -> None:
    """What a reused batch buffer may hold when the backward comes."""
    if isinstance(ids, np.ndarray) and ids.flags.writeable and ids.dtype.kind in "iu" and ids.ndim:
        kind = a.pick(("ignored", "beyond", "others", "negative"))
        new: Any = {"ignored": IGNORE, "beyond": vocabulary + 7, "negative": -3}.get(kind)
        if kind == "others":
            new = a.rng.integers(0, vocabulary, ids.shape)
        part = ids if a.chance(0.5) else ids[: ids.shape[0] // 2 + 1]
        new = np.broadcast_to(np.asarray(new, "int64"), ids.shape)[: len(part)].astype(ids.dtype)
        a.disturb(lambda: part.__setitem__(..., new))


@program
def ids_changed_before_backward(a: Arguments) -> Any:
    vocabulary, width = a.sizes(2)
    ids = a.ids(*a.lead(), below=vocabulary, written=True)
    y = layers.embedding(ids, a.tensor(vocabulary, width))
    cotangent = a.array(*y.shape)
    changed_ids(a, ids, vocabulary)
    y.backward(cotangent)
    return [y, *(leaf.grad for leaf in a.leaves)]


@program
def targets_changed_before_backward(a: Arguments) -> Any:
    lead, width, vocabulary = a.lead(), a.size(), a.size()
    targets = a.ids(*lead, below=vocabulary, ignore=True, written=True)
    x, weight = a.tensor(*lead, width), a.tensor(vocabulary, width)
    if a.chance(0.5):
        loss = layers.linear_cross_entropy(x, weight, targets)
    else:
        loss = layers.cross_entropy(layers.linear(x, weight.T), targets)
    changed_ids(a, targets, vocabulary)
    loss.backward()
    return [loss, *(leaf.grad for leaf in a.leaves)]


@program
def mask_changed_before_backward(a: Arguments) -> Any:
    shape = *a.lead(), a.size()
    mask = a.place(a.rng.random(shape) < 0.5, written=True)
    y = where(mask, a.tensor(*shape), a.tensor(*shape))
    if mask.flags.writeable:
        a.disturb(lambda: np.logical_not(mask, out=mask))
    y.backward(np.ones(y.shape))
    return [y, *(leaf.grad for leaf in a.leaves)]


@program
def index_changed_before_backward(a: Arguments) -> Any:
    n, m = a.sizes(2, 17)
    rows, columns = (a.ids(4, below=length, written=True) for length in (n, m))
    y = a.tensor(n, m)[a.pick((rows, (rows, columns), (slice(None), columns)))]
    changed_ids(a, rows, n)
    changed_ids(a, columns, m)
    y.backward(np.ones(y.shape))
    return [y, *(leaf.grad for leaf in a.leaves)]


@program
def a_step_before_the_second_backward(a: Arguments) -> Any:
    """Two losses of the same parameters: the optimizer's step comes between their backwards."""
    n, k, m = a.sizes(3, 33)
    x, weight = a.array(n, k), Tensor(a.array(k, m, written=True), requires_grad=True)
    first, second = (layers.gelu(layers.linear(Tensor(x), weight)) @ weight.T for _ in range(2))
    first.sum().backward()
    optimizer = optim.AdamW([weight], lr=0.1)
    a.disturb(optimizer.step)
    weight.grad = None
    second.sum().backward()
    return [weight.grad]


# ------------------------------------------------------------------------------------- modules


def spoil_parameters(a: Arguments, model: Any) -> None:
    """A model's parameters lie within guarded memory; at times one has another shape or type."""
    for _, parameter in model.named_parameters():
        old = parameter.data
        if a.chance(a.rate / 10):
            new = a.array(*old.shape, finite=True)
            is_whole = getattr(new, "dtype", old.dtype).kind in "iub"  # gradients would be, too
            parameter.data = old if is_whole else new
        elif a.chance(0.3):
            parameter.data = a.place(old, a.pick(("Fortran", "in order", "gaps", "read-only")))


@program
def modules(a: Arguments) -> Any:
    n_in, n_out, vocabulary = a.sizes(3, 33)
    init = nn.normal(0)
    linear, norm = nn.Linear(n_in, n_out, init), nn.LayerNorm(n_out, a.number(1e-5, 0.1))
    table = nn.Embedding(vocabulary, n_in, init)
    drop = nn.Dropout(a.number(0.0, 0.4), nn.Draws(1))
    for part in (linear, norm, table):
        hold_in(part, a.dtype.name)
        spoil_parameters(a, part)
    y = drop(norm(linear(table(a.ids(*a.lead(), below=vocabulary)))))
    y.backward(a.array(*y.shape, finite=True))
    return [y, *(p.grad for part in (linear, norm, table) for p in part.parameters())]


def small_model(a: Arguments, **settings: Any) -> GPT2:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 8, **settings}
    a.masks = True
    model = GPT2(GPT2Config(**shape), seed=1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 12
    if a.dtype.itemsize != 4:
        hold_in(model, a.dtype.name)
    spoil_parameters(a, model)
    return model


@program
def loss_of_a_model(a: Arguments) -> Any:
    model = small_model(a, attn_pdrop=a.pick((0.0, 0.3)))
    b, t = a.size(4), a.size(8)
    ids, targets = a.ids(b, t, below=11), a.ids(b, t, below=11, ignore=True)
    dtype = a.pick(("float32", "float32", "float32", "bfloat16"))
    a.rounded_to(2 if dtype == "bfloat16" else 4)
    with compute_in(dtype):
        loss = model.loss(ids, targets)
        loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


@program
def logits_of_a_model(a: Arguments) -> Any:
    model = small_model(a)
    model.train(a.chance(0.5))
    logits = model(a.ids(a.size(4), a.size(8), below=11), last_only=a.chance(0.5))
    return [logits]


@program
def a_batch_buffer_used_again(a: Arguments) -> Any:
    """Losses of several batches from one buffer, whose backwards come after the last forward."""
    model = small_model(a)
    batch = a.place(a.rng.integers(0, 11, (2, 9)), "in order", written=True)
    first = model.loss(batch[:, :-1], batch[:, 1:])
    changed_ids(a, batch, 11)
    first.backward()
    return [first, *(p.grad for p in model.parameters())]


def filled_cache(a: Arguments, model: GPT2, rows: int) -> Any:
    cache = KVCache(model, rows, a.pick((None, 8, 5)))
    cache.data[...] = 0
    cache.data = a.place(cache.data, "in order", written=True)
    return cache


def spoil_cache(a: Arguments, cache: Any, model: GPT2) -> Any:
    """Lengths set by hand, data replaced, or the cache of another model."""
    how = a.pick(("lengths", "data", "longer", "model", "rows", "read-only", "types"))
    a.note(how, "a cache with wrong")
    if how == "lengths":
        cache.lengths[a.pick((slice(None), 0))] = a.pick((-5, -1, 7, 8, 9, 10**9, 2**62, -(2**62)))
    elif how == "data":
        cache.data = a.array(*cache.data.shape, written=True, finite=True)
    elif how == "longer":
        odd = (np.zeros(9, int), np.zeros(0, int), np.zeros((2, 1), int), [0, 0], 3, None)
        cache.lengths = a.pick(odd)
    elif how == "model":
        shape = a.pick(({"n_layer": 1}, {"n_head": 4}, {"n_embd": 16}, {"n_layer": 3}))
        cache = KVCache(small_model(a, **shape), len(cache.lengths), 8)
        cache.data[...] = 0
    elif how == "rows":
        cache = cache.rows(0, a.pick((0, 1)))
    elif how == "read-only":
        cache.data.flags.writeable = False
    else:
        cache.lengths = cache.lengths.astype(a.pick(("float32", "int8", "uint64", "bool", ">i4")))
    return cache


@program
def decoding_with_a_cache(a: Arguments) -> Any:
    model, rows = small_model(a), a.size(4)
    cache = filled_cache(a, model, rows)
    results = []
    with no_grad():
        model.eval()
        results.append(model(a.ids(rows, a.pick((1, 2, 3)), below=11), cache))
        if a.chance(max(0.1, a.rate)):
            cache = spoil_cache(a, cache, model)
        for _ in range(a.pick((1, 2))):
            if a.chance(0.3):
                spoil_parameters(a, model)
            results.append(model(a.ids(rows, 1, below=11), cache))
    return [*results, cache.lengths]


@arguments_of(through_blocks)
def _(a: Arguments) -> Any:
    model, rows = small_model(a), a.size(4)
    model.train(a.rate > 0.2)
    cache = filled_cache(a, model, rows) if a.chance(0.8) else None
    if cache is not None and a.chance(a.rate):
        cache = spoil_cache(a, cache, model)
    if cache is not None:
        for parameter in model.parameters():
            parameter.requires_grad = a.rate > 0.4
    x = a.tensor(rows, a.pick((1, 1, 2, 3, 8)), 8, leaf=cache is None)
    return x, model.transformer.h, cache


@arguments_of(next_logits)
def _(a: Arguments) -> Any:
    model, rows = small_model(a).eval(), a.size(4)
    for parameter in model.parameters():
        parameter.requires_grad = False
    cache = filled_cache(a, model, rows)
    cache = spoil_cache(a, cache, model) if a.chance(a.rate) else cache
    return cache, model, a.ids(rows, a.pick((1, 1, 2, 3)), below=11)


@arguments_of(likeliest)
def _(a: Arguments) -> Any:
    return a.array(a.size(4), a.size(3), a.size(9)), a.pick((None, 1, 5, 20))


@program
def rows_of_a_cache(a: Arguments) -> Any:
    model = small_model(a)
    cache = filled_cache(a, model, 3)
    cache.lengths[:] = a.rng.integers(0, 5, 3)
    if a.chance(a.rate):
        cache = spoil_cache(a, cache, model)
    cache.copy_rows(a.rng.integers(-1, 4, a.pick((1, 3, 4))).tolist(), a.pick((0, 1, -1, 9)))
    part = cache.rows(a.pick((0, 1, 5)), a.pick((1, 2, 9)))
    return [part.data, part.lengths, part.length]


@program
def generating(a: Arguments) -> Any:
    model = small_model(a, n_head=2)
    settings: dict[str, Any] = a.pick(
        (
            {},
            {"num_beams": 2},
            {"num_samples": 2, "temperature": 0.8, "top_k": 3},
            {"temperature": 1.0, "top_p": 0.8},
            {"use_cache": False},
            {"speculate": 2},
            {"no_repeat_ngram_size": 1, "end_of_text": 3},
        )
    )
    ids = a.ids(*a.pick(((3,), (2, 3), (1, 1), (2, 12))), below=11)
    if a.chance(0.1):
        ids = [a.ids(a.size(8), below=11), a.ids(a.size(8), below=11)]
    count = a.number(1, 4, 9)
    count = 9 if isinstance(count, int) and count > 9 else count
    texts = model.generate(ids, **{"temperature": 0, "max_new_tokens": count, **settings})
    return texts if a.dtype.itemsize >= 4 else [np.shape(text) for text in texts]


# ------------------------------------------------------------------------------------- threads


@program
def labels_changed_by_another_thread(a: Arguments) -> Any:
    """Losses while another thread writes labels within and beyond the vocabulary: any result, or an
    error, but the process lives."""
    n, width, vocabulary = a.pick((33, 260)), 8, a.pick((5, 260))
    labels = a.place(a.rng.integers(0, vocabulary, n), "in order", written=True)
    x, weight = (
        Tensor(a.place(a.rng.random((rows, width), np.float32)), requires_grad=True)
        for rows in (n, vocabulary)
    )
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for label in (10**9, -(10**9), 0, IGNORE, vocabulary):
                labels[:] = label

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            try:
                layers.linear_cross_entropy(x, weight, labels).backward()
                functional.cross_entropy_forward((x @ weight.T).data, labels)
                layers.embedding(labels, weight).sum().backward()
            except (ValueError, IndexError):
                continue
    finally:
        done.set()
        thread.join()
    return None


@program
def losses_in_several_threads(a: Arguments) -> Any:
    """Each of several threads computes a loss of one model's parameters, and all are equal."""
    model = small_model(a)
    ids, targets = a.ids(2, 8, below=11), a.ids(2, 8, below=11, ignore=True)
    expected = model.loss(ids, targets).item()
    found: list[float] = []

    def compute() -> None:
        for _ in range(3):
            found.append(model.loss(ids, targets).item())

    contexts = [contextvars.copy_context() for _ in range(3)]
    threads = [threading.Thread(target=context.run, args=(compute,)) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(found, [expected] * 9, equal_nan=True), (found, expected)
    return [expected]


# --------------------------------------------------------------------------------------------------


def missing() -> Iterator[str]:
    """Definitions without a function that makes their arguments, uncalled methods of Tensor."""
    for name, definition in definitions().items():
        if definition not in ARGUMENTS:
            yield name
    for name, value in vars(Tensor).items():
        tested = name in OPERATIONS or value in ARGUMENTS if callable(value) else True
        is_private = name.startswith("_") and not name.startswith("__")
        apart = ("__init__", "__hash__")
        if not tested and not is_private and name not in apart:
            yield f"Tensor.{name}"


PROGRAMS |= {f"Tensor.{name}": call for name, call in OPERATIONS.items()}
PROGRAMS |= {
    name: calling(definition)
    for name, definition in definitions().items()
    if definition in ARGUMENTS
}
PROGRAMS = dict(sorted(PROGRAMS.items()))


# ------------------------------------------------- programs with mistakes, which must be found


def dies(a: Arguments) -> None:
    os.abort()


def writes_beside_its_array(a: Arguments) -> None:
    array = a.place(np.zeros(5), "in order", written=True)
    np.lib.stride_tricks.as_strided(array, (6,))[5] = 1


def writes_into_its_input(a: Arguments) -> None:
    a.place(np.zeros(5), "in order")[2] = 1


def raises_an_error_of_the_interpreter(a: Arguments) -> None:
    raise SystemError("error return without exception set")


def returns_something_else_with_kernels(a: Arguments) -> Any:
    return np.arange(3.0) + (highest_level() == "numpy") / 10


def returns_where_the_definition_raises(a: Arguments) -> Any:
    if highest_level() == "definitions":
        raise ValueError("the shapes do not fit")


def follows_what_is_changed_later(a: Arguments) -> Any:
    ids = a.place(np.arange(4), "in order", written=True)
    a.disturb(lambda: ids.fill(-1))
    return ids


def is_fine(a: Arguments) -> Any:
    return a.rng.random(3)


MISTAKES: dict[str, Program] = {
    function.__name__.replace("_", " "): function
    for function in (
        is_fine,
        dies,
        writes_beside_its_array,
        writes_into_its_input,
        raises_an_error_of_the_interpreter,
        returns_something_else_with_kernels,
        returns_where_the_definition_raises,
        follows_what_is_changed_later,
    )
}
