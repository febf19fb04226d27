"""Work on gradients that are complete while the backward still computes others.

The backward goes down the tape, from the loss to the leaves. Once it is below every operation that
a parameter went into, nothing is added to that parameter's gradient any more, and it can travel to
the other ranks, which takes a network's time, while the processor computes the next ones. Li et al.
2020 (arXiv:2006.15704) describe the same in PyTorch.

The work is done in a thread: kernels and NumPy leave Python's lock to it, and it keeps a message
moving though an operation takes long. (Requests that are only looked after between operations of
the tape were tried too: a link then stands still during each.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from micrograd_gpt.tensor import LEAF, Array, Node, Tensor, node_of, tape_below

Bucket: TypeAlias = Sequence[tuple[int, int, int]]  # pieces of gradients: (parameter, start, end)


class Overlap:
    """Does some work on each bucket of gradients, in a thread, one after another.

    The last bucket comes first, as the last parameters' gradients are complete first. That order
    holds on every rank, whatever is complete when: so the ranks' messages fit together.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "gradients")
        self._work: Callable[[Bucket], None] | None = None
        self._due: deque[tuple[int, Bucket]] = deque()
        self._done: deque[Future[None]] = deque()

    @property
    def has_begun(self) -> bool:
        """Whether there is something to finish."""
        return self._work is not None

    def begin(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        buckets: Sequence[Bucket],
        work: Callable[[Bucket], None],
    ) -> None:
        """Let the backward of `loss`, a step's last, hand over each bucket that is complete."""
        self._work = work
        tape = tape_below(node_of(loss))
        lowest = lowest_readers(tape, parameters)
        self._due = deque((min(lowest[i] for i, _, _ in b), b) for b in reversed(buckets))
        for place, node in enumerate(tape):
            if node.name != LEAF:
                node.backward = self._noticed(place, node.backward)

    def _noticed(self, place: int, backward: Callable[[Array], Any]) -> Callable[[Array], Any]:
        """The backward of the node at this place of the tape; all above it are done then."""

        def notice(grad: Array) -> Any:
            self._hand_over(below=place)
            return backward(grad)

        return notice

    def _hand_over(self, below: int) -> None:
        """Hand over what is complete below this place; raise what went wrong in the thread."""
        while self._done and self._done[0].done():
            self._done.popleft().result()
        while self._due and self._due[0][0] > below:
            self._done.append(self._thread.submit(self._work, self._due.popleft()[1]))

    def finish(self) -> None:
        """Wait until the work on all buckets is done; raise what went wrong in it."""
        self._hand_over(below=-2)
        while self._done:
            self._done.popleft().result()
        self._work = None


def lowest_readers(tape: Sequence[Node], parameters: Sequence[Tensor]) -> list[int]:
    """For each parameter the lowest place on the tape of an operation it went into.

    It is -1, which the backward never passes, where there is none.
    """
    lowest: dict[int, int] = {}
    for place, node in enumerate(tape):
        for parent in node.parents:
            if parent and parent.name == LEAF:
                lowest.setdefault(id(parent.backward.__self__), place)
    return [lowest.get(id(parameter), -1) for parameter in parameters]
