"""Properties that hold whatever the numbers: decoding, tokenizer and graph fusion on random topologies."""

import contextlib
import json

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from common.checkpoint.nemo import parse_config
from common.checkpoint.tokenizer import Piece, parse_model, tokenizer_json, vocab_text
from common.contract import DECODER, ENCODER, JOINT
from common.export import wrappers
from common.onnx_io import save_model
from common.quantize.fidelity import MIN_FLOAT_SQNR_DB, compare
from common.quantize.rewrite import fuse
from common.run.decode import BlankZero, Prediction, greedy_tdt_decode
from common.run.ort import OrtGraph
from tests.helpers import handmade, windows_of

QUICK = settings(deadline=None, max_examples=200)
# An example exports graphs or runs NeMo, which takes a tenth of a second to two seconds.
SLOW = settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.too_slow])

genai_durations = st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True).map(lambda rest: (0, *rest))
any_durations = st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True).filter(any).map(tuple)


def table_decode(seed: int, ends: list[list[int]], vocabulary: int, durations, max_symbols, rule, bias=0.0):
    """Decode random logits that depend on the frame and on the last token, and are the same for every utterance."""
    frames = max(end[-1] for end in ends)
    table = np.random.default_rng(seed).standard_normal((frames, vocabulary + 1, vocabulary + 1 + len(durations)))
    table[:, :, vocabulary] += bias  # of the blank
    return greedy_tdt_decode(
        windows_of([np.arange(end[-1])[:, None] for end in ends], ends),
        lambda tokens, states: [Prediction(np.array(token), None) for token in tokens],
        lambda rows, outputs: table[rows[:, 0], np.array(outputs)],
        blank_id=vocabulary, durations=durations, max_symbols=max_symbols, rule=rule,
    )  # fmt: skip


@QUICK
@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(0, 40),
    vocabulary=st.integers(1, 12),
    durations=genai_durations,
    max_symbols=st.integers(1, 12),
    bias=st.floats(-5, 5),
)
def test_decoding_ends_and_advances_and_stays_within_its_frames(seed, frames, vocabulary, durations, max_symbols, bias):
    hypotheses = {}
    for rule in (BlankZero.NEMO, BlankZero.GENAI):
        (hypothesis,) = table_decode(seed, [[frames]], vocabulary, durations, max_symbols, rule, bias)
        steps = hypothesis.steps
        assert len(steps) <= frames * (max_symbols + 1)
        assert all(0 <= step.frame < frames for step in steps)
        assert all(0 <= step.token <= vocabulary and step.duration in (*durations, 1) for step in steps)
        assert [step.frame for step in steps] == sorted(step.frame for step in steps)
        for frame in {step.frame for step in steps}:
            assert sum(step.frame == frame and step.token != vocabulary for step in steps) <= max_symbols
        hypotheses[rule] = hypothesis
    if not any(step.blank_zero for step in hypotheses[BlankZero.NEMO].steps):  # else the rules differ by design
        assert hypotheses[BlankZero.NEMO].steps == hypotheses[BlankZero.GENAI].steps


@QUICK
@given(seed=st.integers(0, 2**32 - 1), durations=any_durations, frames=st.integers(1, 30), cut=st.integers(0, 30))
def test_a_seam_where_a_step_begins_changes_nothing(seed, durations, frames, cut):
    (whole,) = table_decode(seed, [[frames]], 5, durations, 4, BlankZero.NEMO)
    begun = sorted({step.frame for step in whole.steps})
    seam = begun[min(cut, len(begun) - 1)]
    assert table_decode(seed, [[seam, frames]], 5, durations, 4, BlankZero.NEMO) == [whole]


@QUICK
@given(
    seed=st.integers(0, 2**32 - 1),
    durations=any_durations,
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
)
def test_utterances_are_decoded_together_as_alone(seed, durations, lengths):
    ends = [[length // 2, length] for length in lengths]
    longest = [[max(lengths)]]  # for one table
    together = table_decode(seed, ends + longest, 5, durations, 4, BlankZero.NEMO)
    alone = [table_decode(seed, [end, *longest], 5, durations, 4, BlankZero.NEMO)[0] for end in ends]
    assert together[:-1] == alone


def test_nan_logits_raise_an_error():
    with pytest.raises(ValueError, match="NaN"):
        greedy_tdt_decode(
            [np.zeros((1, 5, 1))], lambda *_: [Prediction(np.zeros(1), None)], lambda *_: np.full((1, 6), np.nan),
            blank_id=3, durations=(0, 1), max_symbols=None,
        )  # fmt: skip


@SLOW
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(1, 40),
    width=st.integers(2, 24),
    layers=st.integers(1, 3),
    durations=any_durations.filter(lambda durations: 0 in durations),
    max_symbols=st.integers(1, 10),
)
def test_onnx_runtime_the_torch_wrappers_and_nemo_decode_the_same(
    seed, vocabulary, width, layers, durations, max_symbols, tmp_path_factory
):
    """Random prediction and joint networks: the graphs in ONNX Runtime, the wrappers in torch, NeMo's own greedy."""
    import torch
    from nemo.collections.asr.modules import RNNTDecoder, RNNTJoint
    from nemo.collections.asr.parts.submodules.rnnt_greedy_decoding import GreedyBatchedTDTInfer

    torch.manual_seed(seed)
    prednet = {"pred_hidden": width, "pred_rnn_layers": layers}
    jointnet = {"joint_hidden": width, "activation": "relu", "encoder_hidden": width + 1, "pred_hidden": width}
    decoder = RNNTDecoder(prednet=prednet, vocab_size=vocabulary).eval().requires_grad_(False)
    joint = RNNTJoint(jointnet=jointnet, num_classes=vocabulary, num_extra_outputs=len(durations), log_softmax=False)
    joint = joint.eval().requires_grad_(False)
    joint.joint_net[-1].weight.mul_(5)
    encoded = torch.randn(1, width + 1, 20)
    infer = GreedyBatchedTDTInfer(
        decoder, joint, blank_index=vocabulary, durations=list(durations), max_symbols_per_step=max_symbols
    )
    with torch.inference_mode():
        expected = infer(encoder_output=encoded, encoded_lengths=torch.tensor([20]))[0][0]

    folder = tmp_path_factory.mktemp("random")
    modules = {DECODER: wrappers.StatefulDecoder(decoder), JOINT: wrappers.TdtJoint(joint)}
    for graph, module in modules.items():
        wrappers.export_graph(module, graph, folder, 17)

    def torch_runner(module):
        def run(*arrays):
            with torch.inference_mode():
                outputs = module(*map(torch.from_numpy, arrays))
            return [out.numpy() for out in (outputs if isinstance(outputs, tuple) else (outputs,))]

        return run

    for predictor, joiner in (
        (OrtGraph(folder, DECODER), OrtGraph(folder, JOINT)),
        (torch_runner(modules[DECODER]), torch_runner(modules[JOINT])),
    ):

        def predict(tokens, states, predictor=predictor):
            state = states[0] or (np.zeros((layers, 1, width), np.float32),) * 2
            output, _, *state = predictor(np.array([tokens]), np.ones(1, np.int64), *state)
            return [Prediction(output.transpose(0, 2, 1), tuple(state))]

        def join(frames, outputs, joiner=joiner):
            return joiner(frames[None], np.ascontiguousarray(outputs[0]))[0].reshape(1, -1)

        (actual,) = greedy_tdt_decode(
            [encoded.transpose(1, 2).numpy()], predict, join,
            blank_id=vocabulary, durations=durations, max_symbols=max_symbols,
        )  # fmt: skip
        near_tie = next((n for n, step in enumerate(actual.steps) if step.margin < 1e-4), len(actual.steps))
        sure = [step for step in actual.steps[:near_tie] if step.token != vocabulary]
        assert [step.token for step in sure] == expected.y_sequence.tolist()[: len(sure)]
        assert [step.frame for step in sure] == [int(frame) for frame in expected.timestamp][: len(sure)]
        if near_tie == len(actual.steps):
            assert len(sure) == len(expected.y_sequence)


# Letters of one to four bytes, the mark of a space, digits and upper case, which ORT Extensions could take for bytes.
pieces = st.text(alphabet="abzAF019▁.'éж語😀", min_size=1, max_size=8)


@settings(QUICK, max_examples=60)
@given(
    names=st.lists(pieces, min_size=1, max_size=30, unique=True),
    kind=st.sampled_from([Piece.NORMAL, Piece.USER_DEFINED]),
    draw=st.data(),
)
def test_any_vocabulary_is_read_the_same_by_sentencepiece_and_hugging_face(names, kind, draw):
    model = handmade(*((name, -float(index), kind) for index, name in enumerate(names)))
    proto = parse_model(model)
    try:
        content = tokenizer_json(proto)
    except ValueError as error:  # pieces that ONNX Runtime GenAI would misread
        reject() if "would misread" in str(error) else pytest.fail(str(error))
    assert len(content["model"]["vocab"]) == len(proto.pieces) + 1
    processor, exported = SentencePieceProcessor(model_proto=model), Tokenizer.from_str(json.dumps(content))
    ids = draw.draw(st.lists(st.integers(1, len(proto.pieces) - 1), max_size=20))
    assert exported.decode([0, *ids, len(proto.pieces)]) == processor.decode(ids)  # around them `<unk>` and the blank
    assert vocab_text(proto).count("\n") == len(proto.pieces) + 1


@settings(QUICK, max_examples=300)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_tokenizer_is_read_or_rejected(flips):
    content = bytearray(handmade(*((f"▁{letter}", -1.0, Piece.NORMAL) for letter in "abcdefgh")))
    for place, value in flips:
        content[place % len(content)] = value
    with contextlib.suppress(ValueError):
        tokenizer_json(parse_model(bytes(content)))


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(QUICK, max_examples=100)
@given(content=yaml_values | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")) | st.binary())
def test_any_config_is_read_or_rejected(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    with contextlib.suppress(ValueError):
        assert isinstance(parse_config(text, set()), dict)


@pytest.mark.slow
@SLOW
@given(
    seed=st.integers(0, 2**31),
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([16, 32, 48]),
    layers=st.integers(1, 3),
    mels=st.sampled_from([16, 64, 80]),
    bias=st.booleans(),
    scaling=st.booleans(),
    kernel=st.sampled_from([5, 9, 15]),
    norm=st.sampled_from(["batch_norm", "layer_norm"]),
)
def test_fusion_keeps_the_output_of_the_encoder(
    seed, heads, width, layers, mels, bias, scaling, kernel, norm, tmp_path_factory
):
    """NeMo's encoder, the exported graph and the fused graph on a ragged batch of noise."""
    import torch
    from nemo.collections.asr.modules import ConformerEncoder

    torch.manual_seed(seed)
    encoder = ConformerEncoder(
        feat_in=mels, n_layers=layers, d_model=width, n_heads=heads, subsampling="dw_striding", subsampling_factor=8,
        subsampling_conv_channels=8, use_bias=bias, xscaling=scaling, conv_kernel_size=kernel, conv_norm_type=norm,
        self_attention_model="rel_pos", dropout=0.0,
    ).eval().requires_grad_(False)  # fmt: skip
    folder = tmp_path_factory.mktemp("random")
    wrappers.export_graph(wrappers.Encoder(encoder), ENCODER, folder, 17)
    fused, counts = fuse(folder / ENCODER.file)
    assert counts["SkipLayerNormalization"] > 0
    (folder / "fused").mkdir()
    save_model(fused, folder / "fused" / ENCODER.file)
    onnx.checker.check_model(folder / ENCODER.file)
    assert compare(folder, folder / "fused", MIN_FLOAT_SQNR_DB) >= MIN_FLOAT_SQNR_DB
    features, lengths = np.random.default_rng(seed).standard_normal((2, mels, 90), np.float32), np.array([90, 57])
    actual, actual_lengths = OrtGraph(folder, ENCODER)(features, lengths)
    with torch.inference_mode():
        expected, expected_lengths = encoder(audio_signal=torch.from_numpy(features), length=torch.from_numpy(lengths))
    assert actual_lengths.tolist() == expected_lengths.tolist()
    for row, length in enumerate(actual_lengths):
        np.testing.assert_allclose(actual[row, :, :length], expected[row, :, :length], atol=1e-3)
