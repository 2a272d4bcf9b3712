"""The reference: NeMo's own preprocessing, encoder, batched greedy decoding, text and word times."""

from functools import cached_property
from typing import Any

import numpy as np

from common.run.reference import Reference, ReferenceTranscript


class Nemo(Reference):
    """A model of NeMo's (EncDecRNNTBPEModel), set to batched greedy decoding. Its text is that of `transcribe()`."""

    name = "NeMo"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # Beam search may choose other words, and plain greedy decoding other durations.
        if model.cfg.decoding.strategy != "greedy_batch":
            decoding = model.cfg.decoding.copy()
            decoding.strategy = "greedy_batch"
            model.change_decoding_strategy(decoding, verbose=False)

    @property
    def sentencepiece_model(self) -> bytes:
        """The checkpoint's SentencePiece model, as NeMo has loaded it."""
        return bytes(self.model.tokenizer.tokenizer.serialized_model_proto())

    def transcribe(self, features: np.ndarray) -> ReferenceTranscript:
        """features [M, T] → tokens, frames and text, all of them NeMo's."""
        result = self._decode(self.model.decoding, features)
        return ReferenceTranscript(
            tokens=[int(token) for token in result.y_sequence],
            frames=[int(frame) for frame in result.timestamp],
            text=result.text,
        )

    def words(self, features: np.ndarray) -> list[tuple[str, int, int]]:
        """features [M, T] → each word with NeMo's own start and end, in encoder frames."""
        words = self._decode(self._with_timestamps, features).timestamp["word"]
        return [(word["word"], int(word["start_offset"]), int(word["end_offset"])) for word in words]

    @cached_property
    def _with_timestamps(self) -> Any:
        """A decoding that gives times, set up as by NeMo's `transcribe(timestamps=True)`; separate, as it is slower."""
        from nemo.collections.asr.parts.submodules.rnnt_decoding import RNNTBPEDecoding
        from omegaconf import OmegaConf

        model = self.model
        decoding = model.cfg.decoding.copy()
        OmegaConf.update(decoding, "compute_timestamps", value=True, force_add=True)
        return RNNTBPEDecoding(decoding, model.decoder, model.joint, model.tokenizer)

    def _decode(self, decoding: Any, features: np.ndarray) -> Any:
        """features [M, T] → NeMo's own Hypothesis."""
        import torch

        with torch.inference_mode():
            return decoding.rnnt_decoder_predictions_tensor(*self._encode(features), return_hypotheses=True)[0]
