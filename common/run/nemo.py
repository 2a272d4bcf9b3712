"""XXX docstring of run.nemo"""

from functools import cached_property

import numpy as np


class Nemo:
    """The reference: NeMo's own preprocessing, encoder and batched greedy decoding."""

    def __init__(self, model):
        self.model = model
        if model.cfg.decoding.strategy != "greedy_batch":  # beam search says other words; plain greedy, other durations
            decoding = model.cfg.decoding.copy()
            decoding.strategy = "greedy_batch"
            model.change_decoding_strategy(decoding, verbose=False)

    def features(self, samples: np.ndarray) -> np.ndarray:
        """The features NeMo computes, valid frames only: [M, T]."""
        import torch

        with torch.inference_mode():
            signal, length = torch.from_numpy(samples)[None], torch.tensor([len(samples)])
            device = self.model.device
            features, lengths = self.model.preprocessor(input_signal=signal.to(device), length=length.to(device))
        return features[0, :, : int(lengths[0])].cpu().numpy()

    def transcribe(self, features: np.ndarray) -> tuple[list[int], list[int]]:
        """features [M, T] → token ids, and the encoder frame that each was emitted at"""
        found = self._decode(self.model.decoding, features)
        return [int(token) for token in found.y_sequence], [int(frame) for frame in found.timestamp]

    def words(self, features: np.ndarray) -> list[tuple[str, int, int]]:
        """features [M, T] → each word with NeMo's own start and end, in encoder frames"""
        words = self._decode(self._with_timestamps, features).timestamp["word"]
        return [(word["word"], int(word["start_offset"]), int(word["end_offset"])) for word in words]

    @cached_property
    def _with_timestamps(self):
        """The model's decoding, set as `transcribe(timestamps=True)` of NeMo sets it; apart, since it takes longer."""
        from nemo.collections.asr.parts.submodules.rnnt_decoding import RNNTBPEDecoding
        from omegaconf import OmegaConf

        decoding, model = self.model.cfg.decoding.copy(), self.model
        OmegaConf.update(decoding, "compute_timestamps", True, force_add=True)
        return RNNTBPEDecoding(decoding, model.decoder, model.joint, model.tokenizer)

    def _decode(self, decoding, features: np.ndarray):
        import torch

        with torch.inference_mode():
            encoded, lengths = self.model.encoder(
                audio_signal=torch.from_numpy(features)[None], length=torch.tensor([features.shape[1]])
            )
            return decoding.rnnt_decoder_predictions_tensor(encoded, lengths, return_hypotheses=True)[0]
