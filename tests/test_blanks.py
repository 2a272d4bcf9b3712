"""Blank stretches and repeated phrases, by hand-made sound and words."""

import numpy as np
import pytest

from common.evaluate.blanks import (
    Blank,
    Flaws,
    blank_stretches,
    find_flaws,
    flaws_table,
    repeated_phrases,
    speech_frames,
)
from common.evaluate.words import Pieces
from common.run.config import RuntimeConfig
from common.run.decode import Transcript

RATE = 16000
CONFIG = RuntimeConfig(
    sample_rate=RATE, hop_length=160, subsampling_factor=8, chunk=60 * RATE, left=0, right=0, blank_id=3,
    durations=(0, 1, 2, 3, 4), max_symbols=10, decoder_layers=1, decoder_dim=1,
)  # fmt: skip
WORD, MARK, SPECIAL = range(3)
PIECES = Pieces(("▁word", "▁.", "<pad>"), frozenset({SPECIAL}), frozenset("."), str)


def sound(*parts: tuple[float, float]) -> np.ndarray:
    """Noise of these (seconds, dB), one after the other."""
    draw = np.random.default_rng(0)
    pieces = [10 ** (db / 20) * draw.standard_normal(round(seconds * RATE)) for seconds, db in parts]
    return np.concatenate(pieces).astype(np.float32)


def transcript(*times: float, token: int = WORD, text: str = "") -> Transcript:
    """Tokens that were emitted at these seconds."""
    return Transcript([token] * len(times), text, frames=[round(time / CONFIG.frame_seconds) for time in times])


def flaws_of(samples: np.ndarray, text: str | None = "word", **transcripts: Transcript) -> dict[str, Flaws]:
    return find_flaws(samples, transcripts, PIECES, CONFIG, reference="nemo", text=text)


def test_speech_is_what_is_at_most_20_db_below_its_level():
    speech = speech_frames(sound((3, -20), (3, -37), (3, -43)), RATE)
    assert speech.reshape(3, 100).mean(axis=1) == pytest.approx([1, 1, 0], abs=0.03)


def test_a_minute_of_quiet_noise_does_not_count_as_speech_beside_3_seconds_of_it():
    speech = speech_frames(sound((3, -20), (57, -45)), RATE)
    assert speech[:100].all()
    assert not speech[100:].any()


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros(100), np.zeros(RATE)])
def test_silence_is_no_speech(samples):
    assert not speech_frames(samples.astype(np.float32), RATE).any()


def test_a_stretch_holds_more_than_3_seconds_of_speech_between_two_words():
    speech = np.ones(1000, bool)  # 30 s
    words = [*np.arange(0, 9, 0.5), *np.arange(13, 28, 0.5)]
    (blank,) = blank_stretches(speech, words, 0.32)
    assert (blank.start, blank.end) == pytest.approx((8.82, 13), abs=0.05)
    assert blank.speech == pytest.approx(blank.end - blank.start)
    (behind,) = blank_stretches(speech, np.arange(0, 25, 0.5), 0.32)
    (before,) = blank_stretches(speech, np.arange(5, 30, 0.5), 0.32)
    assert (before.start, behind.end) == (0, 30)
    assert not [*blank_stretches(speech, np.arange(0, 30, 3.2), 0.32)]
    (whole,) = blank_stretches(speech, [], 0.32)
    assert (whole.start, whole.end) == (0, 30)


def test_pauses_are_not_counted():
    pause = sound((1, -20), (60, -75), (1.5, -20))
    assert flaws_of(pause, nemo=transcript(0.2, 62.4))["nemo"].blank == []
    talk = sound(*[(0.7, -20), (0.6, -75)] * 5)  # 3.5 s of speech in 6.5 s
    (blank,) = flaws_of(talk, nemo=transcript())["nemo"].blank
    assert (blank.start, blank.end, blank.speech) == pytest.approx((0, 5.9, 3.5), abs=0.15)


def test_marks_and_special_tokens_are_no_words():
    for token, expected in ((WORD, 0), (MARK, 1), (SPECIAL, 1)):
        found = flaws_of(sound((6, -20)), nemo=transcript(2.9, token=token))
        assert len(found["nemo"].blank) == expected


def test_nobody_speaks_where_the_text_has_no_word():
    assert len(flaws_of(sound((6, -20)), None, nemo=transcript())["nemo"].blank) == 1
    assert flaws_of(sound((6, -20)), "...", nemo=transcript())["nemo"].blank == []


def test_a_stretch_says_whether_the_reference_has_words_there():
    samples = sound((10, -20))
    own = transcript(0.2, 9.8)
    for reference, expected in ((transcript(0.2, 5.0, 9.8), True), (own, False), (transcript(0.6, 9.5), False)):
        found = flaws_of(samples, nemo=reference, onnx=own)
        assert [each.reference_has_words for each in found["onnx"].blank] == [expected]
        assert len(found["onnx"].alone) == expected
        assert not found["nemo"].alone
    alone = flaws_of(samples, onnx=own)["onnx"]  # without a reference nothing is known of it
    assert [each.reference_has_words for each in alone.blank] == [None]


def test_an_engine_without_times_is_not_guessed():
    found = flaws_of(sound((6, -20)), nemo=transcript(2.9), genai=Transcript([], ""))
    assert found["genai"].blank is None
    assert (found["genai"] + found["genai"]).blank is None


def test_stretches_of_pieces_are_placed_one_after_the_other():
    one = Flaws([Blank(1, 5, 4)], ["a"])
    assert one + one == Flaws([Blank(1, 5, 4), Blank(1, 5, 4)], ["a", "a"])
    (early,), (later,) = (
        find_flaws(sound((6, -20)), {"nemo": transcript()}, PIECES, CONFIG, reference=None, text=None, begin=begin)[
            "nemo"
        ].blank
        for begin in (0.0, 20.0)
    )
    assert (later.start - early.start, later.end - early.end, later.speech) == (20, 20, early.speech)


def test_phrases_four_times_in_a_row():
    assert repeated_phrases("No, no no NO. Yes yes yes") == ["no"]
    assert repeated_phrases("so " + "thank you. " * 5 + "bye " * 4) == ["thank you", "bye"]
    assert repeated_phrases("a b c a b c a b c a b d") == []
    assert repeated_phrases("") == []
    found = flaws_of(sound((1, -20)), "ha ha ha ha", nemo=transcript(text="ha ha ha ha no no no no"))
    assert found["nemo"].repeated == ["no"]  # the text itself has the other one


def test_the_table_begins_with_what_only_an_engine_of_ours_lacks():
    flaws = {"nemo": Flaws([Blank(0, 4, 3.5)], []), "onnx": Flaws([Blank(0, 9, 8.0, reference_has_words=True)], ["no"])}
    table = flaws_table([("clip", flaws)], "nemo")
    assert table[0] == ("clip", "engine", "suspicious", "nemo")
    assert table[1] == ("clip", "onnx", "blank 0.0 to 9.0 s, 8.0 s of it speech", "has words there")
    assert {row[1:] for row in table[2:]} == {
        ("nemo", "blank 0.0 to 4.0 s, 3.5 s of it speech", "–"),
        ("onnx", "repeated 'no'", "–"),
    }
    assert flaws_table([("clip", {"onnx": Flaws([], [])})], "nemo") == []
