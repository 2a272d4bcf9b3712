"""Greedy decoding of a token-and-duration transducer (TDT, arXiv:2304.06795) in NumPy, whatever runs its networks.

At each step the joint network gives token and duration logits for one encoder frame and the output of the prediction
network; the largest of each is taken. A token is emitted and fed to the prediction network; the duration is the number
of frames to advance. Several utterances are decoded together, each at its own frame: a step is one call of the joint
for all utterances that have not ended, then one call of the prediction network for those that emitted a token.

The published loops of NeMo and GenAI differ in one case: a blank whose best duration is 0, which would stay on its
frame for ever. See `BlankZero`.

How sure a decoding is of its tokens is measured as in NeMo (asr/parts/utils/asr_confidence_utils.py 3.0.0), from the
log probabilities of a step over the tokens with the blank.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np

ALPHA = 0.33  # of the entropies; NeMo's default


class BlankZero(Enum):
    """What a loop does at a blank whose best duration is 0."""

    # The duration becomes one frame. NeMo's batched greedy decoding (nemo/collections/asr/parts/submodules/
    # transducer_decoding/tdt_label_looping.py: "for blank labels force duration >= 1").
    NEMO = auto()
    # The best duration other than index 0's is taken. ONNX Runtime GenAI (src/models/parakeet.cpp, EmitNextToken:
    # "forbid duration index 0").
    GENAI = auto()


@dataclass(frozen=True)
class Prediction:
    """The prediction network after its last token: its output, and its state in whatever form `predict` uses."""

    output: np.ndarray
    state: Any


# predict(tokens, states) → a Prediction for each token; a state of None starts the network.
Predict = Callable[[Sequence[int], Sequence[Any]], Sequence[Prediction]]
# join(encoder frames [B, D], prediction outputs, B of them) → logits [B, V+K]
Join = Callable[[np.ndarray, Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Confidence:
    """Confidence in one token, from 0 to 1, or in a word, from its least sure token (NeMo's aggregation `min`)."""

    max_prob: float  # the token's probability, scaled so that a choice by chance has 0; `max_prob`, alpha 1
    entropy: float  # 1 for a single possible token; NeMo's default, `entropy` of type `tsallis`, norm `exp`, alpha 0.33


@dataclass(frozen=True)
class Step:
    """One decision of the loop."""

    frame: int  # encoder frame
    token: int
    duration: int  # frames to advance
    margin: float  # logits; the lead of token or duration over the second best, the smaller of the two
    blank_zero: bool  # whether it was a blank with duration 0, where the two loops differ
    confidence: Confidence | None = None  # of a token that is emitted
    is_forced: bool = False  # whether the loop went on by a frame, since the frame had as many tokens as it may have


@dataclass
class Hypothesis:
    """The result of decoding one utterance."""

    steps: list[Step] = field(default_factory=list)
    blank_id: int = 0
    length: int = field(default=0, compare=False)  # encoder frames decoded so far

    @property
    def emitted(self) -> list[Step]:
        """The steps that emitted a token."""
        return [step for step in self.steps if step.token != self.blank_id]

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.emitted]

    @property
    def frames(self) -> list[int]:
        """The encoder frame at which each token was emitted."""
        return [step.frame for step in self.emitted]


@dataclass(frozen=True)
class TimedWord:
    """One word as it is shown, from encoder frame `start` up to `end`."""

    text: str
    start: int
    end: int
    confidence: Confidence | None = field(default=None, compare=False)  # where the engine gives it


@dataclass(frozen=True)
class Transcript:
    """What one engine has made of one recording."""

    tokens: list[int]
    text: str
    seconds: float = 0.0  # that the engine took, features included
    features_seconds: float = 0.0  # of these, those that the features took
    frames: list[int] | None = None  # the encoder frame at which each token was emitted; None: not given, as by GenAI
    words: list[TimedWord] | None = None  # of plain ONNX Runtime and, where times were asked for, of NeMo
    hypothesis: Hypothesis | None = None  # the decisions, of plain ONNX Runtime


def greedy_tdt_decode(
    windows: Iterable[Sequence[np.ndarray]],
    predict: Predict,
    join: Join,
    *,
    blank_id: int,
    durations: Sequence[int],
    max_symbols: int | None,
    rule: BlankZero = BlankZero.NEMO,
) -> list[Hypothesis]:
    """Decode utterances together.

    windows: for one window after the other, the frames [S, D] of each utterance in it; [0, D] of one that has ended. A
        window is asked for when the one before it is decoded. At its end, what is left of a duration is dropped.
    blank_id: the last token; the logits behind it are of the durations, which are in frames.
    max_symbols: tokens on one frame before a step of one frame is forced; None for no limit.

    Raises ValueError for logits that are NaN.
    """
    num_tokens = blank_id + 1
    hypotheses: list[Hypothesis] = []
    predictions: dict[int, Prediction] = {}  # by utterance
    for encoded in windows:
        hypotheses = hypotheses or [Hypothesis(blank_id=blank_id) for _ in encoded]
        frames = [0] * len(encoded)
        symbols = [0] * len(encoded)  # tokens emitted on the current frame
        active = [i for i, own in enumerate(encoded) if len(own)]
        if starting := [i for i in active if i not in predictions]:
            first = predict([blank_id] * len(starting), [None] * len(starting))
            predictions |= zip(starting, first, strict=True)
        while active:
            logits = join(np.array([encoded[i][frames[i]] for i in active]), [predictions[i].output for i in active])
            choices = zip(active, logits, _best(logits[:, :num_tokens]), _best(logits[:, num_tokens:]), strict=True)
            emitted: dict[int, int] = {}  # utterance → token
            for i, row, (token, token_margin), (index, duration_margin) in choices:
                is_blank = token == blank_id
                is_blank_zero = is_blank and durations[index] == 0
                if is_blank and index == 0 and rule is BlankZero.GENAI:
                    index = 1 + int(np.argmax(row[num_tokens + 1 :]))
                duration = durations[index]
                if is_blank:
                    duration = max(duration, 1)
                else:
                    emitted[i] = token
                    symbols[i] += 1
                margin = min(token_margin, duration_margin)
                confidence = None if is_blank else confidence_of(row[:num_tokens])
                is_forced = duration == 0 and symbols[i] == max_symbols
                frame = hypotheses[i].length + frames[i]
                hypotheses[i].steps.append(Step(frame, token, duration, margin, is_blank_zero, confidence, is_forced))
                frames[i] += 1 if is_forced else duration
                if is_forced or duration:
                    symbols[i] = 0
            if emitted:
                after = predict([*emitted.values()], [predictions[i].state for i in emitted])
                predictions |= zip(emitted, after, strict=True)
            active = [i for i in active if frames[i] < len(encoded[i])]
        for hypothesis, own in zip(hypotheses, encoded, strict=True):
            hypothesis.length += len(own)
    return hypotheses


def _best(logits: np.ndarray) -> list[tuple[int, float]]:
    """For each row, the index of the largest logit (the first of equals, as in both loops) and its lead over the next.

    Raises ValueError for NaN, which argmax takes for the largest: the loop would emit the same token up to its limit.
    """
    rows = np.arange(len(logits))
    best = logits.argmax(axis=1)
    first = logits[rows, best]
    if np.isnan(first).any():
        raise ValueError(
            "the joint gives a logit that is NaN: the model is broken, or the audio differs too much from what it was "
            "trained on"
        )
    others = logits.copy()
    others[rows, best] = -np.inf
    return list(zip(best.tolist(), (first - others.max(axis=1)).tolist(), strict=True))


def confidence_of(logits: np.ndarray) -> Confidence:
    """The confidence of one decision, which takes the largest of its logits [V].

    Like NeMo's it is computed in float32, which takes half the time of float64.
    """
    kind = logits.dtype.type
    shifted = logits - logits.max()
    log_probs = shifted - kind(math.log(np.exp(shifted).sum()))
    size = len(log_probs)
    probability = math.exp(float(log_probs.max()))
    least = math.exp((1 - size ** (1 - ALPHA)) / (1 - ALPHA))  # where all are equally likely
    entropy = (1 - float(np.exp(kind(ALPHA) * log_probs).sum())) / (1 - ALPHA)
    return Confidence((probability * size - 1) / (size - 1), (math.exp(entropy) - least) / (1 - least))
