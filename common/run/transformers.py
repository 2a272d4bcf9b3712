"""The reference for a checkpoint of transformers: the library's features and `generate`, the checkpoint's tokenizer."""

from functools import cached_property
from typing import Any

import numpy as np

from common.run.reference import Reference, ReferenceTranscript


class Transformers(Reference):
    """A ParakeetForTDT of transformers, as common/checkpoint/transformers_model.py has built it."""

    name = "transformers"

    @property
    def sentencepiece_model(self) -> bytes:
        model: bytes = self.model.sentencepiece_model
        return model

    def transcribe(self, features: np.ndarray) -> ReferenceTranscript:
        """features [M, T] → tokens, frames and text, all of them transformers'.

        The sequence that `generate` returns includes the blanks and begins with a blank; the frame of a step is the sum
        of the durations before it.
        """
        import torch

        network, blank = self.model.network, self.model.network.config.blank_token_id
        inputs = torch.from_numpy(np.ascontiguousarray(features.T))[None]
        with torch.inference_mode():
            made = network.generate(inputs, attention_mask=torch.ones(inputs.shape[:2], dtype=torch.bool))
        durations = made.durations[0]
        frames = (durations.cumsum(0) - durations).tolist()
        steps = [pair for pair in zip(made.sequences[0].tolist(), frames, strict=True) if pair[0] != blank]
        tokens = [token for token, _ in steps]
        return ReferenceTranscript(tokens, [frame for _, frame in steps], self._decode(tokens))

    def words(self, features: np.ndarray) -> None:
        """None: transformers gives times of tokens only, and those are compared together with the tokens."""

    @cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer of the checkpoint itself: tokenizer.json, or the SentencePiece model."""
        from sentencepiece import SentencePieceProcessor
        from tokenizers import Tokenizer

        path = self.model.tokenizer_file
        return Tokenizer.from_file(str(path)) if path.suffix == ".json" else SentencePieceProcessor(str(path))

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))
