"""The reference: NeMo's own preprocessing, encoder, batched greedy decoding, text and word times."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from common.run.decode import DecodingConfig, Hypothesis, Prediction, greedy_tdt_decode


class NemoTranscript(NamedTuple):
    """The result of NeMo's own decoding of a clip."""

    tokens: list[int]
    frames: list[int]  # the encoder frame at which each token was emitted
    text: str  # what NeMo's `transcribe()` shows


class Nemo:
    """A model of NeMo's (EncDecRNNTBPEModel), set to batched greedy decoding."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # Beam search may choose other words, and plain greedy decoding other durations.
        if model.cfg.decoding.strategy != "greedy_batch":
            decoding = model.cfg.decoding.copy()
            decoding.strategy = "greedy_batch"
            model.change_decoding_strategy(decoding, verbose=False)

    def features(self, samples: np.ndarray) -> np.ndarray:
        """The features that NeMo computes of mono samples [N], valid frames only: [M, T]."""
        import torch

        with torch.inference_mode():
            signal = torch.from_numpy(samples)[None]
            length = torch.tensor([len(samples)])
            device = self.model.device
            features, lengths = self.model.preprocessor(input_signal=signal.to(device), length=length.to(device))
        valid: np.ndarray = features[0, :, : int(lengths[0])].cpu().numpy()
        return valid

    @property
    def sentencepiece_model(self) -> bytes:
        """The checkpoint's SentencePiece model, as NeMo has loaded it."""
        return bytes(self.model.tokenizer.tokenizer.serialized_model_proto())

    def transcribe(self, features: np.ndarray) -> NemoTranscript:
        """features [M, T] → tokens, frames and text, all of them NeMo's."""
        result = self._decode(self.model.decoding, features)
        return NemoTranscript(
            tokens=[int(token) for token in result.y_sequence],
            frames=[int(frame) for frame in result.timestamp],
            text=result.text,
        )

    def trace(self, features: np.ndarray) -> Hypothesis:
        """features [M, T] → the same decoding step by step, on NeMo's own modules, with the margin of each decision."""
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

    def words(self, features: np.ndarray) -> list[tuple[str, int, int]]:
        """features [M, T] → each word with NeMo's own start and end, in encoder frames."""
        words = self._decode(self._with_timestamps, features).timestamp["word"]
        return [(word["word"], int(word["start_offset"]), int(word["end_offset"])) for word in words]

    @cached_property
    def _with_timestamps(self) -> Any:
        """A decoding with times, as NeMo's `transcribe(timestamps=True)` sets it; separate, since it takes longer."""
        from nemo.collections.asr.parts.submodules.rnnt_decoding import RNNTBPEDecoding
        from omegaconf import OmegaConf

        model = self.model
        decoding = model.cfg.decoding.copy()
        OmegaConf.update(decoding, "compute_timestamps", value=True, force_add=True)
        return RNNTBPEDecoding(decoding, model.decoder, model.joint, model.tokenizer)

    def _decode(self, decoding: Any, features: np.ndarray) -> Any:
        """features [M, T] → a Hypothesis of NeMo's."""
        import torch

        with torch.inference_mode():
            return decoding.rnnt_decoder_predictions_tensor(*self._encode(features), return_hypotheses=True)[0]

    def _encode(self, features: np.ndarray) -> Any:
        """features [M, T] → frames [1, D, S] and their number [1]."""
        import torch

        return self.model.encoder(
            audio_signal=torch.from_numpy(features)[None], length=torch.tensor([features.shape[1]])
        )
