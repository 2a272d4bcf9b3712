"""transformers' ParakeetForTDT with the parts that NeMo's models have, under NeMo's names.

The parts that are called (encoder, feature extractor, projections) compute with transformers' own modules. The others
are only read, so that common/export/wrappers.py can share their parameters: transformers' modules under NeMo's names.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForTDT,
    ParakeetTDTConfig,
)
from transformers.models.parakeet.feature_extraction_parakeet import LOG_ZERO_GUARD_VALUE


def build(
    model: dict[str, Any], encoder: dict[str, Any], features: dict[str, Any]
) -> tuple[ParakeetForTDT, ParakeetFeatureExtractor]:
    """The network, whose weights have no storage, and the feature extractor, built from these keys of their configs.

    Raises ValueError, or what transformers raises, where a value is not possible or two values contradict each other.
    """
    encoder_config = ParakeetEncoderConfig(**encoder)
    config = ParakeetTDTConfig(**model, encoder_config=encoder_config)
    extractor = ParakeetFeatureExtractor(**features)  # type: ignore[no-untyped-call]
    layers = math.log2(encoder_config.subsampling_factor)
    checks = (
        ("blank_token_id", config.blank_token_id, config.vocab_size - 1),  # where every runtime looks for it
        ("hidden_size", encoder_config.hidden_size % encoder_config.num_attention_heads, 0),
        ("subsampling_conv_stride", encoder_config.subsampling_conv_stride, 2),
        ("log2 of subsampling_factor", layers, float(int(layers))),
        ("feature_size of the feature extractor", extractor.feature_size, encoder_config.num_mel_bins),
        ("padding_value of the feature extractor", float(extractor.padding_value), 0.0),
    )
    for name, actual, expected in checks:
        if actual != expected:
            raise ValueError(f"expected {name} to be {expected}, got {actual}")
    with torch.device("meta"):
        network = ParakeetForTDT(config)
    # As transformers' converter sets it: a duration is not a token.
    network.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        decoder_start_token_id=config.blank_token_id,
        pad_token_id=config.pad_token_id,
        suppress_tokens=list(range(config.vocab_size, config.vocab_size + len(config.durations))),
    )
    # The one buffer that is computed and not stored.
    positions = network.encoder.encode_positions
    positions.inv_freq = positions.compute_default_relative_positional_parameters(encoder_config)
    return network, extractor


class ParakeetModel(nn.Module):
    """A model as `load_model` of a checkpoint format returns it. `network` is transformers' own, with `generate`."""

    def __init__(self, network: ParakeetForTDT, extractor: ParakeetFeatureExtractor, tokenizer_file: Path) -> None:
        super().__init__()
        config = network.config
        self.network = network
        self.tokenizer_file = tokenizer_file
        self.preprocessor = Preprocessor(extractor)
        self.encoder = Encoder(network.encoder)
        self.decoder = PredictionNetwork(network)
        self.joint = Joint(network)
        self.cfg = SimpleNamespace(decoding=SimpleNamespace(durations=config.durations))
        # transformers' generate does not force a step; its config carries NeMo's limit for other users.
        self.decoding = SimpleNamespace(decoding=SimpleNamespace(max_symbols=config.max_symbols_per_step))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Preprocessor:
    """transformers' ParakeetFeatureExtractor, called as NeMo's preprocessor is."""

    def __init__(self, extractor: ParakeetFeatureExtractor) -> None:
        self.extractor = extractor
        # These are read by ModelSpec. The attributes that are not numbers say what the extractor's code does.
        self.featurizer = SimpleNamespace(
            nfilt=extractor.feature_size,
            sample_rate=extractor.sampling_rate,
            n_fft=extractor.n_fft,
            win_length=extractor.win_length,
            hop_length=extractor.hop_length,
            preemph=extractor.preemphasis,
            log_zero_guard_value_fn=lambda x: LOG_ZERO_GUARD_VALUE,
            log_zero_guard_type="add",
            normalize="per_feature",
            mag_power=2.0,
            log=True,
            frame_splicing=1,
            exact_pad=False,
            window=torch.hann_window(extractor.win_length, periodic=False),
            fb=extractor.mel_filters[None],
        )

    def __call__(self, input_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """input_signal [B, N], length [B] → features [B, M, T], valid frames [B]"""
        clips = [row[: int(size)].cpu().numpy() for row, size in zip(input_signal, length, strict=True)]
        made = self.extractor(clips, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        features = made["input_features"].transpose(1, 2).to(input_signal.device)
        return features, made["attention_mask"].sum(-1).to(input_signal.device)


class Encoder(nn.Module):
    """transformers' ParakeetEncoder, called as NeMo's ConformerEncoder is."""

    library = "transformers"
    self_attention_model = "rel_pos"
    reduction_position = None
    out_proj = None
    att_context_size = (-1, -1)
    _create_masks = None  # needed only for a limited context

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        config = encoder.config
        self._feat_in: int = config.num_mel_bins
        self.d_model = self._feat_out = int(config.hidden_size)
        self.subsampling_factor: int = config.subsampling_factor
        self.xscale = encoder.input_scale if config.scale_input else None
        self.pre_encode = ConvSubsampling(conv=encoder.subsampling.layers, out=encoder.subsampling.linear)
        self.layers = [_layer(layer) for layer in encoder.layers]

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """audio_signal [B, M, T], length [B] mel frames → [B, D, S], [B] encoder frames"""
        mask = torch.arange(audio_signal.size(2), device=length.device)[None] < length[:, None]
        made = self.encoder(input_features=audio_signal.transpose(1, 2), attention_mask=mask)
        return made.last_hidden_state.transpose(1, 2), made.attention_mask.sum(-1)


class ConvSubsampling(SimpleNamespace):
    """The subsampling's layers and its matrix."""


def _layer(layer: Any) -> SimpleNamespace:
    """A ParakeetEncoderBlock under the names of NeMo's ConformerLayer."""
    attention, convolution = layer.self_attn, layer.conv
    return SimpleNamespace(
        norm_feed_forward1=layer.norm_feed_forward1,
        feed_forward1=layer.feed_forward1,
        norm_self_att=layer.norm_self_att,
        self_attn=SimpleNamespace(
            h=attention.config.num_attention_heads,
            s_d_k=math.sqrt(attention.head_dim),
            linear_q=attention.q_proj,
            linear_k=attention.k_proj,
            linear_v=attention.v_proj,
            linear_out=attention.o_proj,
            linear_pos=attention.relative_k_proj,
            pos_bias_u=attention.bias_u,
            pos_bias_v=attention.bias_v,
        ),
        norm_conv=layer.norm_conv,
        conv=SimpleNamespace(
            pointwise_activation="glu_",
            pointwise_conv1=convolution.pointwise_conv1,
            depthwise_conv=convolution.depthwise_conv,
            batch_norm=convolution.norm,
            activation=convolution.activation,
            pointwise_conv2=convolution.pointwise_conv2,
        ),
        norm_feed_forward2=layer.norm_feed_forward2,
        feed_forward2=layer.feed_forward2,
        norm_out=layer.norm_out,
        fc_factor=0.5,
        is_adapter_available=lambda: False,
    )


class PredictionNetwork(nn.Module):
    """The embedding and the LSTM of transformers' decoder, called as NeMo's RNNTDecoder is."""

    library = "transformers"
    blank_as_pad = True  # the blank has a row of the embedding, which primes the network

    def __init__(self, network: ParakeetForTDT) -> None:
        super().__init__()
        self.decoder = network.decoder
        self.blank_idx: int = network.config.blank_token_id
        self.pred_hidden: int = network.config.decoder_hidden_size
        self.pred_rnn_layers: int = network.config.num_decoder_layers
        self.prediction = {"embed": network.decoder.embedding, "dec_rnn": network.decoder}

    def predict(
        self, y: Tensor | None = None, state: Any = None, *, add_sos: bool = False, batch_size: int | None = None
    ) -> tuple[Tensor, Any]:
        """y [B, U], or None to prime the network with the blank; h and c [L, B, H] → [B, U, H], h and c"""
        if y is None:
            batch = state[0].size(1) if state is not None else batch_size or 1
            y = torch.full((batch, 1), self.blank_idx, device=self.decoder.embedding.weight.device)
        output, state = self.decoder.lstm(self.decoder.embedding(y), state)
        return output, state


class Joint(nn.Module):
    """The projections and the joint of transformers, which belong together in NeMo's RNNTJoint."""

    library = "transformers"

    def __init__(self, network: ParakeetForTDT) -> None:
        super().__init__()
        self.enc = network.encoder_projector
        self.pred = network.decoder.decoder_projector
        self.joint_net = nn.Sequential(network.joint.activation, network.joint.head)
        self.num_extra_outputs = len(network.config.durations)
        self.num_classes_with_blank: int = network.joint.head.out_features

    def project_encoder(self, encoded: Tensor) -> Tensor:
        """[…, D] → […, joint width]"""
        projected: Tensor = self.enc(encoded)
        return projected

    def project_prednet(self, predicted: Tensor) -> Tensor:
        """[…, H] → […, joint width]"""
        projected: Tensor = self.pred(predicted)
        return projected
