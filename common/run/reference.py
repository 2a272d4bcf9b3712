"""What the exported graphs are compared with: the library that the checkpoint belongs to, NeMo or transformers.

The model that `load_model` of a checkpoint format returns has the parts of a model of NeMo. Features and the
step-by-step decoding are computed with these parts; whole transcripts come from the library itself.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from common.run.decode import Hypothesis, Prediction, TimedWord, Transcript, greedy_tdt_decode


def features_of(model: Any, samples: np.ndarray) -> np.ndarray:
    """The features that a model's library computes from mono samples [N], valid frames only: [M, T]."""
    import torch

    with torch.inference_mode():
        signal = torch.from_numpy(samples)[None].to(model.device)
        features, lengths = model.preprocessor(
            input_signal=signal, length=torch.tensor([len(samples)]).to(model.device)
        )
    valid: np.ndarray = features[0, :, : int(lengths[0])].cpu().numpy()
    return valid


class _Library:
    """What is the same for a model of either library."""

    limits_symbols = True  # whether the library forces a step after max_symbols tokens on one frame

    def __init__(self, model: Any) -> None:
        self.model = model

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
            fed = None if states[0] is None else torch.tensor([[tokens[0]]])
            output, state = decoder.predict(y=fed, state=states[0], add_sos=False, batch_size=1)
            return [Prediction(joint.project_prednet(output)[0], state)]

        def join(frames: np.ndarray, outputs: Sequence[Any]) -> np.ndarray:
            logits: np.ndarray = joint.joint_net(joint.project_encoder(torch.from_numpy(frames)) + outputs[0]).numpy()
            return logits

        with torch.inference_mode():
            encoded, lengths = self._encode(features)
            return greedy_tdt_decode(
                [[encoded[0, :, : int(lengths[0])].T.numpy()]],
                predict,
                join,
                blank_id=decoder.blank_idx,
                durations=self.model.cfg.decoding.durations,
                max_symbols=self.model.decoding.decoding.max_symbols,
            )[0]

    def _encode(self, features: np.ndarray) -> Any:
        """features [M, T] → frames [1, D, S] and their number [1]."""
        import torch

        signal = torch.from_numpy(features)[None]
        return self.model.encoder(audio_signal=signal, length=torch.tensor([features.shape[1]]))


class Nemo(_Library):
    """A model of NeMo's (EncDecRNNTBPEModel), as common/checkpoint/nemo.py has built it, with batched greedy decoding.
    Its text is as `transcribe()` gives it."""

    name = "NeMo"

    @property
    def sentencepiece_model(self) -> bytes:
        """The checkpoint's SentencePiece model, as NeMo has loaded it."""
        return bytes(self.model.tokenizer.tokenizer.serialized_model_proto())

    def transcribe(self, features: np.ndarray) -> Transcript:
        """features [M, T] → tokens, frames and text, all of them NeMo's."""
        result = self._decode(self.model.decoding, features)
        return Transcript(result.y_sequence.tolist(), result.text, frames=[int(frame) for frame in result.timestamp])

    def words(self, features: np.ndarray) -> list[TimedWord]:
        """features [M, T] → the words with NeMo's own times."""
        words = self._decode(self._with_timestamps, features).timestamp["word"]
        return [TimedWord(word["word"], int(word["start_offset"]), int(word["end_offset"])) for word in words]

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


class Transformers(_Library):
    """A ParakeetForTDT of transformers, as common/checkpoint/transformers_model.py has built it."""

    name = "transformers"
    limits_symbols = False

    @property
    def sentencepiece_model(self) -> bytes:
        """The checkpoint's SentencePiece model, or the one that its tokenizer.json stands for."""
        return bytes(self.model.sentencepiece)

    def transcribe(self, features: np.ndarray) -> Transcript:
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
        return Transcript(tokens, str(self._tokenizer.decode(tokens)), frames=[frame for _, frame in steps])

    def words(self, features: np.ndarray) -> None:
        """None: transformers gives times of tokens only, and those are compared together with the tokens."""

    @cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer of the checkpoint itself: tokenizer.json, or the SentencePiece model."""
        from sentencepiece import SentencePieceProcessor
        from tokenizers import Tokenizer

        path = self.model.tokenizer_file
        return Tokenizer.from_file(str(path)) if path.suffix == ".json" else SentencePieceProcessor(str(path))


Reference = Nemo | Transformers
