"""Work on gradients that are complete while the backward still computes others.

The backward goes down the tape, from the loss to the leaves. Once it is below every operation that
a parameter went into, nothing is added to that parameter's gradient any more, and it can travel to
the other ranks, which takes a network's time, while the processor computes the next ones. Li et al.
2020 (arXiv:2006.15704) describe the same in PyTorch.

The work is done in a thread: kernels and NumPy leave Python's lock to it, and it keeps a message
moving though an operation takes long. Requests that are looked after between the operations of the
tape need no thread, but the link stands still during each: with 1 Gbit/s between two ranks, on an
Intel Xeon, they saved two thirds of the time that the thread saves. A GPU
needs no thread: it is only told what to do, and its streams go on beside each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from micrograd_gpt.runs.buckets import Bucket
from micrograd_gpt.tensor import LEAF, Array, Node, Tensor, node_of, tape_below

NOWHERE = -1  # below all places on a tape: the backward never comes there


class Overlap:
    """Does some work on each bucket of gradients, one after another, if `in_thread` in a thread.

    The last bucket comes first, as the last parameters' gradients are complete first. That order
    holds on every rank, whatever is complete when: so the ranks' messages fit together.
    """

    def __init__(self, in_thread: bool = True) -> None:
        self._submit = ThreadPoolExecutor(1, "gradients").submit if in_thread else at_once
        self._due: deque[tuple[int, Callable[[], None]]] = deque()  # from which place on, what
        self._handed_over: deque[Future[None]] = deque()
        self.has_begun = False  # so that there is something to finish

    def begin(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        buckets: Sequence[Bucket],
        work: Callable[[Bucket], None],
    ) -> None:
        """Let the backward of `loss`, a step's last, hand over each bucket that is complete."""
        tape = tape_below(node_of(loss))
        lowest = lowest_readers(tape, parameters)
        for bucket in reversed(buckets):
            place = min(lowest[i] for i, _, _ in bucket)
            self._due.append((place, partial(work, bucket)))
        for place, node in enumerate(tape):
            if node.name != LEAF:
                node.backward = self._noticed(place, node.backward)
        self.has_begun = True

    def _noticed(self, place: int, backward: Callable[[Array], Any]) -> Callable[[Array], Any]:
        """The backward of the node at this place, when that of every node above it is done."""

        def notice(grad: Array) -> Any:
            self._hand_over(place)
            return backward(grad)

        return notice

    def _hand_over(self, place: int) -> None:
        """Hand over the buckets that are complete where the backward has come to this place.

        Raises what went wrong in the thread.
        """
        while self._handed_over and self._handed_over[0].done():
            self._handed_over.popleft().result()
        while self._due and self._due[0][0] > place:
            _, work = self._due.popleft()
            self._handed_over.append(self._submit(work))

    def finish(self) -> None:
        """Wait until the work on all buckets is done; raise what went wrong in it."""
        self._hand_over(NOWHERE - 1)
        while self._handed_over:
            self._handed_over.popleft().result()
        self.has_begun = False


def at_once(work: Callable[[], None]) -> Future[None]:
    """What comes of work that is done here and now."""
    work()
    done: Future[None] = Future()
    done.set_result(None)
    return done


def lowest_readers(tape: Sequence[Node], parameters: Sequence[Tensor]) -> list[int]:
    """The lowest place on the tape of an operation that each parameter went into, or NOWHERE."""
    lowest: dict[int, int] = {}
    for place, node in enumerate(tape):
        for parent in node.parents:
            if parent and parent.name == LEAF:
                lowest.setdefault(id(parent.backward.__self__), place)
    return [lowest.get(id(parameter), NOWHERE) for parameter in parameters]
