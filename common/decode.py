"""Greedy decoding of a token-and-duration transducer (TDT, arXiv:2304.06795), in NumPy, whatever runs the networks.

At each step the joint of one encoder frame and the prediction network's output gives token and duration logits; both
are taken greedily. A token is emitted and fed to the prediction network; the duration says how many frames to go on.

Two published loops differ in one case, a blank whose best duration is 0, which would stay on the frame for ever:
    step_one   the duration becomes one frame. NeMo's batched greedy decoding (nemo/collections/asr/parts/submodules/
               transducer_decoding/tdt_label_looping.py: "for blank labels force duration >= 1").
    next_best  the best duration other than index 0 is taken. ONNX Runtime GenAI (src/models/parakeet.cpp,
               EmitNextToken: "forbid duration index 0").
"""

from collections.abc import Callable
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


# predict(token, state) → Prediction; state None starts the network.
Predict = Callable[[int, Any], Prediction]
# join(encoder frame [D], prediction output) → logits [V+K]
Join = Callable[[np.ndarray, np.ndarray], np.ndarray]


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
    """What was decoded. `prediction` continues it in the next window."""

    steps: list[Step] = field(default_factory=list)
    blank_id: int = 0
    prediction: Prediction | None = None

    @property
    def emitted(self) -> list[Step]:
        return [step for step in self.steps if step.token != self.blank_id]

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.emitted]


def greedy_tdt_decode(
    encoded: np.ndarray,
    length: int,
    predict: Predict,
    join: Join,
    *,
    blank_id: int,
    durations: tuple[int, ...],
    max_symbols: int | None,
    blank_zero: BlankZero = NEMO_RULE,
    start: int = 0,
    first_frame: int = 0,
    prior: Hypothesis | None = None,
) -> Hypothesis:
    """Decode the frames `start` … `length` - 1 of one utterance.

    encoded: [S, D]. durations: frames by index. max_symbols: tokens on one frame before a step of one is forced, None
    for no limit. first_frame: what frame 0 of `encoded` is in the whole clip, for the steps. prior: what was decoded
    before, whose prediction state goes on; it is extended and returned.

    Raises ValueError for durations among which the loop could not move on, and for logits that are NaN.
    """
    if len(durations) == 0 or min(durations) < 0 or max(durations) < 1:
        raise ValueError(f"wanted durations of 0 frames and more, at least one of them positive, found {durations}")
    if blank_zero == "next_best" and min(durations[1:], default=0) < 1:
        raise ValueError(f"wanted positive durations after index 0 for the rule {blank_zero!r}, found {durations}")
    hypothesis = prior or Hypothesis(blank_id=blank_id)
    prediction = hypothesis.prediction or predict(blank_id, None)
    num_tokens = blank_id + 1
    frame, symbols = start, 0
    while frame < length:
        logits = join(encoded[frame], prediction.output)
        token, token_margin = _best(logits[:num_tokens])
        index, duration_margin = _best(logits[num_tokens:])
        blank = token == blank_id
        blank_zero_met = blank and durations[index] == 0
        if blank and index == 0 and blank_zero == "next_best":
            index = 1 + int(np.argmax(logits[num_tokens + 1 :]))
        duration = durations[index]
        if blank:
            duration = max(duration, 1)
        else:
            prediction = predict(token, prediction.state)
            symbols += 1
        margin = min(token_margin, duration_margin)
        hypothesis.steps.append(Step(first_frame + frame, token, duration, margin, blank_zero_met))
        if duration == 0 and symbols == max_symbols:
            duration = 1
        if duration > 0:
            symbols = 0
        frame += duration
    hypothesis.prediction = prediction
    return hypothesis


def _best(logits: np.ndarray) -> tuple[int, float]:
    """Index of the largest (the first of equals, as in every loop above) and its lead over the second.

    Raises ValueError at NaN, which argmax takes for the largest: the loop would emit one token until its limit.
    """
    best = int(np.argmax(logits))
    if np.isnan(logits[best]):
        raise ValueError("the joint's logits are not numbers: the model is broken, or the audio beyond what it knows")
    others = np.delete(logits, best)
    return best, float(logits[best] - others.max()) if len(others) else float("inf")
