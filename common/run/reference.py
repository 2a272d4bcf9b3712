"""What the exported graphs are compared with: the library that the checkpoint belongs to, NeMo or transformers.

A model that CheckpointFormat.load_model returns has the same parts as a model of NeMo. Features and the step-by-step
decoding are computed with these parts; whole transcripts come from the library itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from common.run.decode import DecodingConfig, Hypothesis, Prediction, greedy_tdt_decode


class ReferenceTranscript(NamedTuple):
    """The result of the library's own decoding of a clip."""

    tokens: list[int]
    frames: list[int]  # the encoder frame at which each token was emitted
    text: str


class Reference(ABC):
    """A model in the library that its checkpoint belongs to."""

    name: ClassVar[str]  # of the library

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    @abstractmethod
    def sentencepiece_model(self) -> bytes:
        """The checkpoint's SentencePiece model, as the library has loaded it."""

    @abstractmethod
    def transcribe(self, features: np.ndarray) -> ReferenceTranscript:
        """features [M, T] → tokens, frames and text, all of them the library's."""

    @abstractmethod
    def words(self, features: np.ndarray) -> list[tuple[str, int, int]] | None:
        """features [M, T] → each word with the library's own start and end, in encoder frames; None if it has none."""

    def features(self, samples: np.ndarray) -> np.ndarray:
        """The features that the library computes from mono samples [N], valid frames only: [M, T]."""
        return features_of(self.model, samples)

    def trace(self, features: np.ndarray) -> Hypothesis:
        """features [M, T] → the decoding of `transcribe`, done step by step on the library's own modules, with the
        margin of each decision."""
        import torch

        decoder = self.model.decoder
        joint = self.model.joint

        def predict(tokens: Sequence[int], states: Sequence[Any]) -> list[Prediction]:
            if states[0] is None:
                output, state = decoder.predict(y=None, state=None, add_sos=False, batch_size=1)
            else:
                output, state = decoder.predict(y=torch.tensor([[tokens[0]]]), state=states[0], add_sos=False)
            return [Prediction(joint.project_prednet(output)[0], state)]

        def join(frames: np.ndarray, outputs: Sequence[Any]) -> np.ndarray:
            logits: np.ndarray = joint.joint_net(joint.project_encoder(torch.from_numpy(frames)) + outputs[0]).numpy()
            return logits

        with torch.inference_mode():
            encoded, lengths = self._encode(features)
            frames = encoded[0].T.numpy()
            return greedy_tdt_decode(
                [frames],
                [[int(lengths[0])]],
                predict,
                join,
                DecodingConfig(
                    blank_id=decoder.blank_idx,
                    durations=tuple(self.model.cfg.decoding.durations),
                    max_symbols=self.model.decoding.decoding.max_symbols,
                ),
            )[0]

    def _encode(self, features: np.ndarray) -> Any:
        """features [M, T] → frames [1, D, S] and their number [1]."""
        import torch

        return self.model.encoder(
            audio_signal=torch.from_numpy(features)[None], length=torch.tensor([features.shape[1]])
        )


def features_of(model: Any, samples: np.ndarray) -> np.ndarray:
    """The features that a model's library computes from mono samples [N], valid frames only: [M, T]."""
    import torch

    with torch.inference_mode():
        signal = torch.from_numpy(samples)[None]
        length = torch.tensor([len(samples)])
        features, lengths = model.preprocessor(input_signal=signal.to(model.device), length=length.to(model.device))
    valid: np.ndarray = features[0, :, : int(lengths[0])].cpu().numpy()
    return valid
