"""How sure a decoding is of its tokens, measured as in NeMo (asr/parts/utils/asr_confidence_utils.py 3.0.0).

The measures are computed from the log probabilities of a step, over the tokens with the blank or over the durations.
"""

import math
from dataclasses import dataclass

import numpy as np

ALPHA = 0.33  # NeMo's default for its entropies


@dataclass(frozen=True)
class Confidence:
    """Confidence in one token, from 0 to 1, or in a word: that of its least sure token (NeMo's aggregation `min`)."""

    max_prob: float  # the token's probability, scaled so that a choice by chance has 0; `max_prob`, alpha 1
    entropy: float  # 1 for a single possible token; NeMo's default, `entropy` of type `tsallis`, norm `exp`, alpha 0.33


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """logits [V] → log probabilities [V] of the same type. NeMo uses float32, which takes half the time of float64."""
    shifted = logits - logits.max()
    normal: np.ndarray = shifted - logits.dtype.type(math.log(np.exp(shifted).sum()))
    return normal


def confidence_of(log_probs: np.ndarray) -> Confidence:
    """The confidence of one decision, which takes the largest of its log probabilities [V]."""
    size = len(log_probs)
    probability = math.exp(float(log_probs.max()))
    least = math.exp((1 - size ** (1 - ALPHA)) / (1 - ALPHA))  # where all are equally likely
    entropy = (1 - float(np.exp(log_probs.dtype.type(ALPHA) * log_probs).sum())) / (1 - ALPHA)
    return Confidence((probability * size - 1) / (size - 1), (math.exp(entropy) - least) / (1 - least))
