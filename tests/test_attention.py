"""Attention in blocks of queries against NeMo's own attention, at the lengths where a block begins or ends."""

import numpy as np
import pytest
import torch

from common.contract import ENCODER, PARITY_TOLERANCE
from common.export import layers
from common.run.ort import OrtGraph

WIDTH, HEADS, BATCH = 16, 2, 2
SIZE = layers.BLOCK_FRAMES
LARGEST = layers.BLOCKS * SIZE  # up to which a further block begins every SIZE frames
FRAMES = (1, 2, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, LARGEST - 1, LARGEST, LARGEST + 1, LARGEST + 7)


@pytest.fixture(scope="module")
def attention():
    """NeMo's module with random weights and biases."""
    from nemo.collections.asr.parts.submodules.multi_head_attention import RelPositionMultiHeadAttention

    torch.manual_seed(0)
    module = RelPositionMultiHeadAttention(HEADS, WIDTH, 0.0, None, None)
    for bias in (module.pos_bias_u, module.pos_bias_v):
        torch.nn.init.normal_(bias)
    return module.eval().requires_grad_(False)


def nemo_positions(frames: int) -> torch.Tensor:
    from nemo.collections.asr.parts.submodules.multi_head_attention import RelPositionalEncoding

    encoding = RelPositionalEncoding(WIDTH, 0.0, max_len=frames, xscale=None)
    encoding.extend_pe(frames, torch.device("cpu"), torch.float32)
    return encoding(torch.zeros(1, frames, WIDTH))[1]


def random_mask(frames: int, *, of_each_row: bool) -> torch.Tensor:
    """True where a query must not attend: [B, S, S], at least one key of each row left."""
    mask = torch.rand(BATCH, frames if of_each_row else 1, frames) < 0.3
    mask[:, :, 0] = False
    return mask.expand(BATCH, frames, frames)


@pytest.mark.parametrize("of_each_row", [False, True], ids=["a mask of keys", "a mask of each row"])
@pytest.mark.parametrize("count", [1, layers.BLOCKS])
@pytest.mark.parametrize("frames", FRAMES)
def test_attention_in_blocks_is_nemos(frames, count, of_each_row, attention):
    torch.manual_seed(frames)
    x, mask = torch.randn(BATCH, frames, WIDTH), random_mask(frames, of_each_row=of_each_row)
    expected = attention(x, x, x, mask, nemo_positions(frames))

    bias = (mask if of_each_row else mask[:, :1])[:, None] * layers.MASKED_SCORE
    blocks = layers.attention_blocks(bias, count, of_each_row=of_each_row)
    _, positions = layers.RelativePositions(WIDTH, None)(x)
    actual = layers.RelativeAttention(attention)(x, positions, blocks)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", FRAMES)
def test_the_graph_is_nemos_encoder_where_blocks_begin(frames, tiny_export, tiny_model):
    subsampling = tiny_model.encoder.subsampling_factor
    features = np.random.default_rng(frames).standard_normal((1, 128, frames * subsampling), dtype=np.float32)
    length = np.array([features.shape[2]])
    actual, lengths = OrtGraph(tiny_export, ENCODER)(features, length)
    assert lengths.tolist() == [frames]
    with torch.inference_mode():
        expected, _ = tiny_model.encoder(audio_signal=torch.from_numpy(features), length=torch.from_numpy(length))
    assert np.abs(actual - expected.numpy()).max() < PARITY_TOLERANCE / 10


def test_few_position_scores_are_computed_and_thrown_away(attention, monkeypatch):
    frames, computed = 8 * SIZE, []

    def counting(x, count, frames, shift=layers.relative_shift):
        computed.append(x[0, 0].numel())
        return shift(x, count, frames)

    monkeypatch.setattr(layers, "relative_shift", counting)
    x = torch.zeros(1, frames, WIDTH)
    _, positions = layers.RelativePositions(WIDTH, None)(x)
    blocks = layers.attention_blocks(torch.zeros(1, 1, 1, frames), layers.BLOCKS, of_each_row=False)
    layers.RelativeAttention(attention)(x, positions, blocks)
    assert frames**2 < sum(computed) <= (1 + 1 / layers.BLOCKS) * frames**2  # in one block it is twice as many


def test_shape_arithmetic_is_shared_by_the_layers(tiny_export):
    import onnx

    nodes = onnx.load(tiny_export / ENCODER.file, load_external_data=False).graph.node
    layers_of_tiny = 5
    assert sum(node.op_type == "Max" for node in nodes) < layers_of_tiny * layers.BLOCKS
    assert sum(node.op_type == "Softmax" for node in nodes) == layers_of_tiny * layers.BLOCKS
