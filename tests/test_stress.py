"""The conditions of a stress test alter the audio as their names say, the table counts words, and a folder that is
ruined in a way that only stress shows is found."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import soundfile
from onnx import TensorProto, helper, numpy_helper

import optimize_encoder
import test_real_speech
from common import optimize
from common.evaluate import stress
from common.evaluate.engines import NEMO_ENGINE, Engine
from common.evaluate.stress import CLEAN, CONDITIONS, FLOAT32, KINDS, Condition, Speech, StressOptions, StressTest
from common.evaluate.words import word_counts
from common.folder import write_locations
from common.onnx_io import save_model
from common.report.report import REPORT_JSON
from common.run.audio import Clip
from common.run.decode import Transcript
from tests.helpers import CLIPS, ROWS, rejected

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
    (samples,) = NAMES[name].takes([clip], speech)
    return samples


def decibels(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(np.square(samples, dtype=np.float64)))


def share_above(samples: np.ndarray, hertz: float) -> float:
    """The share of the energy that is above `hertz`."""
    power = np.abs(np.fft.rfft(samples.astype(np.float64))) ** 2
    return float(power[np.fft.rfftfreq(len(samples), 1 / RATE) > hertz].sum() / power.sum())


def test_conditions_have_names_of_their_own_and_begin_with_the_clips_as_they_are(speech):
    assert len(NAMES) == len(CONDITIONS) == 31
    assert CONDITIONS[0] is CLEAN
    for kinds, expected in ((["speed"], ["clean", "speed", "speed"]), ([], [each.kind for each in CONDITIONS])):
        test = stress.StressTest([], None, None, [], stress.StressOptions(stress=kinds))
        test.speech = speech
        assert [each.kind for each in test.conditions] == expected
    assert set(KINDS) == {"level", "silence", "noise", "telephone", "speed", "cut", "join"}
    np.testing.assert_array_equal(made("as it is", speech), speech.clips[0])


@pytest.mark.parametrize("db", [20, 40])
def test_levels(speech, db):
    quiet = made(f"-{db} dB", speech)
    assert decibels(quiet) - decibels(speech.clips[0]) == pytest.approx(-db, abs=0.1)
    assert (quiet * 2**15 == np.rint(quiet * 2**15)).all()  # of 16 bits


def test_the_ends_alone_are_softer(speech):
    longest = int(np.argmax(speech.durations))
    samples, soft = speech.clips[longest], made("ends 25 dB softer", speech, longest)
    for end in (slice(None, RATE), slice(-RATE, None)):
        assert decibels(soft[end]) - decibels(samples[end]) == pytest.approx(-25, abs=0.1)
    np.testing.assert_array_equal(soft[RATE:-RATE], samples[RATE:-RATE])
    second = Speech([np.ones(RATE, np.float32)], RATE)  # too short for two seconds: a third at each end
    changed = made("ends 25 dB softer", second) != second.clips[0]
    assert not changed[RATE // 3 : -(RATE // 3)].any()
    assert changed[: RATE // 3].mean() > 0.9


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


def test_silence_in_front_alone_and_behind_alone(speech):
    samples, half = speech.clips[0], np.zeros(RATE // 2, np.float32)
    np.testing.assert_array_equal(made("0.5 s of silence in front", speech), [*half, *samples])
    np.testing.assert_array_equal(made("0.5 s of silence behind", speech), [*samples, *half])


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
    joined = Condition("test", "join", join=10.0, after=pause)
    groups = list(joined.groups(speech.durations))
    assert {clip for group in groups for clip in group} == set(range(len(speech.clips)))
    for group in groups:
        (samples,) = joined.takes(group, speech)
        assert len(samples) >= 10 * RATE
        silence = np.zeros(round(pause * RATE), np.float32)
        np.testing.assert_array_equal(samples, np.concatenate([[*speech.clips[clip], *silence] for clip in group]))


def test_quiet_clips_joined_end_in_a_short_last_window(speech):
    quiet = NAMES["-30 dB, joined to 62.5 s"]
    groups = list(quiet.groups(speech.durations))
    assert {clip for group in groups for clip in group} == set(range(len(speech.clips)))
    for group in groups:
        (samples,) = quiet.takes(group, speech)
        assert 62.49 < len(samples) / RATE <= 62.5  # GenAI's second window has less than 3 s
        end = len(samples)  # and speech until its end
        between = (end - sum(len(speech.clips[clip]) for clip in group)) // len(group)
        for clip in reversed(group):
            begin = end - len(speech.clips[clip])
            assert decibels(samples[begin:end]) - decibels(speech.clips[clip]) == pytest.approx(-30, abs=0.2)
            assert not samples[begin - between : begin].any()
            end = begin - between
        assert end == 0


@pytest.mark.parametrize("piece", [5, 14])
def test_pieces_are_the_joined_audio_cut_to_their_length(speech, piece):
    cut, joined = Condition("test", "cut", join=20.0, cut=(piece,)), Condition("test", "join", join=20.0)
    groups = list(cut.groups(speech.durations))
    assert [clip for group in groups for clip in group] == list(range(len(speech.clips)))  # each once
    for group in groups[:-1]:
        assert 20 <= sum(speech.durations[clip] for clip in group) < 20 + max(speech.durations)
    for group in cut.groups(speech.durations):
        pieces, (whole,) = cut.takes(group, speech), joined.takes(group, speech)
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
        np.testing.assert_array_equal(whole, np.concatenate([speech.clips[clip] for clip in group]))
        assert all(len(samples) == piece * RATE for samples in pieces[:-1])
        assert len(pieces[-1]) / RATE <= 1.5 * piece
        assert len(pieces) == 1 or piece / 2 <= len(pieces[-1]) / RATE


def test_cuts_come_in_steps_of_a_tenth_of_a_second(speech):
    cuts = [each for each in CONDITIONS if each.kind == "cut"]
    assert [np.mean(each.cut) for each in cuts] == pytest.approx([5, 7, 9, 11, 14])
    joined = Speech([np.tile(speech.clips[0], 40)] * 3, RATE)
    for condition in cuts:
        assert np.diff(condition.cut) == pytest.approx([0.1] * 4)
        for first in range(3):  # groups that follow each other begin with other pieces
            lengths = [len(samples) / RATE for samples in condition.takes([first], joined)]
            assert lengths[:5] == pytest.approx((*condition.cut[first:], *condition.cut[:first]), abs=1e-4)


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
                assert not any(samples.any() for samples in condition.takes(group, silent)), condition.name


def test_words_lost_added_and_changed():
    counts = word_counts("a b c d e f", "a x c e f g")
    assert (counts.lost, counts.added, counts.changed, counts.words) == (1, 1, 1, 6)
    assert (counts.missed, counts.errors) == (2, 3)
    empty = word_counts("", "a b")
    assert (empty.lost, empty.added, empty.words) == (0, 2, 0)


def test_blank_stretches_of_later_pieces_have_the_times_of_the_whole(monkeypatch):
    """An engine without a word, on 20 s of noise in pieces of 5 s, each of which counts 30 ms at a time."""
    monkeypatch.setattr(stress, "CONDITIONS", (CLEAN, Condition("test", "cut", join=20.0, cut=(5.0,))))
    config = SimpleNamespace(sample_rate=RATE, chunk=math.inf, frame_seconds=0.08, durations=(0, 1, 2, 3, 4))
    folder = SimpleNamespace(config=config, pieces=None)
    engine = Engine(FLOAT32, NEMO_ENGINE, lambda recordings: [Transcript([], "", frames=[]) for _ in recordings])
    test = StressTest(
        [engine], None, folder, [Clip(Path("noise.wav"), "words")], StressOptions(["cut"]), judged=FLOAT32
    )
    test.speech = Speech([np.random.default_rng(0).normal(0, 0.1, 20 * RATE).astype(np.float32)], RATE)
    blank = {row["condition"]: row["blank"] for row in test.run().as_json()["results"]}
    assert [(each["start"], each["end"]) for each in blank["as it is"]] == [(0.0, 19.98)]
    found = [(each["start"], each["end"]) for each in blank["test"]]
    assert found == [pytest.approx((begin, begin + 4.98)) for begin in (0, 5, 10, 15)]


# ---- a folder ruined so that only stress shows it


def ruin(folder: Path, constants: dict[str, np.ndarray], nodes: list[tuple]) -> None:
    """Put nodes (operator, inputs, output, attributes) behind the encoder of a folder. They read `features` and
    `healthy`, the encoder's own frames [B, D, S], and the last one makes the output from them."""
    model = onnx.load(folder / "encoder.onnx")  # with its data
    graph = model.graph
    features, output = graph.input[0].name, graph.output[0].name
    (last,) = [node for node in graph.node if output in node.output]
    last.output[list(last.output).index(output)] = "healthy"
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    names = {"features": features, nodes[-1][2]: output}
    for kind, inputs, name, more in nodes:
        inputs = [names.get(each, each) for each in inputs]
        graph.node.append(helper.make_node(kind, inputs, [names.get(name, name)], **more))
    (folder / "encoder.onnx.data").unlink()
    onnx.save(model, folder / "encoder.onnx", save_as_external_data=True, location="encoder.onnx.data")


def ruin_silence(folder: Path) -> None:
    """Let the encoder's output collapse where the features of 25 frames or more in a row are the same, as in digital
    silence; for clips without such silence nothing changes."""
    constants = {
        "from_second": np.array([1], np.int64),
        "to_last": np.array([-1], np.int64),
        "beyond": np.array([2**31], np.int64),
        "first": np.array([0], np.int64),
        "time": np.array([2], np.int64),
        "still": np.array(1e-6, np.float32),
        "many": np.array(25, np.float32),
    }
    nodes = [
        ("Slice", ["features", "from_second", "beyond", "time"], "later", {}),
        ("Slice", ["features", "first", "to_last", "time"], "earlier", {}),
        ("Sub", ["later", "earlier"], "change", {}),
        ("Abs", ["change"], "size", {}),
        ("ReduceMax", ["size"], "largest", {"axes": [1], "keepdims": 1}),  # [B, 1, T-1]
        ("Less", ["largest", "still"], "is_still", {}),
        ("Cast", ["is_still"], "still_frames", {"to": TensorProto.FLOAT}),
        ("ReduceSum", ["still_frames", "time"], "count", {"keepdims": 1}),  # [B, 1, 1]
        ("Less", ["count", "many"], "is_healthy", {}),
        ("Cast", ["is_healthy"], "gain", {"to": TensorProto.FLOAT}),
        ("Mul", ["healthy", "gain"], "ruined", {}),
    ]
    ruin(folder, constants, nodes)


def ruin_middle(folder: Path) -> None:
    """Let the encoder's frames 100 to 179, of 80 ms, be zeros in audio of more than 300 frames: the decoder emits three
    tokens there and then stays on blank. Shorter audio, and what is before and after, does not change."""
    constants = {
        "time": np.array(2, np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "begin": np.array(100, np.int64),
        "end": np.array(180, np.int64),
        "long": np.array(300, np.int64),
        "zeros": np.array(0, np.float32),
    }
    nodes = [
        ("Shape", ["healthy"], "shape", {}),
        ("Gather", ["shape", "time"], "count", {}),
        ("Range", ["zero", "count", "one"], "places", {}),
        ("Less", ["places", "end"], "before_end", {}),
        ("Less", ["places", "begin"], "before_begin", {}),
        ("Not", ["before_begin"], "after_begin", {}),
        ("And", ["before_end", "after_begin"], "in_middle", {}),
        ("Greater", ["count", "long"], "is_long", {}),
        ("And", ["in_middle", "is_long"], "is_ruined", {}),  # [S]
        ("Where", ["is_ruined", "zeros", "healthy"], "ruined", {}),
    ]
    ruin(folder, constants, nodes)


UNQUANTIZED = ("--skip_quantization", "--skip_fusion")


@pytest.fixture(scope="module")
def unquantized(optimized) -> Path:
    """An optimized folder with float32 weights beside its export, with the same transcripts as the export."""
    return optimized(*UNQUANTIZED)


@pytest.fixture(scope="module")
def ruined(unquantized, tiny_export, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ruined") / "optimized"
    shutil.copytree(unquantized, folder)
    write_locations(folder, folder, exported=tiny_export)
    ruin_silence(folder)
    return folder


@pytest.fixture(scope="module")
def short_manifest(tmp_path_factory) -> Path:
    """Three clips, for speed."""
    path = tmp_path_factory.mktemp("clips") / "manifest.jsonl"
    rows = [{"audio_filepath": str(clip), "text": row["text"]} for clip, row in zip(CLIPS, ROWS, strict=True)][:3]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def speech_of(folder: Path, manifest: Path, *more) -> int:
    argv = ["--model_dir", folder, "--manifest", manifest, "--skip_nemo", *more]
    return test_real_speech.main([str(argument) for argument in argv])


@pytest.mark.slow
def test_stress_alone_sees_a_folder_that_silence_ruins(unquantized, ruined, short_manifest, tmp_path, capsys):
    results, audio = tmp_path / "stress.json", tmp_path / "worst"
    flags = ("--stress", "silence", "--max_lost_words", 2)
    assert speech_of(unquantized, short_manifest, *flags) == 0
    assert speech_of(ruined, short_manifest, "--json", tmp_path / "clean.json") == 0
    capsys.readouterr()
    assert speech_of(ruined, short_manifest, *flags, "--json", results, "--stress_dir", audio) == 1
    captured = capsys.readouterr()
    assert "under stress optimized misses more words than float32: '0.3 s of silence around'" in captured.err
    assert "about" in captured.out.splitlines()[0]

    clean = json.loads((tmp_path / "clean.json").read_text())["engines"]
    assert len({row["wer"]["errors"] for row in clean.values()}) == 1
    found = json.loads(results.read_text())["results"]
    by_engine = {
        (row["engine"], row["condition"]): [r for r in found if (r["engine"], r["condition"]) == key]
        for row in found
        if (key := (row["engine"], row["condition"]))
    }
    assert by_engine.keys() == {
        (engine, name)
        for engine in ("float32", "optimized")
        for name in NAMES
        if NAMES[name].kind in ("clean", "silence")
    }
    for row in by_engine["optimized", "1 s of silence around"]:
        assert row["windows"] == {"takes": 1, "empty": int(not row["transcript"])}
        assert row["against_text"]["lost"] + row["against_text"]["changed"] > row["against_text"]["words"] / 2
    for row in by_engine["optimized", "as it is"]:
        assert row["against_clean"]["words"] > 0
        assert not any(row["against_clean"][key] for key in ("lost", "added", "changed"))

    # The audio of the worst clips is what the engines were given.
    files = sorted(audio.iterdir())
    assert files[0].name.startswith("01_")
    file = next(file for file in files if "around" in file.name)
    worst, rate = soundfile.read(file, dtype="float32")
    lead = next(round(s * rate) for s in (1, 0.5, 0.3) if f"_{s:g}_s_" in file.name)
    assert not worst[:lead].any()
    assert worst[lead : lead + rate].any()


@pytest.fixture
def only(monkeypatch) -> Callable[..., None]:
    """`only(*names)` leaves out all other conditions but the clips as they are, since joined audio takes long."""

    def leave(*names: str) -> None:
        kept = tuple(NAMES[name] for name in ("as it is", *names))
        monkeypatch.setattr(stress, "CONDITIONS", kept)

    return leave


@pytest.mark.slow
def test_a_blank_stretch_fails_where_the_error_rates_do_not(
    unquantized, tiny_export, short_manifest, tmp_path, only, capsys
):
    """A decoder that stays on blank for 6 s of a long recording changes no short clip, and few of the errors of a model
    that has most words of long audio wrong; float32 has words there."""
    only("joined to 30 s")
    folder, results = tmp_path / "optimized", tmp_path / "stress.json"
    shutil.copytree(unquantized, folder)
    write_locations(folder, folder, exported=tiny_export)
    flags = ("--stress", "join", "--max_lost_words", 20, "--json", results)
    assert speech_of(folder, short_manifest, *flags) == 0
    ruin_middle(folder)
    capsys.readouterr()
    assert speech_of(folder, short_manifest, *flags, "--html", tmp_path / "page.html") == 1
    captured = capsys.readouterr()
    assert "optimized is blank where float32 has words: in 'joined to 30 s'" in captured.err
    assert "has words there" in captured.out
    by_engine = {row["engine"]: row for row in json.loads(results.read_text())["results"] if len(row["clips"]) > 1}
    (blank,) = by_engine["optimized"]["blank"]
    assert 8 <= blank["start"] < blank["end"] <= 15
    assert blank["speech"] > 3
    assert blank["reference_has_words"]
    assert by_engine["float32"]["blank"] == []
    page = (tmp_path / "page.html").read_text()
    assert f"blank {blank['start']:.1f} to {blank['end']:.1f} s" in page


@pytest.mark.slow
def test_genai_itself_under_stress(unquantized, ruined, short_manifest, tmp_path, only):
    """GenAI has the words of plain ONNX Runtime, and loses those that the ruined folder loses."""
    only("1 s of silence around", "joined to 120 s")
    results = tmp_path / "stress.json"
    flags = ("--stress", "silence", "join", "--json", results)
    assert speech_of(unquantized, short_manifest, *flags, "--engines", "genai,onnx") == 0
    rows = json.loads(results.read_text())["results"]
    texts = {(row["engine"], row["condition"], *row["clips"]): row["transcript"] for row in rows}
    of_genai = {key: text for key, text in texts.items() if key[0].endswith(", GenAI")}
    assert {key[0] for key in of_genai} == {"float32, GenAI", "optimized, GenAI"}
    assert {key[1] for key in of_genai} == {"as it is", "1 s of silence around", "joined to 120 s"}
    assert of_genai == {(engine, *rest): texts[engine.removesuffix(", GenAI"), *rest] for engine, *rest in of_genai}
    assert {row["blank"] is None for row in rows if row["engine"].endswith(", GenAI")} == {True}  # it has no times
    assert {row["blank"] is None for row in rows if row["engine"] == "optimized"} == {False}
    limit = ("--stress", "silence", "--engines", "genai", "--max_lost_words", 2, "--json", results)
    assert speech_of(ruined, short_manifest, *limit) == 1
    assert {row["engine"] for row in json.loads(results.read_text())["results"]} == {"float32", "optimized"}


@pytest.mark.slow
def test_the_seed_gives_the_same_results(tiny_export, short_manifest, tmp_path, only):
    only("white noise, 5 dB", "babble, 5 dB")
    texts = []
    for number, seed in enumerate((3, 3, 4)):
        results = tmp_path / f"{number}.json"
        assert speech_of(tiny_export, short_manifest, "--stress", "noise", "--seed", seed, "--json", results) == 0
        texts.append([row["transcript"] for row in json.loads(results.read_text())["results"]])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.slow
def test_joined_clips_show_what_seams_cost(unquantized, short_manifest, tmp_path, capsys, only):
    only("joined to 30 s", "joined to 120 s")
    results = tmp_path / "stress.json"
    assert speech_of(unquantized, short_manifest, "--stress", "join", "--json", results) == 0
    assert "seams of windows of 60 s: float32 has" in capsys.readouterr().out
    rows = json.loads(results.read_text())["results"]
    long = [row for row in rows if row["condition"] == "joined to 120 s"]
    assert {row["engine"] for row in long} == {"float32", "float32, one window", "optimized", "optimized, one window"}
    assert {row["engine"] for row in rows if row["condition"] == "joined to 30 s"} == {"float32", "optimized"}
    assert all(len(row["clips"]) > 20 for row in long)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--max_lost_words", "1"), "need --stress"),
        (("--stress", "hail"), "invalid choice: 'hail'"),
        (("--stress", "--srt", "a.srt"), "--srt cannot be combined with --stress"),
        (("--stress", "--max_lost_words", "-1"), "0 or more"),
        (("--stress", "--max_lost_words", "1"), "is alone"),
    ],
)
def test_flags_that_do_not_go_together(tiny_export, argv, message, capsys):
    assert message in rejected(
        capsys, test_real_speech, "--model_dir", tiny_export, "--skip_nemo", "--audio", CLIPS[0], *argv
    )


@pytest.mark.slow
def test_the_gate_of_an_optimization(tiny_export, short_manifest, tmp_path, only, monkeypatch, capsys):
    """The folder is not written where the optimized model loses words under stress alone."""
    only("0.5 s of silence around", "1 s of silence around")
    argv = ["--model_dir", str(tiny_export), "--skip_quantization", "--skip_fusion"]
    argv += ["--eval_manifest", str(short_manifest), "--max_wer_increase", "0"]
    under_stress = ["--stress", "silence", "--max_lost_words", "2"]
    good = tmp_path / "good"
    assert optimize_encoder.main([*argv, *under_stress, "--output_dir", str(good)]) == 0
    rows = json.loads((good / REPORT_JSON).read_text())["stress"]
    assert {row["engine"] for row in rows} == {"float32", "optimized"}
    assert all(row["points"] == 0 for row in rows if row["engine"] == "optimized")

    def save_ruined(model, path, **how):
        save_model(model, path, **how)
        ruin_silence(path.parent)

    monkeypatch.setattr(optimize, "save_model", save_ruined)
    assert optimize_encoder.main([*argv, "--output_dir", str(tmp_path / "unseen")]) == 0
    capsys.readouterr()
    assert optimize_encoder.main([*argv, *under_stress, "--output_dir", str(tmp_path / "seen")]) == 1
    assert "under stress optimized misses more words" in capsys.readouterr().err
    assert not (tmp_path / "seen").exists()
