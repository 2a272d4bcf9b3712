"""The layers of the exported encoder. Each shares the parameters of NeMo's layer and computes the same function.

NeMo's own layers, traced as they are, give graphs that fail or waste time (nemo_toolkit 3.0.0): positions come from a
table that ends at 5000 frames, MatMul quantizers skip pointwise convolutions, masks are filled twice per layer, and
every reshape adds nodes that compute its shape. Where a computation can be written in two ways, this module uses the
one that ONNX Runtime turns into faster operators (ONNX Runtime 1.32, times on 2 cores).
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# NeMo puts this in the place of a masked score (INF_VAL in parts/submodules/multi_head_attention.py).
MASKED_SCORE = -10000.0
# Subtracted from a masked frame before a ReLU, between one and three times. It is larger than any result of a
# convolution of normalised features, and still fits into float16 (largest 65504).
MASKED_ACTIVATION = 20000.0


def share_parameters(module: Any) -> Any:
    """A copy whose submodules can be replaced without changing the original; its tensors are the original's own."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})


class _Reshape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *shape: int) -> Tensor:
        return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])

    @staticmethod
    def symbolic(g: Any, x: Any, *shape: int) -> Any:
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape)))


def reshape(x: Tensor, *shape: int) -> Tensor:
    """Reshape by the ONNX rule, where 0 keeps a dimension: one node in the graph, and no shape arithmetic."""
    return cast(Tensor, _Reshape.apply(x, *shape))  # type: ignore[no-untyped-call]


def _constant(g: Any, *values: int) -> Any:
    return g.op("Constant", value_t=torch.tensor(values))


# Attention is computed in blocks of the frames that attend (queries): at most BLOCKS blocks, of at least BLOCK_FRAMES
# frames each. At 900 frames, the window of 72 s, four blocks take 0.8 times as long as one block; at 250 frames they
# take as long, at 125 a tenth longer. Six blocks are hardly faster.
BLOCKS = 4
BLOCK_FRAMES = 64


class _BlockBounds(torch.autograd.Function):
    """The first frame of each of `count` blocks, then the frame after the last frame of each."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, count: int) -> Tensor:
        frames = like.size(-1)
        size = max(-(-frames // count), BLOCK_FRAMES)
        firsts = [min(block * size, frames - 1) for block in range(count)]
        return torch.tensor([*firsts, *(min(block * size, frames) for block in range(1, count + 1))])

    @staticmethod
    def symbolic(g: Any, like: Any, count: int) -> Any:
        frames = g.op("Gather", g.op("Shape", like), _constant(g, -1), axis_i=0)
        size = g.op("Div", g.op("Add", frames, _constant(g, count - 1)), _constant(g, count))
        size = g.op("Max", size, _constant(g, BLOCK_FRAMES))
        firsts = g.op("Min", g.op("Mul", size, _constant(g, *range(count))), g.op("Sub", frames, _constant(g, 1)))
        stops = g.op("Min", g.op("Mul", size, _constant(g, *range(1, count + 1))), frames)
        return g.op("Concat", firsts, stops, axis_i=0)


class Block(NamedTuple):
    """The frames first … stop-1 of S, which attend to all S frames. The first three fields are scalars.

    A block has at least one frame: where S is too short for all blocks, the last ones repeat the last frame. In a
    product without rows ONNX Runtime 1.28 divides by zero, which ends the process.
    """

    first: Tensor
    stop: Tensor
    frames: Tensor  # S
    bias: Tensor  # what is added to the scores: [B, 1, 1 or stop-first, S]


def attention_blocks(bias: Tensor, count: int, *, of_each_row: bool) -> list[Block]:
    """`count` blocks of an encoder's frames. bias: of the scores, [B, 1, 1, S], or [B, 1, S, S] with `of_each_row`."""
    bounds = cast(Tensor, _BlockBounds.apply(bias, count))  # type: ignore[no-untyped-call]
    blocks = []
    for index in range(count):
        first, stop = bounds[index], bounds[count + index]
        blocks.append(Block(first, stop, bounds[-1], bias[:, :, first:stop] if of_each_row else bias))
    return blocks


class _RelativeShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: Tensor, frames: Tensor) -> Tensor:
        rows, columns = int(count), int(frames)
        skipped = rows - 1
        width = columns + skipped
        flat = x.flatten(2)[:, :, skipped : skipped + rows * width]
        return flat.reshape(*flat.shape[:2], rows, width)[..., :columns]

    @staticmethod
    def symbolic(g: Any, x: Any, count: Any, frames: Any) -> Any:
        # Every layer adds the same nodes for the shape; export_graph merges the copies.
        rows, columns = (g.op("Reshape", scalar, _constant(g, 1)) for scalar in (count, frames))
        skipped = g.op("Sub", rows, _constant(g, 1))
        width = g.op("Add", columns, skipped)
        stop = g.op("Add", skipped, g.op("Mul", rows, width))
        flat = g.op("Slice", g.op("Reshape", x, _constant(g, 0, 0, -1)), skipped, stop, _constant(g, 2))
        shifted = g.op("Reshape", flat, g.op("Concat", _constant(g, 0, 0), rows, width, axis_i=0))
        return g.op("Slice", shifted, _constant(g, 0), columns, _constant(g, 3))


def relative_shift(x: Tensor, count: Tensor, frames: Tensor) -> Tensor:
    """Column j of row i becomes what is in column n-1-i+j: [B, heads, n, S+n] → [B, heads, n, S], n = `count` rows.

    In the flattened array, what a row needs begins S+n-1 places after what the row before needs. So: flatten, drop the
    first n-1 values, cut into rows of S+n-1, keep S columns.
    """
    return cast(Tensor, _RelativeShift.apply(x, count, frames))  # type: ignore[no-untyped-call]


class Linear(nn.Module):
    """y = x W + b with W stored as [in, out], the layout of ONNX MatMul; it is a view of NeMo's [out, in] weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.t(), requires_grad=False)
        self.bias = bias

    @classmethod
    def from_module(cls, module: Any) -> "Linear":
        """From an nn.Linear, or from an nn.Conv1d of kernel size 1, which computes the same."""
        return cls(module.weight.detach().flatten(1), module.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class Subsampling(nn.Module):
    """NeMo's ConvSubsampling as 2-d convolutions, masked only where a masked frame would reach a valid one.

    That is before a kernel longer than one frame; NeMo masks before and after each of its layers. After the first
    convolution, where activations are largest (65 MB for 20 s), the mask comes from an extra input channel of that
    convolution. It is 1 where a frame is masked, and its weight is so negative that ReLU gives 0 whatever the other
    channels hold; valid frames do not change. For 20 s of audio this takes 48 ms. With the mask as a product, which
    also leaves ONNX Runtime's blocked layout, it takes 74 ms.
    """

    def __init__(self, subsampling: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(share_parameters(subsampling.conv))
        for i, layer in enumerate(self.layers):
            if hasattr(layer, "inplace"):  # a flag that, like shared layers, changes names and order of exported nodes
                self.layers[i] = type(layer)()
        self.out = Linear.from_module(subsampling.out)
        first = cast(nn.Conv2d, self.layers[0])
        self.first_masks = first.in_channels == 1 and isinstance(self.layers[1], nn.ReLU)
        if self.first_masks:
            mask = torch.zeros_like(first.weight)
            # Frame t of the output is valid if and only if the last tap that is not on the right padding is on a valid
            # frame. The mask is set at every tap along frequency, since any one of them may lie on the padding there.
            _, right = _padding(first, 0)
            mask[:, :, first.kernel_size[0] - 1 - right] = -MASKED_ACTIVATION
            weight = torch.cat((first.weight.detach(), mask), dim=1)
            first.weight = nn.Parameter(weight, requires_grad=False)  # [channels, 2, kernel, kernel]

    @staticmethod
    def supports(subsampling: Any) -> bool:
        """Whether `subsampling` consists of layers that this class can compute."""
        layers = list(getattr(subsampling, "conv", ()))
        known = (nn.Conv2d, nn.ReLU, nn.SiLU, nn.GELU)
        return isinstance(getattr(subsampling, "out", None), nn.Linear) and all(isinstance(x, known) for x in layers)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, M], lengths [B] → [B, S, D], [B]"""
        x = x.unsqueeze(1)  # [B, 1, T, M]
        masked = False
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, nn.Conv2d):
                x = layer(x)
                continue
            if layer.kernel_size[0] > 1 and not masked:
                frames = torch.arange(x.size(2), device=x.device)
                keep = (frames[None, None, :, None] < lengths[:, None, None, None]).to(x.dtype)  # [B, 1, T, 1]
                x = x * keep
            masked = i == 0 and self.first_masks
            if masked:
                x = torch.cat((x, (1 - keep).expand_as(x)), dim=1)
            padding = cast(tuple[int, int], layer.padding)
            above, below = _padding(layer, 0)
            left, right = _padding(layer, 1)
            if (above, left) != tuple(padding):  # NeMo's CausalConv2D pads by itself
                x = nn.functional.pad(x, (left, right, above, below))
            x = nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
            if layer.stride[0] > 1:
                # (length + padding - kernel) // stride + 1, written so that the quotient is never negative: ONNX's Div
                # rounds towards zero
                rest = above + below - layer.kernel_size[0] + layer.stride[0]
                lengths = (lengths + rest) // layer.stride[0]
        return self.out(x.transpose(1, 2).flatten(2)), lengths


def _padding(layer: Any, axis: int) -> tuple[int, int]:
    """The padding before and after the input of a convolution, along time (axis 0) or frequency (axis 1)."""
    if hasattr(layer, "_left_padding"):  # NeMo's CausalConv1D and CausalConv2D, the same along both
        return layer._left_padding, layer._right_padding
    return layer.padding[axis], layer.padding[axis]


class Positions(NamedTuple):
    """Sines and cosines of the distances S … 0 between frames."""

    sine: Tensor  # [S+1, 1, D/2]
    cosine: Tensor  # [S+1, 1, D/2]
    backwards: Tensor  # S-1 … 0, the places of the distances 1 … S: [S]


class RelativePositions(nn.Module):
    """Sines and cosines of the distances S … 0, computed in the graph (Transformer-XL, arXiv:1901.02860, B).

    NeMo's table has the distances S-1 … -(S-1), with sines and cosines alternating. Here the values of negative
    distances follow from the values of positive ones. The distance -S, which NeMo's table lacks, makes the relative
    shift a slice without padding.
    """

    frequencies: Tensor

    def __init__(self, dim: int, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        frequencies = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10000.0) / dim))
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor) -> tuple[Tensor, Positions]:
        """x [B, S, D] → x, scaled where the model does that, [B, S, D]; the positions of its frames"""
        distance = torch.arange(x.size(1), -1, -1, dtype=torch.float32, device=x.device)
        angle = distance[:, None, None] * self.frequencies
        # Not a descending range: ONNX Runtime 1.32 turns a Gather by one into a Slice that ends at the last place.
        backwards = x.size(1) - 1 - torch.arange(x.size(1), device=x.device)
        return (x if self.scale is None else x * self.scale), Positions(angle.sin(), angle.cos(), backwards)


class RelativeAttention(nn.Module):
    """NeMo's RelPositionMultiHeadAttention with an additive mask.

    Inside, time comes before batch, so a runtime reads a head's rows in place; otherwise it would write queries, keys,
    values and positions a second time (24 layers, 60 s: 0.15 s). The two products are scaled instead of their sum,
    since a runtime fuses a scale into a product.

    Attention is computed in blocks of queries. A query needs S of the 2S distances, those from its own frame to all
    others, and n consecutive queries need S+n-1 of them. So with blocks nearly half of the products with positions need
    not be computed, and the scores of a block fit into the cache between one operator and the next.

    Positions are projected for distances of one sign only. Sines are odd and cosines even, so the projection of
    distance d is the sum of their projections, and of -d it is the difference. This halves the products (0.6B, 900
    frames, one thread with AVX2: 24 ms a layer instead of 50).
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads: int = attention.h
        self.scale: float = 1.0 / attention.s_d_k
        self.query = Linear.from_module(attention.linear_q)
        self.key = Linear.from_module(attention.linear_k)
        self.value = Linear.from_module(attention.linear_v)
        self.out = Linear.from_module(attention.linear_out)
        position = attention.linear_pos  # its inputs alternate between sines and cosines
        self.position_sine = Linear(position.weight.detach()[:, 0::2], None)
        self.position_cosine = Linear(position.weight.detach()[:, 1::2], position.bias)
        self.content_bias: Tensor = attention.pos_bias_u  # [heads, dk]
        self.position_bias: Tensor = attention.pos_bias_v  # [heads, dk]

    def forward(self, x: Tensor, positions: Positions, blocks: Sequence[Block]) -> Tensor:
        """x [B, S, D], its positions, blocks of the S frames → [B, S, D]"""
        x = x.transpose(0, 1)
        query, key, value, position = (
            reshape(y, 0, 0, self.heads, -1)  # [S or 2S, B or 1, heads, dk]
            for y in (self.query(x), self.key(x), self.value(x), self._project(positions))
        )
        value = value.permute(1, 2, 0, 3)
        contexts = [torch.matmul(self._weights(query, key, position, block), value) for block in blocks]
        context = contexts[0]  # [B, heads, S, dk]
        if len(blocks) > 1:
            context = torch.cat(contexts, dim=2)[:, :, : blocks[0].frames]  # without repeats of the last frame
        out: Tensor = self.out(reshape(context.transpose(1, 2), 0, 0, -1))
        return out

    def _project(self, positions: Positions) -> Tensor:
        """The projections of the distances S-1 … -S, [2S, 1, D].

        They are reversed by a gather, not by a flip, which exports as a Slice with negative steps: WebGPU's Slice then
        drops the first row (ONNX Runtime Web 1.24.1).
        """
        odd, even = self.position_sine(positions.sine), self.position_cosine(positions.cosine)
        return torch.cat(((even + odd)[1:], (even - odd).index_select(0, positions.backwards)))

    def _weights(self, query: Tensor, key: Tensor, position: Tensor, block: Block) -> Tensor:
        """How much each of the block's n frames attends to each frame: [B, heads, n, S]"""
        query = query[block.first : block.stop]
        # Row 0 holds distance S-1. The distances from the block's last frame begin at stop-1, and those from its first
        # frame end at first+1-S. One more row makes the relative shift a slice without padding.
        position = position[block.frames - block.stop : 2 * block.frames - block.first]
        by_content = self._product(query + self.content_bias, key)
        by_position = self._product(query + self.position_bias, position)
        by_position = relative_shift(by_position, block.stop - block.first, block.frames)
        return (by_content + by_position + block.bias).softmax(dim=-1)

    def _product(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[S, B, heads, dk], [S', B, heads, dk] → [B, heads, S, S']"""
        product: Tensor = torch.matmul(queries.permute(1, 2, 0, 3), keys.permute(1, 2, 3, 0)) * self.scale
        return product


class Convolution(nn.Module):
    """NeMo's ConformerConvolution with its pointwise convolutions as linear layers and batch normalisation folded in.

    The depthwise convolution has two dimensions, the first of size 1. For two dimensions ONNX Runtime has a blocked
    layout, into which it copies directly from channels last (0.6 ms a layer at 20 s; with one dimension 1.1 ms).
    """

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        activation = convolution.pointwise_activation
        if activation != "glu_":
            raise ValueError(f"the convolution module has the activation {activation}; only a GLU is supported")
        self.expand = Linear.from_module(convolution.pointwise_conv1)
        self.project = Linear.from_module(convolution.pointwise_conv2)
        depthwise = convolution.depthwise_conv
        self.norm = convolution.batch_norm
        self.padding = _padding(depthwise, 0)
        self.activation = convolution.activation
        if isinstance(self.norm, nn.BatchNorm1d):
            depthwise = fuse_conv_bn_eval(depthwise, self.norm)
            self.norm = None
        self.width: int = depthwise.out_channels
        self.groups: int = depthwise.groups
        self.bias: Tensor | None = depthwise.bias
        self.depthwise = nn.Parameter(depthwise.weight.detach().unsqueeze(2), requires_grad=False)  # [D, 1, 1, kernel]

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x [B, S, D], keep [B, S, 1], 1 for a valid frame and 0 for a masked one → [B, S, D]"""
        # Not dim -1: WebGPU's Split does not accept a negative axis (ONNX Runtime Web 1.24.1).
        x = nn.functional.glu(self.expand(x), dim=2) * keep
        x = x.unsqueeze(1).permute(0, 3, 1, 2)  # [B, D, 1, S]
        left, right = self.padding
        inner = 0
        if left == right:  # inside the Conv node, where a runtime pads without a copy
            inner = left
        else:
            x = nn.functional.pad(x, self.padding)
        x = nn.functional.conv2d(x, self.depthwise, self.bias, padding=(0, inner), groups=self.groups)
        if not (self.norm is None or isinstance(self.norm, nn.LayerNorm)):  # a normalisation along time
            x = self.norm(x.squeeze(2)).unsqueeze(2)
        x = reshape(x.permute(0, 2, 3, 1), 0, -1, self.width)  # [B, S, D]
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x)
        out: Tensor = self.project(self.activation(x))
        return out


class FeedForward(nn.Module):
    """NeMo's ConformerFeedForward."""

    def __init__(self, feed_forward: Any) -> None:
        super().__init__()
        self.expand = Linear.from_module(feed_forward.linear1)
        self.project = Linear.from_module(feed_forward.linear2)
        self.activation = feed_forward.activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.activation(self.expand(x)))
        return out


class Layer(nn.Module):
    """One Conformer block (arXiv:2005.08100): half a feed-forward, attention, convolution, half a feed-forward."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm_feed_forward1 = layer.norm_feed_forward1
        self.feed_forward1 = FeedForward(layer.feed_forward1)
        self.norm_attention = layer.norm_self_att
        self.attention = RelativeAttention(layer.self_attn)
        self.norm_convolution = layer.norm_conv
        self.convolution = Convolution(layer.conv)
        self.norm_feed_forward2 = layer.norm_feed_forward2
        self.feed_forward2 = FeedForward(layer.feed_forward2)
        self.norm_out = layer.norm_out
        self.fc_factor: float = layer.fc_factor

    def forward(self, x: Tensor, positions: Positions, blocks: Sequence[Block], keep: Tensor) -> Tensor:
        """x [B, S, D], sines and cosines [S+1, 1, D/2], blocks of the S frames, keep [B, S, 1] → [B, S, D]"""
        x = x + self.feed_forward1(self.norm_feed_forward1(x)) * self.fc_factor
        x = x + self.attention(self.norm_attention(x), positions, blocks)
        x = x + self.convolution(self.norm_convolution(x), keep)
        x = x + self.feed_forward2(self.norm_feed_forward2(x)) * self.fc_factor
        out: Tensor = self.norm_out(x)
        return out
