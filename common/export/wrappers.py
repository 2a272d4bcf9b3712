"""The three PyTorch modules that are exported, the encoder, the prediction network with its state and the joint, and
their export to ONNX.

Each shares the parameters of NeMo's module, or of transformers' under NeMo's names, and computes the same function.
A wrapper rejects what it does not support with a ValueError that names it.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from common.contract import DECODER, ENCODER, JOINT, Graph
from common.export.layers import (
    BLOCKS,
    MASKED_SCORE,
    Layer,
    Linear,
    RelativePositions,
    Subsampling,
    attention_blocks,
    share_parameters,
)
from common.onnx_io import save_model

# torch.onnx.export(dynamo=False) of torch 2.13 ends at 20; the newer exporter goes on, but takes four times as long.
EXPORTER_MAX_OPSET = 20


class Wrapper(nn.Module):
    """A module that can be exported, built from NeMo's module. Raises ValueError for one with adapters."""

    example_inputs: Callable[..., tuple[Tensor, ...]]  # sizes, each with a default → inputs of `forward`

    def __init__(self, module: Any) -> None:
        super().__init__()
        if getattr(module, "is_adapter_available", bool)():
            raise ValueError("a checkpoint with adapters is not supported; merge or disable them first")


class Encoder(Wrapper):
    """NeMo's ConformerEncoder for whole utterances. Raises ValueError naming what it does not support."""

    blocks: int = BLOCKS  # of the frames that attend

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        for name, supported in (("self_attention_model", "rel_pos"), ("reduction_position", None)):
            if (actual := getattr(encoder, name)) != supported:
                raise ValueError(f"the encoder has the {name} {actual!r}; only {supported!r} is supported")
        self.num_mels: int = encoder._feat_in
        known = Subsampling.supports(encoder.pre_encode)
        self.subsampling = Subsampling(encoder.pre_encode) if known else share_parameters(encoder.pre_encode)
        self.positions = RelativePositions(encoder.d_model, encoder.xscale)
        self.layers = nn.ModuleList(Layer(layer) for layer in encoder.layers)
        self.projection = Linear.from_module(encoder.out_proj) if encoder.out_proj is not None else nn.Identity()
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
        blocks = attention_blocks(self._attention_bias(keep, length), self.blocks, of_each_row=self._limited_context)
        keep = keep[:, :, None].to(x.dtype)
        for layer in self.layers:
            x = layer(x, positions, blocks, keep)
        return self.projection(x).transpose(1, 2), length

    def _attention_bias(self, keep: Tensor, length: Tensor) -> Tensor:
        """What is added to the scores, [B, 1, 1 or S, S]: 0 for a frame that is attended to, else MASKED_SCORE.

        Only keys are masked: the result of a padded query reaches no valid frame.
        """
        if not self._limited_context:
            return (~keep[:, None, None, :]).to(torch.float32) * MASKED_SCORE
        _, masked = self._context_mask(self._context_size, length, keep.size(1), offset=None, device=keep.device)
        bias: Tensor = masked[:, None].to(torch.float32) * MASKED_SCORE
        return bias

    def example_inputs(self, batch: int = 2, frames: int = 200) -> tuple[Tensor, Tensor]:
        """Noise in a batch of different lengths: features [B, M, T]; lengths [B], the first of them T."""
        lengths = torch.tensor([frames - i * frames // (3 * batch) for i in range(batch)])
        generator = torch.Generator().manual_seed(frames)
        features = torch.randn(batch, self.num_mels, frames, generator=generator)
        return features.masked_fill(torch.arange(frames)[None, None, :] >= lengths[:, None, None], 0.0), lengths


class StatefulDecoder(Wrapper):
    """The prediction network (NeMo's RNNTDecoder) for one or more tokens, with its LSTM state as input and output.

    Raises ValueError for a network that is not a plain LSTM.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder)
        lstm = getattr(decoder.prediction["dec_rnn"], "lstm", None)
        if not isinstance(lstm, nn.LSTM) or lstm.hidden_size != decoder.pred_hidden or lstm.proj_size:
            raise ValueError(
                f"the prediction network is {decoder.prediction['dec_rnn']}; only an LSTM of width "
                f"{decoder.pred_hidden} without normalisation or projection is supported"
            )
        self.state_shape = (lstm.num_layers, lstm.hidden_size)
        self.lstm = share_parameters(lstm)
        self.lstm.batch_first = False
        embedding = decoder.prediction["embed"]
        weight = embedding.weight.detach()
        if not decoder.blank_as_pad:  # give blank, which primes the network, the zero vector that NeMo uses there
            weight = torch.cat((weight, torch.zeros_like(weight[:1])))
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(weight)  # type: ignore[no-untyped-call]
        self.vocab_size = self.embedding.num_embeddings
        self.eval()

    def forward(
        self, targets: Tensor, target_length_orig: Tensor, h_in: Tensor, c_in: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """targets [B, U], lengths [B], h and c [L, B, H] → [B, H, U], lengths [B], h and c [L, B, H]"""
        output, (h_out, c_out) = self.lstm(self.embedding(targets.transpose(0, 1)), (h_in, c_in))  # [U, B, H]
        return output.permute(1, 2, 0), target_length_orig.clone(), h_out, c_out

    def example_inputs(self, batch: int = 2, targets: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random tokens [B, U], their lengths [B], and a state of zeros, h and c [L, B, H]."""
        generator = torch.Generator().manual_seed(targets)
        layers, width = self.state_shape
        tokens = torch.randint(self.vocab_size, (batch, targets), generator=generator)
        state = torch.zeros(layers, batch, width)
        return tokens, torch.full((batch,), targets), state, state.clone()


class TdtJoint(Wrapper):
    """The joint (NeMo's RNNTJoint) with raw logits: tokens with the blank last, then durations.

    NeMo's own forward applies log_softmax on a CPU, over tokens and durations together, which is a probability of
    neither.
    """

    def __init__(self, joint: Any) -> None:
        super().__init__(joint)
        self.encoder = share_parameters(joint.enc)
        self.prediction = share_parameters(joint.pred)
        layers = (layer for layer in joint.joint_net if not isinstance(layer, nn.Dropout))
        self.output = nn.Sequential(*(share_parameters(layer) for layer in layers))
        self.widths: tuple[int, int] = (joint.enc.in_features, joint.pred.in_features)  # D, H
        self.eval()

    def forward(self, encoder_output: Tensor, decoder_output: Tensor) -> Tensor:
        """[B, S, D], [B, U, H] → [B, S, U, V+K]"""
        encoded, predicted = self.encoder(encoder_output), self.prediction(decoder_output)
        logits: Tensor = self.output(encoded[:, :, None] + predicted[:, None])
        return logits

    def example_inputs(self, batch: int = 2, frames: int = 3, targets: int = 2) -> tuple[Tensor, Tensor]:
        """Noise of the size of normalised activations: [B, S, D], [B, U, H]."""
        generator = torch.Generator().manual_seed(frames * 100 + targets)
        encoder_width, decoder_width = self.widths
        return (
            torch.randn(batch, frames, encoder_width, generator=generator),
            torch.randn(batch, targets, decoder_width, generator=generator).tanh(),
        )


# Each module is an attribute of NeMo's model that has the name of the graph.
WRAPPERS: dict[Graph, Callable[[Any], Wrapper]] = {ENCODER: Encoder, DECODER: StatefulDecoder, JOINT: TdtJoint}


def export_graph(module: Wrapper, graph: Graph, folder: Path, opset: int, *, single_file: bool = False) -> None:
    """Write `graph.file` into `folder`; the weights of an encoder into `graph.data_file`, unless `single_file`.

    An encoder is traced with its weights as graph inputs, which have the names of its parameters and buffers and then
    become initializers that are read straight from the module: nothing is copied, and the 2 GB limit of a protobuf is
    not reached. The other modules are small, and their weights need the exporter's constant folding (the gates of an
    LSTM change order).
    """
    is_encoder = graph is ENCODER
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    device = next(module.parameters()).device
    buffer = io.BytesIO()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every shape that NeMo's code compares
        torch.onnx.export(
            module,
            tuple(tensor.to(device) for tensor in module.example_inputs()),
            buffer,  # type: ignore[arg-type]  # a file object is what dynamo=False accepts as well
            input_names=graph.input_names,
            output_names=graph.output_names,
            dynamic_axes=graph.dynamic_axes(),
            opset_version=min(opset, EXPORTER_MAX_OPSET),
            dynamo=False,
            export_params=not is_encoder,
            do_constant_folding=not is_encoder,
        )
    proto = onnx.load_from_string(buffer.getvalue())
    if opset > EXPORTER_MAX_OPSET:
        proto = onnx.version_converter.convert_version(proto, opset)
    model = ir.from_proto(proto)
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = TorchTensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
    for graph_pass in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),  # stack traces with paths of this machine
    ):
        model = graph_pass(model).model
    save_model(model, folder / graph.file, single_file=single_file or not is_encoder)
