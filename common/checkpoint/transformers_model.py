"""transformers' ParakeetForTDT with the parts that NeMo's models have, under NeMo's names.

The parts that are called (encoder, feature extractor, projections) compute with transformers' own modules. The others
are only read, so that common/export/wrappers.py can share their parameters: transformers' modules under NeMo's names.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForTDT,
    ParakeetTDTConfig,
)
from transformers.models.parakeet.feature_extraction_parakeet import LOG_ZERO_GUARD_VALUE

from common.checkpoint.ternary import QWEIGHT, SCALES, TernaryModule, unpack

# The numbers that are taken from the configs. Other keys may make transformers download and run code.
ENCODER_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "attention_bias",
    "convolution_bias", "conv_kernel_size", "subsampling_factor", "subsampling_conv_channels", "num_mel_bins",
    "subsampling_conv_kernel_size", "subsampling_conv_stride", "max_position_embeddings", "scale_input",
)  # fmt: skip
MODEL_KEYS = (
    "vocab_size", "decoder_hidden_size", "num_decoder_layers", "hidden_act", "max_symbols_per_step", "durations",
    "pad_token_id", "blank_token_id",
)  # fmt: skip
FEATURE_KEYS = (
    "feature_size", "sampling_rate", "hop_length", "n_fft", "win_length", "preemphasis", "padding_value",
)  # fmt: skip
LONGEST_REASON = 400  # characters of a list of tensors that do not fit, in a message


def load(
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
    tokenizer: tuple[Path, bytes],
    tensors: Mapping[Path, Sequence[str]],
    modules: Sequence[TernaryModule],
    device: str,
) -> "ParakeetModel":
    """transformers' ParakeetForTDT in float32, in evaluation mode, with the parts that NeMo's models have.

    configs: of the model and of the feature extractor, which have been checked. tokenizer: its file, and its
    SentencePiece model. tensors: file → names of the used ones in it. modules: the matrices that are stored
    packed. Raises ValueError for configs that transformers cannot build, and weights that do not fit the config
    exactly or are not finite.
    """
    try:
        network, extractor = _build(*configs)
    except Exception as error:  # transformers raises whatever its checks and torch's constructors raise
        raise ValueError(f"config.json beside {next(iter(tensors))} cannot be built: {error}") from error
    state: dict[str, Tensor] = {}
    for path, names in tensors.items():
        with safe_open(path, framework="pt", device=device) as file:
            stored = {name: file.get_tensor(name) for name in names}
        state |= {name: one.float() if one.is_floating_point() else one for name, one in stored.items()}
    for module in modules:
        qweight, scales = (state.pop(f"{module.name}{part}") for part in (QWEIGHT, SCALES))
        state[f"{module.name}.weight"] = unpack(module, qweight, scales)
    if wrong := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more tensors of {path} hold values that are not finite")
    # The counters of batch normalisations, the only tensors of whole numbers, are not used.
    counters = {name: one for name, one in network.state_dict().items() if not one.is_floating_point()}
    state |= {name: torch.zeros_like(one, device=device) for name, one in counters.items()}
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ValueError(f"{path} does not fit its config.json; download it again ({reason})") from None
    return ParakeetModel(network, extractor, *tokenizer).to(device).eval().requires_grad_(requires_grad=False)


def _build(config: Mapping[str, Any], features: Mapping[str, Any]) -> tuple[ParakeetForTDT, ParakeetFeatureExtractor]:
    """The network, whose weights have no storage, and the feature extractor of two configs."""
    encoder = config["encoder_config"]
    encoder_config = ParakeetEncoderConfig(**{key: encoder[key] for key in ENCODER_KEYS if key in encoder})
    numbers = {key: config[key] for key in MODEL_KEYS if key in config}
    model_config = ParakeetTDTConfig(**numbers, encoder_config=encoder_config)
    numbers = {key: features[key] for key in FEATURE_KEYS if key in features}
    extractor = ParakeetFeatureExtractor(**numbers)  # type: ignore[no-untyped-call]
    if extractor.feature_size != encoder_config.num_mel_bins:
        raise ValueError(
            f"feature_size of the feature extractor is {extractor.feature_size}, and num_mel_bins of the encoder is "
            f"{encoder_config.num_mel_bins}"
        )
    with torch.device("meta"):
        network = ParakeetForTDT(model_config)
    # As transformers' converter sets it: a duration is not a token.
    network.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        decoder_start_token_id=model_config.blank_token_id,
        pad_token_id=model_config.pad_token_id,
        suppress_tokens=list(range(model_config.vocab_size, model_config.vocab_size + len(model_config.durations))),
    )
    # The one buffer that is computed and not stored.
    positions = network.encoder.encode_positions
    positions.inv_freq = positions.compute_default_relative_positional_parameters(encoder_config)
    return network, extractor


class ParakeetModel(nn.Module):
    """A model as `load_model` of a checkpoint returns it. `network` is transformers' own, with `generate`."""

    def __init__(
        self, network: ParakeetForTDT, extractor: ParakeetFeatureExtractor, tokenizer_file: Path, sentencepiece: bytes
    ) -> None:
        super().__init__()
        config = network.config
        self.network = network
        self.tokenizer_file = tokenizer_file
        self.sentencepiece = sentencepiece
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
        self.pre_encode = SimpleNamespace(conv=encoder.subsampling.layers, out=encoder.subsampling.linear)
        self.layers = [_layer(layer) for layer in encoder.layers]

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """audio_signal [B, M, T], length [B] mel frames → [B, D, S], [B] encoder frames"""
        mask = torch.arange(audio_signal.size(2), device=length.device)[None] < length[:, None]
        made = self.encoder(input_features=audio_signal.transpose(1, 2), attention_mask=mask)
        return made.last_hidden_state.transpose(1, 2), made.attention_mask.sum(-1)


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
        # NeMo's layers, and its functions that call them: […, D] and […, H] → […, joint width].
        self.enc = self.project_encoder = network.encoder_projector
        self.pred = self.project_prednet = network.decoder.decoder_projector
        self.joint_net = nn.Sequential(network.joint.activation, network.joint.head)
        self.num_extra_outputs = len(network.config.durations)
        self.num_classes_with_blank: int = network.joint.head.out_features
