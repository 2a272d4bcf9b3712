"""The conditions of a stress test do to the audio what they say; the table counts words; a folder ruined so that only
stress shows it is found."""

import numpy as np
import pytest
import soundfile

from common.evaluate.conditions import (
    CLEAN,
    CONDITIONS,
    KINDS,
    Cut,
    Joined,
    Speech,
    conditions_of,
)
from common.evaluate.wer import word_counts
from tests.helpers import CLIPS

RATE = 16000
NAMES = {condition.name: condition for condition in CONDITIONS}


def read(path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE
    return samples


@pytest.fixture(scope="module")
def speech() -> Speech:
    return Speech([read(path) for path in CLIPS], RATE)


def made(name: str, speech: Speech, clip: int = 0) -> np.ndarray:
    (take,) = NAMES[name].takes([clip], speech)
    return take.samples


def decibels(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(np.square(samples, dtype=np.float64)))


def share_above(samples: np.ndarray, hertz: float) -> float:
    """Of the energy."""
    power = np.abs(np.fft.rfft(samples.astype(np.float64))) ** 2
    return float(power[np.fft.rfftfreq(len(samples), 1 / RATE) > hertz].sum() / power.sum())


def test_conditions_have_names_of_their_own_and_begin_with_the_clips_as_they_are(speech):
    assert len(NAMES) == len(CONDITIONS) == 32
    assert conditions_of([])[0] is CLEAN
    assert [each.kind for each in conditions_of(["speed"])] == ["clean", "speed", "speed"]
    assert set(KINDS) == {"level", "silence", "noise", "telephone", "speed", "cut", "join"}
    np.testing.assert_array_equal(made("as it is", speech), speech.clips[0])


@pytest.mark.parametrize("db", [20, 40])
def test_levels(speech, db):
    quiet = made(f"-{db} dB", speech)
    assert decibels(quiet) - decibels(speech.clips[0]) == pytest.approx(-db, abs=0.1)
    assert (quiet * 2**15 == np.rint(quiet * 2**15)).all()  # of 16 bits


def test_clipping_cuts_off_what_is_louder_than_a_tenth_of_the_peak(speech):
    samples, clipped = speech.clips[0], made("clipped", speech)
    loud = np.abs(samples) > 0.1001 * np.abs(samples).max()
    assert 0.01 < loud.mean() < 0.9
    np.testing.assert_array_equal(clipped[loud], np.sign(samples[loud]))
    assert (np.abs(clipped) <= 1).all()
    unclipped = np.abs(samples) < 0.0999 * np.abs(samples).max()
    np.testing.assert_allclose(clipped[unclipped], samples[unclipped] * 10 / np.abs(samples).max(), rtol=1e-5)


@pytest.mark.parametrize("seconds", [0.3, 0.5, 1.0])
def test_silence_is_before_and_after(speech, seconds):
    samples, count = made(f"{seconds:g} s of silence around", speech), round(seconds * RATE)
    assert not samples[:count].any()
    assert not samples[-count:].any()
    np.testing.assert_array_equal(samples[count:-count], speech.clips[0])


@pytest.mark.parametrize("noise", ["white noise", "babble"])
@pytest.mark.parametrize("snr", [20, 12, 5])
def test_the_signal_to_noise_ratio_is_the_one_named(speech, noise, snr):
    for clip, samples in enumerate(speech.clips):
        added = made(f"{noise}, {snr} dB", speech, clip) - samples
        assert decibels(samples) - decibels(added) == pytest.approx(snr, abs=0.01)


def test_white_noise_is_flat_and_babble_is_the_other_clips(speech):
    white = made("white noise, 5 dB", speech) - speech.clips[0]
    assert share_above(white, RATE / 4) == pytest.approx(0.5, abs=0.02)
    two = Speech(speech.clips[:2], RATE)
    voice = made("babble, 5 dB", two) - two.clips[0]
    other = np.resize(two.clips[1], 2 * len(two.clips[1]) + len(voice))
    correlation = np.correlate(other, voice, "valid") / np.linalg.norm(voice)
    assert np.abs(correlation).max() > 0.9 * np.linalg.norm(other) * np.sqrt(len(voice) / len(other))
    alone = Speech(speech.clips[:1], RATE)
    assert {each.name for each in CONDITIONS if not each.possible(alone)} == {f"babble, {db} dB" for db in (20, 12, 5)}


def test_a_telephone_has_nothing_above_4_khz():
    noise = Speech([np.random.default_rng(0).standard_normal(RATE).astype(np.float32)], RATE)
    narrow = made("telephone, 8 kHz", noise)
    assert narrow.shape == noise.clips[0].shape
    assert share_above(noise.clips[0], 4050) > 0.45
    assert share_above(narrow, 4050) < 1e-4
    # What is below 3.4 kHz is as it was, at the same place.
    spectra = [np.fft.rfft(one)[: int(3400 / RATE * len(one))] for one in (noise.clips[0][500:-500], narrow[500:-500])]
    assert np.linalg.norm(spectra[0] - spectra[1]) < 0.1 * np.linalg.norm(spectra[0])


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_duration_and_pitch(speed):
    tone = Speech([np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE).astype(np.float32)], RATE)
    played = made(f"speed {speed}", tone)
    assert len(played) == pytest.approx(2 * RATE / speed, abs=2)
    peak = np.abs(np.fft.rfft(played)).argmax() * RATE / len(played)
    assert peak == pytest.approx(440 * speed, abs=1)


@pytest.mark.parametrize("pause", [0.0, 1.0])
def test_joined_clips_follow_each_other_and_each_is_used(speech, pause):
    joined = Joined("test", "join", 10.0, pause)
    groups = list(joined.groups(speech.durations))
    assert {clip for group in groups for clip in group} == set(range(len(speech.clips)))
    for group in groups:
        (take,) = joined.takes(group, speech)
        assert len(take.samples) >= 10 * RATE
        assert len(take.samples) == sum(len(speech.clips[i]) + pause * RATE for i in group)
        for part in take.parts:
            begin, end = round(part.begin * RATE), round(part.end * RATE)
            np.testing.assert_array_equal(take.samples[begin:end], speech.clips[part.clip])
            assert not take.samples[end : end + round(pause * RATE)].any() or not pause


@pytest.mark.parametrize("piece", [5, 14])
def test_pieces_are_the_joined_audio_cut_to_their_length(speech, piece):
    cut, joined = Cut("test", "cut", 30.0, piece=piece), Joined("test", "join", 30.0)
    for group in cut.groups(speech.durations):
        pieces, (whole,) = cut.takes(group, speech), joined.takes(group, speech)
        np.testing.assert_array_equal(np.concatenate([take.samples for take in pieces]), whole.samples)
        assert {len(take.samples) for take in pieces[:-1]} == {piece * RATE}
        assert piece / 2 <= len(pieces[-1].samples) / RATE <= 1.5 * piece
        covered = sum(part.end - part.begin for take in pieces for part in take.parts)
        assert covered == pytest.approx(len(whole.samples) / RATE)
        for take in pieces:
            for part in take.parts:
                if part.whole:
                    begin = round(part.begin * RATE)
                    clip = speech.clips[part.clip]
                    np.testing.assert_array_equal(take.samples[begin : begin + len(clip)], clip)


def test_the_seed_decides_the_noise(speech):
    for name in ("white noise, 12 dB", "babble, 12 dB"):
        again = made(name, Speech(speech.clips, RATE))
        np.testing.assert_array_equal(made(name, speech), again)
        assert (made(name, Speech(speech.clips, RATE, seed=1)) != again).any()


def test_silent_clips_stay_silent():
    silent = Speech([np.zeros(RATE, np.float32)] * 3, RATE)
    for condition in CONDITIONS:
        if condition.possible(silent):
            for group in condition.groups(silent.durations):
                assert not any(take.samples.any() for take in condition.takes(group, silent)), condition.name


def test_words_lost_added_and_changed():
    counts = word_counts("a b c d e f", "a x c e f g")
    assert (counts.lost, counts.added, counts.changed, counts.words) == (1, 1, 1, 6)
    assert (counts.missed, counts.errors) == (2, 3)
    empty = word_counts("", "a b")
    assert (empty.lost, empty.added, empty.words) == (0, 2, 0)
