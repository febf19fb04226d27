"""Speculation: guess the next tokens, then let the model check all of them in one pass.

A pass over several tokens costs much less than one pass for each of them, since most of its time
goes into reading the weights. So where the next tokens can be guessed, several are decided at the
price of a few. The result does not change: at each place the model's own token is chosen, greedily
or at random as before, and the first one that differs from the guess ends the pass. (Its logits are
rounded otherwise in a longer pass, which decides near ties. For guesses without probabilities this
is the rule of Leviathan et al. 2023, arXiv:2211.17192: a guess is kept with the probability that
the model gives it.)

Only a lone sample speculates: a batch already shares each reading of the weights, and right guesses
in some of its rows save less than a longer pass over all of them costs.
"""

from __future__ import annotations

RUNS = (4, 8, 16)  # how many of the last tokens are looked up: the more, the surer the guess
FEWEST_GUESSES, MOST_GUESSES = 7, 31  # with the last token, passes over 8 to 32 tokens
WORTH_IT = 3  # this many right guesses make up for the cost of the longer pass
PAUSE = 64  # for this many tokens there is no guess, after the longest runs misled too


class PromptLookup:
    """Guess that what followed the last few tokens earlier in the text follows them again (Saxena
    2023, "Prompt lookup decoding"; `prompt_lookup_num_tokens` in Transformers).

    Texts that quote or repeat themselves, such as code, are guessed well. Elsewhere guesses fail,
    and a failed guess costs as much as a pass or two. So each failure doubles the length of the run
    that must agree before the next guess, and each guess that was worth it halves that length.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # run of tokens -> where it last ended
        self._indexed = 0  # how many tokens of the text are in that index
        self._guess: list[int] = []  # the latest one,
        self._guessed_at = 0  # and the text's length then
        self._shortest_run, self._size, self._resume_at = RUNS[0], FEWEST_GUESSES, 0

    def guess(self, text: list[int], most: int = MOST_GUESSES) -> list[int]:
        """At most `most` tokens that may follow `text`, one after another; often none."""
        self._index(text)
        if self._guess:
            self._learn(text)
        self._guess, self._guessed_at = [], len(text)
        runs = [n for n in RUNS if n >= self._shortest_run and len(text) >= self._resume_at]
        for n in reversed(runs):
            end = self._ends.get(tuple(text[-n:]))
            if end is not None:
                period = len(text) - end  # a guess that reaches the end of the text starts over
                self._guess = [text[end + i % period] for i in range(min(self._size, most))]
                break
        return self._guess

    def _index(self, text: list[int]) -> None:
        """Note where each run of tokens ends, except for runs that end where the text does."""
        for end in range(self._indexed, len(text)):
            for n in RUNS:
                if n <= end:
                    self._ends[tuple(text[end - n : end])] = end
        self._indexed = len(text)

    def _learn(self, text: list[int]) -> None:
        """Compare the latest guess with what the text became."""
        guess, truth = self._guess, text[self._guessed_at :]
        wrong = (i for i, token in enumerate(guess) if truth[i : i + 1] != [token])
        right = next(wrong, len(guess))
        if right == len(guess):
            self._size = min(2 * self._size + 1, MOST_GUESSES)
        else:
            self._size = FEWEST_GUESSES
        if right >= min(WORTH_IT, len(guess)):
            self._shortest_run = max(self._shortest_run // 2, RUNS[0])
        elif self._shortest_run < RUNS[-1]:
            self._shortest_run *= 2
        else:
            self._resume_at = len(text) + PAUSE
