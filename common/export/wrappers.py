"""The three PyTorch modules that are exported. Each shares the NeMo model's parameters and computes what it computes.

They exist because NeMo's modules, traced as they are, give graphs that fail or waste (nemo_toolkit 3.0.0):
positions come from a table that ends at 5000 frames, pointwise convolutions are skipped by MatMul quantizers, masks
are filled twice per layer, and every reshape drags its shape arithmetic along. Where two forms of one computation are
equal, the one that ONNX Runtime's own optimizations turn into faster operators is written (1.32, times on 2 cores).
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# What NeMo writes in the place of a masked score (INF_VAL in parts/submodules/multi_head_attention.py).
MASKED_SCORE = -10000.0
# What is taken from a masked frame before a ReLU, once to three times: more than a convolution of normalised features
# reaches, and still a number in float16.
MASKED_ACTIVATION = 20000.0


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


class Subsampling(nn.Module):
    """NeMo's ConvSubsampling by 2-d convolutions, masked only where a masked frame would reach a valid one.

    That is before a kernel longer than one frame; NeMo masks before and after each of its layers. The mask behind the
    first convolution, where activations are largest (65 MB for 20 s), is an input channel: 1 where a frame is masked,
    times so negative a weight that ReLU makes 0 of whatever else was there, and valid frames stay what they are.
    For 20 s of audio that is 48 ms; 74 ms with that mask as a product, which also leaves the blocked layout.
    """

    def __init__(self, subsampling):
        super().__init__()
        self.layers = nn.ModuleList(_share_parameters(subsampling.conv))
        self.out = Linear.of(subsampling.out)
        first = self.layers[0]
        self.first_masks = first.in_channels == 1 and isinstance(self.layers[1], nn.ReLU)
        if self.first_masks:
            mask = torch.zeros_like(first.weight)
            # Frame t of the output is valid if and only if the last tap that is no right padding is on a valid frame.
            # All taps along frequency, since any one of them may lie on the padding there.
            _, right = _padding(first, 0)
            mask[:, :, first.kernel_size[0] - 1 - right] = -MASKED_ACTIVATION
            weight = torch.cat((first.weight.detach(), mask), dim=1)
            first.weight = nn.Parameter(weight, requires_grad=False)  # [channels, 2, kernel, kernel]

    @staticmethod
    def computes(subsampling) -> bool:
        """Whether `subsampling` is made of what this class knows."""
        layers = list(getattr(subsampling, "conv", ()))
        known = (nn.Conv2d, nn.ReLU, nn.SiLU, nn.GELU)
        return isinstance(getattr(subsampling, "out", None), nn.Linear) and all(isinstance(x, known) for x in layers)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, M], lengths [B] → [B, S, D], [B]"""
        x, masked = x.unsqueeze(1), False  # [B, 1, T, M]
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, nn.Conv2d):
                x = layer(x)
                continue
            if layer.kernel_size[0] > 1 and not masked:
                keep = self._keep(x, lengths)
                x = x * keep
            masked = i == 0 and self.first_masks
            if masked:
                x = torch.cat((x, (1 - keep).expand_as(x)), dim=1)
            x = self._convolve(layer, x)
            if layer.stride[0] > 1:
                # (length + padding - kernel) // stride + 1, of which ONNX's Div would round a negative quotient up
                rest = sum(_padding(layer, 0)) - layer.kernel_size[0] + layer.stride[0]
                lengths = (lengths + rest) // layer.stride[0]
        return self.out(x.transpose(1, 2).flatten(2)), lengths

    @staticmethod
    def _keep(x: Tensor, lengths: Tensor) -> Tensor:
        """1 for a valid frame of x, 0 for a masked one: [B, 1, T, 1]"""
        frames = torch.arange(x.size(2), device=x.device)
        return (frames[None, None, :, None] < lengths[:, None, None, None]).to(x.dtype)

    @staticmethod
    def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
        padding, (above, below), (left, right) = layer.padding, _padding(layer, 0), _padding(layer, 1)
        if (above, left) != tuple(padding):  # NeMo's CausalConv2D pads by itself
            x = nn.functional.pad(x, (left, right, above, below))
        return nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def _padding(layer: nn.Conv2d, axis: int) -> tuple[int, int]:
    """What is put before and after a convolution's input along time (0) or frequency (1)."""
    if hasattr(layer, "_left_padding"):  # NeMo's CausalConv2D, the same along both
        return layer._left_padding, layer._right_padding
    return layer.padding[axis], layer.padding[axis]


class RelativePositions(nn.Module):
    """Sinusoids of the relative distances S-1 … -S, computed in the graph (Transformer-XL, arXiv:1901.02860, B).

    NeMo's table has the distances S-1 … -(S-1); the one more makes the relative shift a slice without padding.
    """

    def __init__(self, dim: int, scale: float | None):
        super().__init__()
        self.scale = scale
        frequencies = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10000.0) / dim))
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B, S, D] → [B, S, D], [2S, 1, D]
        frames = x.size(1)
        distance = torch.arange(frames - 1, -frames - 1, -1, dtype=torch.float32, device=x.device)
        angle = distance[:, None, None] * self.frequencies
        positions = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(2)
        return (x if self.scale is None else x * self.scale), positions


class RelativeAttention(nn.Module):
    """NeMo's RelPositionMultiHeadAttention with an additive mask.

    Inside, time comes before batch: from there a runtime reads a head's rows in place, where it would otherwise write
    queries, keys, values and positions a second time (24 layers, 60 s: 0.15 s). The scale is that of each product,
    which costs nothing, not that of their sum.
    """

    def __init__(self, attention):
        super().__init__()
        self.heads, self.scale = attention.h, 1.0 / attention.s_d_k
        self.query, self.key, self.value, self.out, self.position = (
            Linear.of(getattr(attention, f"linear_{name}")) for name in ("q", "k", "v", "out", "pos")
        )
        self.content_bias, self.position_bias = attention.pos_bias_u, attention.pos_bias_v  # [heads, dk]

    def forward(self, x: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
        """x [B, S, D], positions [2S, 1, D], bias [B, 1, 1 or S, S] → [B, S, D]"""
        x = x.transpose(0, 1)
        query, key, value, position = (
            _Reshape.apply(y, 0, 0, self.heads, -1)  # [S or 2S, B or 1, heads, dk]
            for y in (self.query(x), self.key(x), self.value(x), self.position(positions))
        )
        by_content = self._product(query + self.content_bias, key)
        by_position = _RelativeShift.apply(self._product(query + self.position_bias, position), bias)
        scores = by_content + by_position + bias
        context = torch.matmul(scores.softmax(dim=-1), value.permute(1, 2, 0, 3))  # [B, heads, S, dk]
        return self.out(_Reshape.apply(context.transpose(1, 2), 0, 0, -1))

    def _product(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[S, B, heads, dk], [S', B, heads, dk] → [B, heads, S, S']"""
        return torch.matmul(queries.permute(1, 2, 0, 3), keys.permute(1, 2, 3, 0)) * self.scale


class Convolution(nn.Module):
    """NeMo's ConformerConvolution with its pointwise convolutions as linear layers, batch norm folded in.

    The depthwise convolution is one of two dimensions, the first of size 1: for those ONNX Runtime has a blocked
    layout, and copies into it straight from channels last (0.6 ms a layer at 20 s, 1.1 ms in one dimension).
    """

    def __init__(self, convolution):
        super().__init__()
        if convolution.pointwise_activation != "glu_":
            raise ValueError(f"wanted a GLU in the convolution module, found {convolution.pointwise_activation}")
        self.expand, self.project = Linear.of(convolution.pointwise_conv1), Linear.of(convolution.pointwise_conv2)
        depthwise, self.norm = convolution.depthwise_conv, convolution.batch_norm
        self.padding = (depthwise._left_padding, depthwise._right_padding)
        self.activation = convolution.activation
        if isinstance(self.norm, nn.BatchNorm1d):
            depthwise, self.norm = fuse_conv_bn_eval(depthwise, self.norm), None
        self.width, self.groups, self.bias = depthwise.out_channels, depthwise.groups, depthwise.bias
        self.depthwise = nn.Parameter(depthwise.weight.detach().unsqueeze(2), requires_grad=False)  # [D, 1, 1, kernel]

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # [B, S, D], [B, S, 1] → [B, S, D]
        x = nn.functional.glu(self.expand(x), dim=-1) * keep
        x = x.unsqueeze(1).permute(0, 3, 1, 2)  # [B, D, 1, S]
        left, right = self.padding
        if left == right:  # inside the Conv node, where a runtime pads for nothing
            padding = (0, left)
        else:
            x, padding = nn.functional.pad(x, self.padding), 0
        x = nn.functional.conv2d(x, self.depthwise, self.bias, padding=padding, groups=self.groups)
        if not (self.norm is None or isinstance(self.norm, nn.LayerNorm)):  # one that looks along time
            x = self.norm(x.squeeze(2)).unsqueeze(2)
        x = _Reshape.apply(x.permute(0, 2, 3, 1), 0, -1, self.width)  # [B, S, D]
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x)
        return self.project(self.activation(x))


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
        if Subsampling.computes(encoder.pre_encode):
            self.subsampling = Subsampling(encoder.pre_encode)
        else:
            self.subsampling = _share_parameters(encoder.pre_encode)
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
