"""XXX docstring of run.nemo"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from common.run.decode import Hypothesis, Prediction, greedy_tdt_decode


class NemoTranscript(NamedTuple):
    """What NeMo's own decoding gives of a clip; `text` is what `transcribe()` of NeMo shows."""

    tokens: list[int]
    frames: list[int]  # the encoder frame that each token was emitted at
    text: str


class Nemo:
    """The reference: NeMo's own preprocessing, encoder and batched greedy decoding."""

    def __init__(self, model) -> None:
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

    @property
    def sentencepiece_model(self) -> bytes:
        """The checkpoint's own, as NeMo has loaded it."""
        return self.model.tokenizer.tokenizer.serialized_model_proto()

    def transcribe(self, features: np.ndarray) -> NemoTranscript:
        """features [M, T] → tokens, frames and text, all NeMo's"""
        found = self._decode(self.model.decoding, features)
        tokens, frames = ([int(number) for number in numbers] for numbers in (found.y_sequence, found.timestamp))
        return NemoTranscript(tokens, frames, found.text)

    def trace(self, features: np.ndarray) -> Hypothesis:
        """features [M, T] → the same decoding step by step, on NeMo's own modules: where it was nearly another"""
        import torch

        decoder, joint, config = self.model.decoder, self.model.joint, self.model.cfg.decoding

        def predict(tokens, states):
            token, state = tokens[0], states[0]
            start = {"y": None, "batch_size": 1} if state is None else {"y": torch.tensor([[token]])}
            output, state = decoder.predict(state=state, add_sos=False, **start)
            return [Prediction(joint.project_prednet(output)[0], state)]

        def join(frames, outputs):
            return joint.joint_net(joint.project_encoder(torch.from_numpy(frames)) + outputs[0]).numpy()

        with torch.inference_mode():
            encoded, lengths = self._encode(features)
            frames = encoded[0].T.numpy()
            return greedy_tdt_decode(
                [frames],
                [[int(lengths[0])]],
                predict,
                join,
                blank_id=decoder.blank_idx,
                durations=tuple(config.durations),
                max_symbols=self.model.decoding.decoding.max_symbols,
            )[0]

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
            return decoding.rnnt_decoder_predictions_tensor(*self._encode(features), return_hypotheses=True)[0]

    def _encode(self, features: np.ndarray):
        import torch

        return self.model.encoder(
            audio_signal=torch.from_numpy(features)[None], length=torch.tensor([features.shape[1]])
        )
