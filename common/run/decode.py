"""Greedy decoding of a token-and-duration transducer (TDT, arXiv:2304.06795), in NumPy, whatever runs the networks.

At each step the joint of one encoder frame and the prediction network's output gives token and duration logits; both
are taken greedily. A token is emitted and fed to the prediction network; the duration says how many frames to go on.
Several utterances go side by side, each at its own frame: a step is one joint call for all that are not at their end,
then one prediction call for those that emitted a token.

Two published loops differ in one case, a blank whose best duration is 0, which would stay on the frame for ever:
    step_one   the duration becomes one frame. NeMo's batched greedy decoding (nemo/collections/asr/parts/submodules/
               transducer_decoding/tdt_label_looping.py: "for blank labels force duration >= 1").
    next_best  the best duration other than index 0 is taken. ONNX Runtime GenAI (src/models/parakeet.cpp,
               EmitNextToken: "forbid duration index 0").
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

BlankZero = Literal["step_one", "next_best"]
NEMO_RULE: BlankZero = "step_one"
GENAI_RULE: BlankZero = "next_best"


@dataclass(frozen=True)
class Prediction:
    """The prediction network after its last token: its output, and its state in whatever form `predict` uses."""

    output: np.ndarray
    state: Any


# predict(tokens, states) → a Prediction each; state None starts the network.
Predict = Callable[[Sequence[int], Sequence[Any]], Sequence[Prediction]]
# join(encoder frames [B, D], prediction outputs, B of them) → logits [B, V+K]
Join = Callable[[np.ndarray, Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Step:
    """One decision of the loop: where, what, how far on, and by how little (in logits) it might have been otherwise."""

    frame: int
    token: int
    duration: int
    margin: float
    blank_zero: bool  # blank with duration 0: the case in which the two loops differ


@dataclass
class Hypothesis:
    """What was decoded of one utterance."""

    steps: list[Step] = field(default_factory=list)
    blank_id: int = 0

    @property
    def emitted(self) -> list[Step]:
        return [step for step in self.steps if step.token != self.blank_id]

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.emitted]

    @property
    def frames(self) -> list[int]:
        """Where each token was emitted."""
        return [step.frame for step in self.emitted]


def greedy_tdt_decode(
    encoded: Sequence[np.ndarray],
    ends: Sequence[Sequence[int]],
    predict: Predict,
    join: Join,
    *,
    blank_id: int,
    durations: tuple[int, ...],
    max_symbols: int | None,
    blank_zero: BlankZero = NEMO_RULE,
) -> list[Hypothesis]:
    """Decode utterances side by side.

    encoded: [S, D] of each, or [B, S, D] padded. ends: of each, the frames at which its windows end, in ascending
    order, the last its length; what is left of a duration at the end of a window is dropped. durations: frames by
    index. max_symbols: tokens on one frame before a step of one is forced, None for no limit.

    Raises ValueError for durations among which the loop could not move on, and for logits that are NaN.
    """
    if len(durations) == 0 or min(durations) < 0 or max(durations) < 1:
        raise ValueError(f"wanted durations of 0 frames and more, at least one of them positive, found {durations}")
    if blank_zero == "next_best" and min(durations[1:], default=0) < 1:
        raise ValueError(f"wanted positive durations after index 0 for the rule {blank_zero!r}, found {durations}")
    count, num_tokens = len(encoded), blank_id + 1
    hypotheses = [Hypothesis(blank_id=blank_id) for _ in range(count)]
    frames, symbols = [0] * count, [0] * count
    active = [i for i in range(count) if ends[i][-1] > 0]
    predictions = dict(zip(active, predict([blank_id] * len(active), [None] * len(active)), strict=True))
    while active:
        logits = join(np.array([encoded[i][frames[i]] for i in active]), [predictions[i].output for i in active])
        choices = zip(active, logits, _best(logits[:, :num_tokens]), _best(logits[:, num_tokens:]), strict=True)
        spoken = {}
        for i, row, (token, token_margin), (index, duration_margin) in choices:
            blank = token == blank_id
            blank_zero_met = blank and durations[index] == 0
            if blank and index == 0 and blank_zero == "next_best":
                index = 1 + int(np.argmax(row[num_tokens + 1 :]))
            duration = durations[index]
            if blank:
                duration = max(duration, 1)
            else:
                spoken[i] = token
                symbols[i] += 1
            margin = min(token_margin, duration_margin)
            hypotheses[i].steps.append(Step(frames[i], token, duration, margin, blank_zero_met))
            if duration == 0 and symbols[i] == max_symbols:
                duration = 1
            if duration > 0:
                symbols[i] = 0
            window_end = ends[i][bisect_right(ends[i], frames[i])]
            frames[i] = min(frames[i] + duration, window_end)
        active = [i for i in active if frames[i] < ends[i][-1]]
        spoken = {i: spoken[i] for i in active if i in spoken}  # nothing follows an utterance's last token
        if spoken:
            found = predict([*spoken.values()], [predictions[i].state for i in spoken])
            predictions |= zip(spoken, found, strict=True)
    return hypotheses


def _best(logits: np.ndarray) -> list[tuple[int, float]]:
    """Of each row the index of the largest (the first of equals, as in every loop above) and its lead over the second.

    Raises ValueError at NaN, which argmax takes for the largest: the loop would emit one token until its limit.
    """
    rows, best = np.arange(len(logits)), logits.argmax(axis=1)
    first = logits[rows, best]
    if np.isnan(first).any():
        raise ValueError("the joint's logits are not numbers: the model is broken, or the audio beyond what it knows")
    others = logits.copy()
    others[rows, best] = -np.inf
    return list(zip(best.tolist(), (first - others.max(axis=1)).tolist(), strict=True))
