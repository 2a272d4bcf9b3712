"""XXX docstring of evaluate.differences"""

from dataclasses import dataclass, replace

from common.contract import PARITY_TOLERANCE
from common.run.decode import Hypothesis


@dataclass(frozen=True)
class Difference:
    """Where two decodings part: emission index, frame, both tokens, and what excuses it (None: nothing does)."""

    index: int
    frame: int
    wanted: int | None
    found: int | None
    excuse: str | None


def first_difference(tokens: list[int], frames: list[int], found: Hypothesis) -> Difference | None:
    """Compare a reference's tokens and the frames they were emitted at with a traced decoding; None where equal.

    A difference is excused when, among the decisions between the last emission in common and the one that differs, one
    was nearer than the parity tolerance to going otherwise, or met the case in which NeMo and GenAI differ by design.
    """
    wanted = list(zip(tokens, frames, strict=True))
    emitted = [(step.token, step.frame) for step in found.emitted]
    if wanted == emitted:
        return None
    pairs = enumerate(zip(wanted, emitted, strict=False))
    index = next((i for i, (one, other) in pairs if one != other), min(len(wanted), len(emitted)))
    positions = [i for i, step in enumerate(found.steps) if step.token != found.blank_id]
    begin = positions[index - 1] if index else 0  # that emission's duration is a decision of this stretch
    end = positions[index] + 1 if index < len(positions) else len(found.steps)
    stretch = found.steps[begin:end]
    nearest = min((step.margin for step in stretch), default=float("inf"))
    excuse = None
    if nearest < PARITY_TOLERANCE:
        excuse = f"top-two margin {nearest:.1e} under the tolerance {PARITY_TOLERANCE:.0e}"
    elif any(step.blank_zero for step in stretch):
        excuse = "blank with duration 0, where the greedy rules of NeMo and GenAI differ"
    one, other = (pairs[index] if index < len(pairs) else (None, None) for pairs in (wanted, emitted))
    frame = one[1] if one[1] is not None else other[1]
    return Difference(index, frame, one[0], other[0], excuse)


def excused_by(reference: Hypothesis, difference: Difference, found: Hypothesis) -> Difference:
    """`difference` with the excuse that the reference's own decisions give for it: what is checked does not excuse
    itself. A broken graph whose logits are all alike would be a near tie everywhere."""
    own = first_difference(found.tokens, found.frames, reference)
    return replace(difference, excuse=own.excuse if own and difference.excuse else None)


def first_token_difference(wanted: Hypothesis, found: list[int]) -> Difference | None:
    """Compare tokens alone, where both must be equal; None where they are."""
    if wanted.tokens == found:
        return None
    pairs = enumerate(zip(wanted.tokens, found, strict=False))
    index = next((i for i, (one, other) in pairs if one != other), min(len(wanted.tokens), len(found)))
    step = wanted.emitted[index] if index < len(wanted.emitted) else None
    return Difference(
        index,
        step.frame if step else wanted.steps[-1].frame,
        step.token if step else None,
        found[index] if index < len(found) else None,
        None,
    )


def unchanged(text: str) -> str:
    return text
