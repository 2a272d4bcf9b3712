"""Word error rates, and the reasons that may excuse a difference."""

import re
from pathlib import Path

import pytest

from common.cli import CheckError
from common.contract import PARITY_TOLERANCE
from common.evaluate.blanks import Blank, Flaws
from common.evaluate.compare import BLANK_ZERO, NEAR_TIE, ComparedClip, Difference, first_difference
from common.evaluate.engines import labels
from common.evaluate.verdict import judge_tokens, print_corpus, transcribe_and_print
from common.evaluate.words import marked_changes, normalize, word_error_rate, word_errors
from common.run.decode import Hypothesis, Step, TimedWord, Transcript
from tests.helpers import comparison_of

BLANK = 9


def hypothesis(*steps):
    """Steps given as (frame, token, margin, blank_zero)."""
    return Hypothesis([Step(frame, token, 1, margin, zero) for frame, token, margin, zero in steps], BLANK)


def test_word_errors():
    assert word_errors("a b c", "a x c d") == (2, 3)
    assert word_errors("a b c", "") == (3, 3)
    assert word_errors("", "two words") == (2, 0)


def test_normalize():
    assert normalize("Hello, WORLD!  It's") == normalize("hello world it's")
    assert normalize("Ça va ?") == normalize("ça va")


def test_digits_count_in_the_normalised_rate_and_signs_in_the_other():
    text = "In 2025 I paid $19.99 for 3 apples, 50% off."
    assert normalize(text) == "in 2025 i paid 19 99 for 3 apples 50 off"
    for wrong in ("In  I paid $. for  apples, % off.", "In 2024 I paid $19.99 for 3 apples, 50% off."):
        assert word_errors(normalize(text), normalize(wrong))[0] > 0
    assert word_errors("50% off", "50 off")[0] == 1
    assert word_errors(normalize("50% off"), normalize("50 off"))[0] == 0


def test_corpus_rate_weighs_by_words():
    rate = word_error_rate(["a b c d", "e"], ["a b c d", "x"])
    assert (rate.errors, rate.words) == (1, 5)
    assert rate.percent == 20
    assert rate.low <= rate.percent <= rate.high
    assert word_error_rate(["a b"] * 50, ["a b"] * 50).high == 0


def test_interval_narrows_with_speech():
    few = word_error_rate(["a b c d", "e f g h"] * 3, ["a b c x", "e f g h"] * 3)
    many = word_error_rate(["a b c d", "e f g h"] * 300, ["a b c x", "e f g h"] * 300)
    assert many.high - many.low < few.high - few.low


def test_a_rise_is_judged_on_the_same_draws():
    texts, before = ["a b c d"] * 20, ["a b x y", "a b c d"] * 10
    after = [*before[:-2], "a x y z", "a b c d"]
    rise = word_error_rate(texts, after, before)
    assert (rise.errors, rise.words) == (1, 80)
    assert 0 <= rise.low <= 1.25 <= rise.high < 5  # while either rate alone is anywhere between 15 % and 40 %
    assert word_error_rate(texts, before, before).high == 0
    assert word_error_rate(texts, texts, before).percent == -25


def test_marked_changes():
    assert marked_changes("a b c", "a x c d") == [("a", "a"), ("b", "x"), ("c", "c"), ("", "d")]
    assert marked_changes("a  b", "") == [("a b", "")]
    assert marked_changes("", "") == []


def emitted(tokens, frames):
    return Transcript(tokens, "", frames=frames)


STEPS = ((0, 1, 5.0, False), (1, BLANK, 5.0, False), (2, 2, 5.0, False))


def test_equal_decodings_have_no_difference():
    assert first_difference(emitted([1, 2], [0, 2]), hypothesis(*STEPS)) is None
    assert first_difference(hypothesis(*STEPS), Transcript([1, 2], "")) is None


@pytest.mark.parametrize(("tokens", "frames", "index"), [
    ([1, 3], [0, 2], 1), ([1, 2], [0, 1], 1), ([1], [0], 1),
    ([1, 2, 3], [0, 2, 3], 2), ([], [], 0), ([2, 2], [0, 2], 0),
])  # fmt: skip
def test_a_clear_difference_has_no_excuse(tokens, frames, index):
    difference = first_difference(emitted(tokens, frames), hypothesis(*STEPS))
    assert difference.index == index
    assert difference.excuse is None


def test_a_near_tie_excuses_only_where_the_decodings_part():
    near = PARITY_TOLERANCE / 2
    at_the_blank = hypothesis(STEPS[0], (1, BLANK, near, False), STEPS[2])
    assert first_difference(emitted([1, 3], [0, 2]), at_the_blank).excuse == NEAR_TIE
    before = hypothesis((0, 1, 5.0, False), (1, 4, near, False), (2, 5, 5.0, False), (3, 2, 5.0, False))
    assert first_difference(emitted([1, 4, 5, 3], [0, 1, 2, 3]), before).excuse is None
    after = hypothesis(STEPS[0], STEPS[2], (3, 4, near, False))
    assert first_difference(emitted([1, 3, 4], [0, 2, 3]), after).excuse is None


def test_a_blank_of_duration_zero_excuses():
    at_the_blank = hypothesis(STEPS[0], (1, BLANK, 5.0, True), STEPS[2])
    assert first_difference(emitted([1, 3], [0, 2]), at_the_blank).excuse == BLANK_ZERO


def test_token_differences():
    assert first_difference(hypothesis(*STEPS), Transcript([1, 7], "")).index == 1
    assert first_difference(hypothesis(*STEPS), Transcript([1], "")).actual is None
    assert first_difference(hypothesis(*STEPS), Transcript([1, 2, 4], "")).expected is None
    assert first_difference(hypothesis((0, BLANK, 5.0, False)), Transcript([1], "")).actual == 1


def comparison_with(difference):
    words = [TimedWord("a", 3, 5)]
    transcripts = {"G": Transcript([1], "a", 0.5, 0.25), "R": Transcript([2], "b", 0.25, words=words)}
    clip = ComparedClip(Path("a.wav"), text="a", seconds=1.0, transcripts=transcripts, differences={"R": difference})
    clip.flaws = {"G": Flaws(None, []), "R": Flaws([Blank(1.5, 5.0, 3.25, reference_has_words=True)], ["no"])}
    return comparison_of([clip])


def test_the_keys_of_the_json_results():
    """Other programs read these keys, so they must not change."""
    found = comparison_with(Difference(0, 3, 1, 2, "a reason", None)).as_json()
    words = [{"text": "a", "start": 0.24, "end": 0.4}]
    blank = [{"start": 1.5, "end": 5.0, "speech": 3.25, "reference_has_words": True}]
    rate = {"errors": 0, "words": 1, "low": 0.0, "high": 0.0}
    assert found["engines"]["G"] == {
        "rtfx": 2.0, "rtfx_without_features": 4.0, "wer": rate, "normalised_wer": rate,
    }  # fmt: skip
    assert found["clips"] == [
        {
            "audio_filepath": "a.wav", "offset": 0.0, "duration": 1.0, "text": "a",
            "engines": {
                "G": {
                    "tokens": [1], "text": "a", "seconds": 0.5, "features_seconds": 0.25, "words": None,
                    "blank": None, "repeated": [],
                },
                "R": {
                    "tokens": [2], "text": "b", "seconds": 0.25, "features_seconds": 0.0, "words": words,
                    "blank": blank, "repeated": ["no"],
                },
            },
        }
    ]  # fmt: skip
    assert found["differences"] == [
        {
            "audio_filepath": "a.wav", "offset": 0.0, "engine": "R",
            "index": 0, "frame": 3, "expected": 1, "actual": 2, "excuse": "a reason", "margin": None,
        }
    ]  # fmt: skip
    assert found["draws"] == []


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (
            Difference(0, 3, 1, 2, None, None),
            "token 1 of the transcript, encoder frame 3: expected 1, got 2; nothing excuses",
        ),
        (
            Difference(4, 9, None, 2, None, 0.5),
            "token 5 of the transcript, encoder frame 9: expected no token, got 2;",
        ),
        (
            Difference(4, 9, 7, 7, "near", None),
            "token 5 of the transcript, encoder frame 9: token 7 is emitted at an",
        ),
    ],
)
def test_a_difference_in_words(difference, text, capsys):
    comparison = comparison_with(difference)
    if difference.excuse:
        judge_tokens(comparison)
    else:
        with pytest.raises(CheckError, match="in 1 cases"):
            judge_tokens(comparison)
    assert f"a.wav: R, {text}" in capsys.readouterr().out


def test_folders_of_one_name_have_labels_of_their_own():
    """As after --runtime all, where each folder ends in the name of its runtime."""
    both = [Path("/home/me/optimized/genai"), Path("/home/me/exported/genai")]
    assert labels(both) == ["optimized/genai", "exported/genai"]
    assert labels([Path("/one/models/genai"), Path("/two/models/genai")]) == ["one/models/genai", "two/models/genai"]
    assert labels([Path("/home/me/optimized"), Path("/home/me/exported")]) == ["optimized", "exported"]
    assert labels(both[:1]) == ["genai"]


def scripted(*made):
    """What transcribes: it gives a text for each clip, in half a second, of which the features take half."""
    texts = iter(made)
    return lambda recordings: [Transcript([1], next(texts), 0.5, 0.25) for _ in recordings]


def printed(capsys, genai, onnx, texts=(None, None)):
    """What is printed for two clips of one second, for which the engines give these texts."""
    clips = [ComparedClip(Path(name), text=text) for name, text in zip(("a.wav", "b.wav"), texts, strict=True)]
    comparison = comparison_of(clips, genai=scripted(*genai), onnx=scripted(*onnx), is_float32=False)
    transcribe_and_print(comparison, print_times=False)
    print_corpus(comparison)
    return capsys.readouterr().out.splitlines()


def test_rows_are_printed_for_the_clips_alone_on_which_engines_differ(capsys):
    lines = printed(capsys, ("one two", "three"), ("one two", "tree"))
    assert lines[:5] == ["a.wav  1.0 s  one two", "b.wav  1.0 s  three", "  engine  transcript", "  G       three",
                         "  R       tree"]  # fmt: skip
    assert lines[5:9] == ["2 clips, 2 s of audio", "engine  RTFx  without features", "G       2.0   4.0",
                          "R       2.0   4.0"]  # fmt: skip


def test_the_text_of_a_clip_is_printed_where_the_transcript_has_other_words(capsys):
    lines = printed(capsys, ("one two", "three"), ("one two", "three"), texts=("one two", "tree"))
    assert lines[:3] == ["a.wav  1.0 s  one two", "b.wav  1.0 s  three", "  text of the clip: tree"]
    assert lines[4].endswith("  normalised WER")
    assert re.match(r"G +2\.0 +4\.0 +33\.33 % \[", lines[5])
