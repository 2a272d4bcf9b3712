"""The three PyTorch modules that are exported. Each shares the NeMo model's parameters and computes what it computes.

They exist because NeMo's modules, traced as they are, give graphs that fail or waste (nemo_toolkit 3.0.0):
positions come from a table that ends at 5000 frames, pointwise convolutions are skipped by MatMul quantizers, masks
are filled twice per layer, and every reshape drags its shape arithmetic along.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# What NeMo writes in the place of a masked score (INF_VAL in parts/submodules/multi_head_attention.py).
MASKED_SCORE = -10000.0


class _Reshape(torch.autograd.Function):
    """Reshape by the ONNX rule (0 keeps a dimension), so that the graph holds one node and no shape arithmetic."""

    @staticmethod
    def forward(ctx, x: Tensor, *shape: int) -> Tensor:
        return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])

    @staticmethod
    def symbolic(g, x, *shape: int):
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape)))


class _RelativeShift(torch.autograd.Function):
    """Column j of row i becomes the score of the distance i-j: [B, heads, S, 2S] → [B, heads, S, S].

    Row i of the input needs the columns S-1-i …; read as one vector, every next row starts 2S-1 later. So: flatten,
    drop the first S-1, take rows of 2S-1, keep S columns. `like` is any tensor whose last dimension is S.
    """

    @staticmethod
    def forward(ctx, x: Tensor, like: Tensor) -> Tensor:
        frames = like.size(-1)
        flat = x.flatten(2)[:, :, frames - 1 : frames - 1 + frames * (2 * frames - 1)]
        return flat.unflatten(2, (frames, 2 * frames - 1))[..., :frames]

    @staticmethod
    def symbolic(g, x, like):
        def constant(*values: int):
            return g.op("Constant", value_t=torch.tensor(values))

        # Every layer writes the same shape arithmetic; export.py merges it into one.
        frames = g.op("Gather", g.op("Shape", like), constant(-1), axis_i=0)
        first = g.op("Sub", frames, constant(1))
        row = g.op("Add", frames, first)
        stop = g.op("Add", first, g.op("Mul", frames, row))
        flat = g.op("Slice", g.op("Reshape", x, constant(0, 0, -1)), first, stop, constant(2))
        rows = g.op("Reshape", flat, g.op("Concat", constant(0, 0), frames, constant(-1), axis_i=0))
        return g.op("Slice", rows, constant(0), frames, constant(3))


class Linear(nn.Module):
    """y = x W + b with W kept as [in, out], the layout of ONNX MatMul; it is a view of NeMo's [out, in] weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight.t(), requires_grad=False)
        self.bias = bias

    @classmethod
    def of(cls, module: nn.Linear | nn.Conv1d) -> "Linear":
        """From a linear layer, or from a convolution of kernel size 1, which is one."""
        return cls(module.weight.detach().flatten(1), module.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class RelativePositions(nn.Module):
    """Sinusoids of the relative distances S-1 … -S, computed in the graph (Transformer-XL, arXiv:1901.02860, B).

    NeMo's table has the distances S-1 … -(S-1); the one more makes the relative shift a slice without padding.
    """

    def __init__(self, dim: int, scale: float | None):
        super().__init__()
        self.scale = scale
        frequencies = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10000.0) / dim))
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B, S, D] → [B, S, D], [1, 2S, D]
        frames = x.size(1)
        distance = torch.arange(frames - 1, -frames - 1, -1, dtype=torch.float32, device=x.device)
        angle = distance[None, :, None] * self.frequencies
        positions = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(2)
        return (x if self.scale is None else x * self.scale), positions


class RelativeAttention(nn.Module):
    """NeMo's RelPositionMultiHeadAttention with an additive mask."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.scale = attention.h, 1.0 / attention.s_d_k
        self.query, self.key, self.value, self.out, self.position = (
            Linear.of(getattr(attention, f"linear_{name}")) for name in ("q", "k", "v", "out", "pos")
        )
        self.content_bias, self.position_bias = attention.pos_bias_u, attention.pos_bias_v  # [heads, dk]

    def forward(self, x: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
        """x [B, S, D], positions [1, 2S, D], bias [B, 1, 1 or S, S] → [B, S, D]"""
        query, key, value, position = (
            _Reshape.apply(y, 0, 0, self.heads, -1)
            for y in (self.query(x), self.key(x), self.value(x), self.position(positions))
        )
        by_content = torch.matmul(self._heads_first(query + self.content_bias), key.permute(0, 2, 3, 1))
        by_position = torch.matmul(self._heads_first(query + self.position_bias), position.permute(0, 2, 3, 1))
        scores = (by_content + _RelativeShift.apply(by_position, bias)) * self.scale + bias
        context = torch.matmul(scores.softmax(dim=-1), self._heads_first(value))
        return self.out(_Reshape.apply(self._heads_first(context), 0, 0, -1))

    @staticmethod
    def _heads_first(x: Tensor) -> Tensor:
        """[B, S, heads, dk] ↔ [B, heads, S, dk]"""
        return x.transpose(1, 2)


class Convolution(nn.Module):
    """NeMo's ConformerConvolution with its pointwise convolutions as linear layers, batch norm folded in."""

    def __init__(self, convolution):
        super().__init__()
        if convolution.pointwise_activation != "glu_":
            raise ValueError(f"wanted a GLU in the convolution module, found {convolution.pointwise_activation}")
        self.expand, self.project = Linear.of(convolution.pointwise_conv1), Linear.of(convolution.pointwise_conv2)
        self.depthwise, self.norm = convolution.depthwise_conv, convolution.batch_norm
        self.padding = (self.depthwise._left_padding, self.depthwise._right_padding)
        self.activation = convolution.activation
        if isinstance(self.norm, nn.BatchNorm1d):
            self.depthwise, self.norm = fuse_conv_bn_eval(self.depthwise, self.norm), None

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # [B, S, D], [B, S, 1] → [B, S, D]
        x = nn.functional.glu(self.expand(x), dim=-1) * keep
        x = x.transpose(1, 2)
        left, right = self.padding
        if left == right:  # inside the Conv node, where a runtime pads for nothing
            padding = left
        else:
            x, padding = nn.functional.pad(x, self.padding), 0
        weight, groups = self.depthwise.weight, self.depthwise.groups
        x = nn.functional.conv1d(x, weight, self.depthwise.bias, padding=padding, groups=groups)
        if isinstance(self.norm, nn.LayerNorm):
            x = self.activation(self.norm(x.transpose(1, 2)))
        else:
            x = self.activation(x if self.norm is None else self.norm(x)).transpose(1, 2)
        return self.project(x)


class FeedForward(nn.Module):
    """NeMo's ConformerFeedForward."""

    def __init__(self, feed_forward):
        super().__init__()
        self.expand, self.project = Linear.of(feed_forward.linear1), Linear.of(feed_forward.linear2)
        self.activation = feed_forward.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.activation(self.expand(x)))


class Layer(nn.Module):
    """One Conformer block (arXiv:2005.08100): half a feed-forward, attention, convolution, half a feed-forward."""

    def __init__(self, layer):
        super().__init__()
        self.norm_feed_forward1, self.feed_forward1 = layer.norm_feed_forward1, FeedForward(layer.feed_forward1)
        self.norm_attention, self.attention = layer.norm_self_att, RelativeAttention(layer.self_attn)
        self.norm_convolution, self.convolution = layer.norm_conv, Convolution(layer.conv)
        self.norm_feed_forward2, self.feed_forward2 = layer.norm_feed_forward2, FeedForward(layer.feed_forward2)
        self.norm_out, self.fc_factor = layer.norm_out, layer.fc_factor

    def forward(self, x: Tensor, positions: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        x = x + self.feed_forward1(self.norm_feed_forward1(x)) * self.fc_factor
        x = x + self.attention(self.norm_attention(x), positions, bias)
        x = x + self.convolution(self.norm_convolution(x), keep)
        x = x + self.feed_forward2(self.norm_feed_forward2(x)) * self.fc_factor
        return self.norm_out(x)


class Encoder(nn.Module):
    """NeMo's ConformerEncoder for whole utterances. Raises ValueError naming what it does not compute."""

    weights_as_inputs = True

    def __init__(self, encoder):
        super().__init__()
        _refuse_unknown(encoder)
        self.num_mels = encoder._feat_in
        self.subsampling = _share_parameters(encoder.pre_encode)
        if isinstance(getattr(self.subsampling, "out", None), nn.Linear):
            self.subsampling.out = Linear.of(self.subsampling.out)
        self.positions = RelativePositions(encoder.d_model, encoder.xscale)
        self.layers = nn.ModuleList(Layer(layer) for layer in encoder.layers)
        self.projection = Linear.of(encoder.out_proj) if encoder.out_proj is not None else nn.Identity()
        self._limited_context = any(size >= 0 for size in encoder.att_context_size)
        self._context_mask = encoder._create_masks
        self._context_size = encoder.att_context_size
        self.eval().to(next(encoder.parameters()).device)

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """audio_signal [B, M, T], length [B] mel frames → [B, D, S], [B] encoder frames (int64)"""
        x, length = self.subsampling(x=audio_signal.transpose(1, 2), lengths=length)
        length = length.to(torch.int64)
        x, positions = self.positions(x)
        keep = torch.arange(x.size(1), device=x.device)[None, :] < length[:, None]  # [B, S]
        bias = self._attention_bias(keep, length)
        keep = keep[:, :, None].to(x.dtype)
        for layer in self.layers:
            x = layer(x, positions, bias, keep)
        return self.projection(x).transpose(1, 2), length

    def _attention_bias(self, keep: Tensor, length: Tensor) -> Tensor:
        """What is added to the scores: 0 where a frame may look, MASKED_SCORE where not. [B, 1, 1 or S, S]

        Only keys are masked: a padded query's result reaches no valid frame.
        """
        if not self._limited_context:
            return (~keep[:, None, None, :]).to(torch.float32) * MASKED_SCORE
        _, masked = self._context_mask(self._context_size, length, keep.size(1), offset=None, device=keep.device)
        return masked[:, None].to(torch.float32) * MASKED_SCORE

    def example_inputs(self, batch: int = 2, frames: int = 200) -> tuple[Tensor, Tensor]:
        """A ragged batch of noise: features [B, M, T], lengths [B] that fall from T."""
        lengths = torch.tensor([frames - i * frames // (3 * batch) for i in range(batch)])
        generator = torch.Generator().manual_seed(frames)
        features = torch.randn(batch, self.num_mels, frames, generator=generator)
        return features.masked_fill(torch.arange(frames)[None, None, :] >= lengths[:, None, None], 0.0), lengths


def _refuse_unknown(encoder) -> None:
    subsampling = type(getattr(encoder, "pre_encode", None)).__name__
    wanted = {
        "self_attention_model": (getattr(encoder, "self_attention_model", None), ("rel_pos",)),
        "reduction_position": (getattr(encoder, "reduction_position", None), (None,)),
        "subsampling module": (subsampling, ("ConvSubsampling", "StackingSubsampling")),
    }
    for name, (found, known) in wanted.items():
        if found not in known:
            choices = " or ".join(map(repr, known))
            raise ValueError(f"wanted a FastConformer encoder with {name} {choices}, found {found!r}: not exported")
    if any(layer.is_adapter_available() for layer in encoder.layers):
        raise ValueError("the encoder has adapters, which are not exported; merge or disable them first")


def _share_parameters(module: nn.Module) -> nn.Module:
    """A copy whose submodules can be replaced without touching the original; tensors are the original's own."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})


class StatefulDecoder(nn.Module):
    """NeMo's RNNTDecoder (prediction network) one or more tokens at a time, LSTM state in and out."""

    weights_as_inputs = False

    def __init__(self, decoder):
        super().__init__()
        self.decoder = _share_parameters(decoder)
        lstm = getattr(self.decoder.prediction["dec_rnn"], "lstm", None)
        if not isinstance(lstm, nn.LSTM) or lstm.hidden_size != decoder.pred_hidden or lstm.proj_size:
            raise ValueError(
                f"wanted an LSTM prediction network of width {decoder.pred_hidden} without normalisation or "
                f"projection, found {decoder.prediction['dec_rnn']}: not exported"
            )
        self.state_shape = (lstm.num_layers, lstm.hidden_size)
        if not decoder.blank_as_pad:  # give blank, which primes the network, the zero vector that NeMo uses there
            embedding = self.decoder.prediction["embed"]
            weight = torch.cat((embedding.weight, torch.zeros_like(embedding.weight[:1])))
            self.decoder.prediction["embed"] = nn.Embedding.from_pretrained(weight)
        self.vocab_size = self.decoder.prediction["embed"].num_embeddings
        self.eval()

    def forward(
        self, targets: Tensor, target_length_orig: Tensor, h_in: Tensor, c_in: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """targets [B, U], lengths [B], h and c [L, B, H] → [B, H, U], lengths [B], h and c [L, B, H]"""
        output, (h_out, c_out) = self.decoder.predict(targets, state=(h_in, c_in), add_sos=False)
        return output.transpose(1, 2), target_length_orig.clone(), h_out, c_out

    def example_inputs(self, batch: int = 2, targets: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random tokens [B, U], their lengths [B], a zero state [L, B, H] twice."""
        generator = torch.Generator().manual_seed(targets)
        layers, width = self.state_shape
        tokens = torch.randint(self.vocab_size, (batch, targets), generator=generator)
        state = torch.zeros(layers, batch, width)
        return tokens, torch.full((batch,), targets), state, state.clone()


class TdtJoint(nn.Module):
    """NeMo's RNNTJoint, raw logits: tokens with blank last, then durations."""

    weights_as_inputs = False

    def __init__(self, joint):
        super().__init__()
        self.joint = _share_parameters(joint)
        # None means log_softmax over tokens and durations together on a CPU, which is neither's probability.
        self.joint.log_softmax = False
        self.widths = (joint.enc.in_features, joint.pred.in_features)
        self.eval()

    def forward(self, encoder_output: Tensor, decoder_output: Tensor) -> Tensor:
        """[B, S, D], [B, U, H] → [B, S, U, V+K]"""
        return self.joint.joint(encoder_output, decoder_output)

    def example_inputs(self, batch: int = 2, frames: int = 3, targets: int = 2) -> tuple[Tensor, Tensor]:
        """Noise of the size of normalised activations: [B, S, D], [B, U, H]."""
        generator = torch.Generator().manual_seed(frames * 100 + targets)
        encoder_width, decoder_width = self.widths
        return (
            torch.randn(batch, frames, encoder_width, generator=generator),
            torch.randn(batch, targets, decoder_width, generator=generator).tanh(),
        )


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the name torch.onnx.export gives them as graph inputs."""
    yield from module.named_parameters()
    yield from module.named_buffers()
