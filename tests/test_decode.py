"""The greedy loop: its two rules case by case, and against NeMo's own decoding."""

import numpy as np
import pytest

from common.run.decode import BlankZero, Prediction, greedy_tdt_decode
from tests.helpers import windows_of

A, B, BLANK = 0, 1, 2
DURATIONS = (0, 1, 2)


def logits(token: int, *durations: float) -> np.ndarray:
    """Token logits in which `token` leads by 5, then duration logits."""
    return np.concatenate([np.eye(3)[token] * 5, durations]).astype(np.float32)


def scripted_batch(scripts, rule=BlankZero.NEMO, max_symbols=3, durations=DURATIONS, ends=None):
    """Decode scripts together: the n-th visit to frame f of script s gives scripts[s][f][n]; the last one repeats.

    The state of the prediction network is all tokens that it was fed; `join` checks that it gets that of its script.
    """
    visits = [[0] * len(frames) for frames in scripts]
    emitted = [(BLANK,) for _ in scripts]

    def predict(tokens, states):
        fed = [(*(state or ()), token) for token, state in zip(tokens, states, strict=True)]
        return [Prediction(state, state) for state in fed]

    def join(frames, outputs):
        rows = []
        for (script, frame), output in zip(frames.astype(int), outputs, strict=True):
            assert output == emitted[script]
            entries = scripts[script][frame]
            rows.append(entries[min(visits[script][frame], len(entries) - 1)])
            visits[script][frame] += 1
            if (token := int(rows[-1][:3].argmax())) != BLANK:
                emitted[script] += (token,)
        return np.stack(rows)

    encoded = [np.array([(script, frame) for frame in range(len(frames))]) for script, frames in enumerate(scripts)]
    return greedy_tdt_decode(
        windows_of(encoded, ends or [[len(frames)] for frames in scripts]), predict, join,
        blank_id=BLANK, durations=durations, max_symbols=max_symbols, rule=rule,
    )  # fmt: skip


def scripted(frames: list[list[np.ndarray]], rule, max_symbols=3, durations=DURATIONS, **options):
    """Decode one script."""
    return scripted_batch([frames], rule, max_symbols, durations, **options)[0]


def decisions(hypothesis):
    return [(step.frame, step.token, step.duration) for step in hypothesis.steps]


BLANK_1 = logits(BLANK, 0, 1, 0)
# name, frames, max_symbols, decisions by NeMo's rule, by GenAI's
CASES = [
    ("blank skips by its duration", [[logits(BLANK, 0, 0, 1)], [BLANK_1], [BLANK_1]], 3,
     [(0, BLANK, 2), (2, BLANK, 1)], None),
    ("token skips by its duration", [[logits(A, 0, 0, 1)], [BLANK_1], [logits(B, 0, 1, 0)]], 3,
     [(0, A, 2), (2, B, 1)], None),
    ("token of duration 0 stays", [[logits(A, 1, 0, 0), logits(B, 0, 1, 0)]], 3,
     [(0, A, 0), (0, B, 1)], None),
    ("blank of duration 0: one frame, or the next best", [[logits(BLANK, 3, 1, 2)], [BLANK_1], [BLANK_1]], 3,
     [(0, BLANK, 1), (1, BLANK, 1), (2, BLANK, 1)], [(0, BLANK, 2), (2, BLANK, 1)]),
    ("a step is forced after max_symbols tokens", [[logits(A, 1, 0, 0)], [BLANK_1]], 2,
     [(0, A, 0), (0, A, 0), (1, BLANK, 1)], None),
    ("the count starts anew on each frame",
     [[logits(A, 1, 0, 0), logits(A, 0, 1, 0)], [logits(B, 1, 0, 0), BLANK_1]], 2,
     [(0, A, 0), (0, A, 1), (1, B, 0), (1, BLANK, 1)], None),
    ("a duration past the end ends", [[logits(A, 0, 0, 1)]], 3, [(0, A, 2)], None),
    ("equal logits: the first", [[np.zeros(6, np.float32), logits(BLANK, 0, 1, 0)]], 3,
     [(0, A, 0), (0, BLANK, 1)], None),
]  # fmt: skip


@pytest.mark.parametrize(("frames", "max_symbols", "nemo", "genai"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_both_rules_case_by_case(frames, max_symbols, nemo, genai):
    assert decisions(scripted(frames, BlankZero.NEMO, max_symbols)) == nemo
    assert decisions(scripted(frames, BlankZero.GENAI, max_symbols)) == (genai or nemo)


def test_state_advances_on_tokens_only():
    """`join` in `scripted` compares the state that it is given with the tokens so far."""
    assert scripted(
        [[BLANK_1], [logits(A, 0, 1, 0)], [BLANK_1], [logits(B, 0, 1, 0)], [BLANK_1]], BlankZero.NEMO
    ).tokens == [
        A,
        B,
    ]


@pytest.mark.parametrize("rule", [BlankZero.NEMO, BlankZero.GENAI])
@pytest.mark.parametrize("max_symbols", [2, 3, None])
def test_utterances_are_decoded_together_as_alone(rule, max_symbols):
    """Utterances of different lengths, each at its own frame, get the decisions that each gets when decoded alone."""
    scripts = [case[1] for case in CASES if max_symbols or case[2] == 3]
    together = scripted_batch(scripts, rule, max_symbols)
    assert [decisions(one) for one in together] == [decisions(scripted(one, rule, max_symbols)) for one in scripts]
    assert len({len(one.steps) for one in together}) > 1


def test_the_margin_is_the_smaller_lead():
    step = scripted([[logits(A, 0.25, 1, 0.5)]], BlankZero.NEMO).steps[0]
    assert step.margin == pytest.approx(0.5)
    assert not step.blank_zero
    assert scripted([[logits(BLANK, 3, 1, 2)]], BlankZero.NEMO).steps[0].blank_zero


def test_a_duration_is_dropped_at_the_end_of_a_window():
    script = [[BLANK_1], [logits(A, 0, 0, 1)], [logits(B, 0, 1, 0)], [BLANK_1]]
    assert decisions(scripted(script, BlankZero.NEMO)) == [(0, BLANK, 1), (1, A, 2), (3, BLANK, 1)]
    assert decisions(scripted(script, BlankZero.NEMO, ends=[[2, 4]])) == [
        (0, BLANK, 1), (1, A, 2), (2, B, 1), (3, BLANK, 1),
    ]  # fmt: skip
    assert decisions(scripted(script, BlankZero.NEMO, ends=[[3, 3, 4]])) == decisions(scripted(script, BlankZero.NEMO))


def test_durations_are_not_their_indices():
    """With durations [1, 0, 2], index 0 is one frame. NeMo's rule, which looks at the value, allows it for a blank."""
    assert decisions(scripted([[logits(BLANK, 1, 0, 0)], [BLANK_1]], BlankZero.NEMO, durations=(1, 0, 2))) == [
        (0, BLANK, 1),
        (1, BLANK, 1),
    ]


@pytest.mark.parametrize("durations", [(0, 1, 2, 3, 4), (0, 1, 2, 4, 8), (0, 2), (1, 3), (2, 0, 1)])
@pytest.mark.parametrize("max_symbols", [1, 3, 10, None])
def test_equals_nemo_on_random_networks(durations, max_symbols):
    """NeMo's batched greedy decoding of random networks, some of which favour blanks or duration 0."""
    import torch
    from nemo.collections.asr.modules import RNNTDecoder, RNNTJoint
    from nemo.collections.asr.parts.submodules.rnnt_greedy_decoding import GreedyBatchedTDTInfer

    vocabulary, width, frames = 7, 16, 25
    for seed in range(3):
        torch.manual_seed(seed)
        decoder = RNNTDecoder(prednet={"pred_hidden": width, "pred_rnn_layers": 1}, vocab_size=vocabulary).eval()
        jointnet = {"joint_hidden": width, "activation": "relu", "encoder_hidden": width, "pred_hidden": width}
        joint = RNNTJoint(
            jointnet=jointnet, num_classes=vocabulary, num_extra_outputs=len(durations), log_softmax=False
        ).eval()
        with torch.no_grad():
            joint.joint_net[-1].weight.mul_(3)
            joint.joint_net[-1].bias[vocabulary] += seed - 1  # blank: rare to frequent
            if max_symbols is not None and 0 in durations:  # without a limit such a network would never end
                joint.joint_net[-1].bias[vocabulary + 1 + durations.index(0)] += 0.5 * seed
            elif 0 in durations:
                joint.joint_net[-1].bias[vocabulary + 1 + durations.index(0)] -= 20
        encoded, lengths = torch.randn(3, width, frames), torch.tensor([frames, 1, frames // 2])
        infer = GreedyBatchedTDTInfer(
            decoder, joint, blank_index=vocabulary, durations=list(durations), max_symbols_per_step=max_symbols
        )
        with torch.inference_mode():
            expected = infer(encoder_output=encoded, encoded_lengths=lengths)[0]

            def predict(tokens, states, decoder=decoder):
                start = decoder.initialize_state(torch.zeros(1))
                state = [torch.cat(part, dim=1) for part in zip(*(state or start for state in states), strict=True)]
                outputs, (h, c) = decoder.predict(torch.tensor(tokens)[:, None], state, add_sos=False)
                return [Prediction(outputs[i].numpy(), (h[:, [i]], c[:, [i]])) for i in range(len(tokens))]

            def join(frames, outputs, joint=joint):
                return joint.joint(torch.from_numpy(frames)[:, None], torch.from_numpy(np.stack(outputs)))[
                    :, 0, 0
                ].numpy()

            actual = greedy_tdt_decode(
                windows_of(encoded.transpose(1, 2).numpy(), lengths[:, None].tolist()), predict, join,
                blank_id=vocabulary, durations=durations, max_symbols=max_symbols,
            )  # fmt: skip
        for one, other in zip(actual, expected, strict=True):
            assert one.tokens == other.y_sequence.tolist()
            assert [step.frame for step in one.emitted] == [int(frame) for frame in other.timestamp]
