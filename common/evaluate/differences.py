"""Where two greedy decodings of a clip differ first, and whether a difference is excused.

Greedy decoding follows the largest logit, so two engines that differ by rounding alone may differ in a token where two
logits are nearly equal. Such a case is excused, and so is the one in which the rules of NeMo and GenAI differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.contract import PARITY_TOLERANCE
from common.run.decode import Hypothesis


@dataclass(frozen=True)
class Difference:
    """The first difference of two decodings."""

    index: int  # of the token among those emitted
    frame: int  # encoder frame
    expected: int | None  # token; None: the reference has ended
    actual: int | None  # token; None: the decoding has ended
    excuse: str | None  # None: nothing excuses it


def first_difference(tokens: Sequence[int], frames: Sequence[int], actual: Hypothesis) -> Difference | None:
    """Compare a reference's tokens and the encoder frames they were emitted at with a decoding; None where equal.

    The decisions between the last common token and the first different one may excuse the difference: if the two best
    choices of one of them are closer than the parity tolerance, or if NeMo and GenAI differ by design in one of them.
    """
    reference = list(zip(tokens, frames, strict=True))
    emitted = [(step.token, step.frame) for step in actual.emitted]
    if reference == emitted:
        return None
    index = _first_unequal(reference, emitted)
    expected_token, expected_frame = reference[index] if index < len(reference) else (None, None)
    actual_token, actual_frame = emitted[index] if index < len(emitted) else (None, None)
    frame = actual_frame if expected_frame is None else expected_frame
    assert frame is not None, "at the first difference one of the two has a token"
    return Difference(index, frame, expected_token, actual_token, _excuse(actual, index))


def _excuse(hypothesis: Hypothesis, index: int) -> str | None:
    """The excuse for a different decision between token `index` - 1 and token `index`; None if there is none."""
    positions = [i for i, step in enumerate(hypothesis.steps) if step.token != hypothesis.blank_id]
    begin = positions[index - 1] if index else 0  # that token's duration is one of the decisions
    end = positions[index] + 1 if index < len(positions) else len(hypothesis.steps)
    decisions = hypothesis.steps[begin:end]
    nearest = min((step.margin for step in decisions), default=float("inf"))
    if nearest < PARITY_TOLERANCE:
        return f"top-two margin {nearest:.1e} under the tolerance {PARITY_TOLERANCE:.0e}"
    if any(step.blank_zero for step in decisions):
        return "blank with duration 0, where the greedy rules of NeMo and GenAI differ"
    return None


def excused_by(reference: Hypothesis, difference: Difference, actual: Hypothesis) -> Difference:
    """`difference` with the excuse that the reference's own decisions give for it.

    The decoding under test must not excuse itself: where a broken graph gives equal logits, every decision is a near
    tie.
    """
    own = first_difference(actual.tokens, actual.frames, reference)
    return replace(difference, excuse=own.excuse if own and difference.excuse else None)


def first_token_difference(reference: Hypothesis, tokens: Sequence[int]) -> Difference | None:
    """Compare only the tokens of two decodings that must be equal, so nothing is excused. None where they are equal."""
    if reference.tokens == list(tokens):
        return None
    index = _first_unequal(reference.tokens, tokens)
    step = reference.emitted[index] if index < len(reference.emitted) else None
    return Difference(
        index,
        step.frame if step else reference.steps[-1].frame,
        step.token if step else None,
        tokens[index] if index < len(tokens) else None,
        None,
    )


def _first_unequal(expected: Sequence[object], actual: Sequence[object]) -> int:
    """Index of the first entry that differs; the length of the shorter sequence where the other one goes on."""
    pairs = enumerate(zip(expected, actual, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(expected), len(actual)))
