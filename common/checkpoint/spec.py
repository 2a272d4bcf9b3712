"""The numbers of a checkpoint, read from the modules that NeMo has built; no later step assumes any of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSpec:
    """Every number of a checkpoint that a graph or a configuration file needs.

    They are read from the built modules, since these have a value even for a key that the checkpoint's YAML lacks.
    """

    num_mels: int  # M
    encoder_dim: int  # D
    encoder_layers: int
    subsampling_factor: int  # mel frames to an encoder frame
    decoder_dim: int  # H
    decoder_layers: int  # L
    vocab_size: int  # V, blank included
    durations: tuple[int, ...]  # frames, by index
    max_symbols: int | None  # tokens on one frame before a forced step; None: no limit
    sample_rate: int  # Hz
    fft_size: int  # samples
    win_length: int  # samples
    hop_length: int  # samples
    preemphasis: float
    log_guard: float  # added to the mel energies before the logarithm
    unsupported_features: tuple[str, ...]  # how the features differ from log-mel, Hann, power 2, per-feature
    # What NeMo adds to the standard deviation (`CONSTANT` in nemo/collections/asr/parts/preprocessing/features.py).
    norm_eps: float = 1e-5

    @property
    def blank_id(self) -> int:
        return self.vocab_size - 1

    @classmethod
    def of(cls, model: Any) -> "ModelSpec":
        """The numbers of NeMo's `model`. Raises ValueError where its parts contradict each other."""
        features = model.preprocessor.featurizer
        encoder, decoder, joint = model.encoder, model.decoder, model.joint
        durations = tuple(int(duration) for duration in model.cfg.decoding.durations)
        vocab_size = decoder.blank_idx + 1
        joint_durations = joint.num_extra_outputs
        joint_tokens = joint.num_classes_with_blank - joint_durations  # NeMo counts tokens and durations together
        if (joint_tokens, joint_durations) != (vocab_size, len(durations)):
            raise ValueError(
                f"the checkpoint contradicts itself: its joint has {joint_tokens} tokens and {joint_durations} "
                f"durations, its decoder {vocab_size} tokens, and its decoding {len(durations)} durations"
            )
        import torch

        return cls(
            num_mels=features.nfilt,
            encoder_dim=encoder._feat_out,
            encoder_layers=len(encoder.layers),
            subsampling_factor=encoder.subsampling_factor,
            decoder_dim=decoder.pred_hidden,
            decoder_layers=decoder.pred_rnn_layers,
            vocab_size=vocab_size,
            durations=durations,
            max_symbols=model.decoding.decoding.max_symbols,
            sample_rate=features.sample_rate,
            fft_size=features.n_fft,
            win_length=features.win_length,
            hop_length=features.hop_length,
            preemphasis=features.preemph or 0.0,
            log_guard=float(features.log_zero_guard_value_fn(torch.zeros(1))),
            unsupported_features=tuple(_feature_differences(features)),
        )


def _feature_differences(features: Any) -> Iterator[str]:
    """How NeMo's FilterbankFeatures differ from the log-mel features that runtimes compute.

    Runtimes use Slaney mels over the whole band and a symmetric Hann window (nemo_mel_spectrogram.cc of
    onnxruntime-extensions).
    """
    import torch
    from librosa.filters import mel

    expected = {
        "normalize": "per_feature",
        "mag_power": 2.0,
        "log": True,
        "log_zero_guard_type": "add",
        "frame_splicing": 1,
        "exact_pad": False,
    }
    for name, value in expected.items():
        actual = getattr(features, name)
        if actual != value:
            yield f"{name} is {actual!r}, not {value!r}"
    hann = torch.hann_window(features.win_length, periodic=False)
    if features.window is None or not torch.allclose(features.window.float().cpu(), hann, atol=1e-4):
        yield "window is not the symmetric Hann window"
    slaney = torch.tensor(mel(sr=features.sample_rate, n_fft=features.n_fft, n_mels=features.nfilt))
    if not torch.allclose(features.fb[0].float().cpu(), slaney, rtol=1e-2, atol=1e-5):
        yield "the mel filterbank is not Slaney's over the whole band"
