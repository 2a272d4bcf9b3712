"""Manifests: which clips they name, which part of each file, and what is rejected before the work begins."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

import optimize_encoder
import test_real_speech
from common.evaluate.words import WordErrorRate, word_error_rate
from common.run.audio import LANGUAGE_KEYS, Clip, check_audio, load_clip, read_clips, shared_clips
from common.run.config import RuntimeConfig
from tests.helpers import SAMPLES, rejected, run_python

CLIPS = sorted((SAMPLES / "clips").glob("*.flac"))[:3]
FORMATS = (
    ("wav", "PCM_16"), ("wav", "FLOAT"), ("wav", "IMA_ADPCM"), ("flac", None), ("ogg", "VORBIS"), ("ogg", "OPUS"),
    ("mp3", None), ("aiff", None),
)  # fmt: skip


def manifest_of(path, *rows, encoding="utf-8", newline="\n"):
    path.write_bytes(newline.join(map(json.dumps, rows)).encode(encoding))
    return path


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """Three clips one after the other with a second of silence between them: the file, and where each lies in it."""
    parts, places, position = [], [], 0
    for path in CLIPS:
        samples, rate = soundfile.read(path, dtype="float32")
        places.append((position / rate, len(samples) / rate))
        parts += [samples, np.zeros(rate, np.float32)]
        position += len(samples) + rate
    path = tmp_path_factory.mktemp("joined") / "joined.flac"
    soundfile.write(path, np.concatenate(parts), rate)
    return path, places


class TestSegments:
    @pytest.mark.parametrize(("suffix", "subtype"), FORMATS)
    @pytest.mark.parametrize("channels", [1, 2])
    @pytest.mark.parametrize("rate", [16000, 48000])
    def test_are_the_samples_of_the_file_decoded_whole(self, suffix, subtype, rate, channels, tmp_path):
        """The reference decodes the file from its start in one go, and cuts by index; a seek is never made."""
        samples, source = soundfile.read(SAMPLES / "jfk.wav", dtype="float32")
        path = tmp_path / f"clip.{suffix}"
        samples = soxr.resample(samples, source, rate)
        soundfile.write(path, np.stack([samples, 0.5 * samples], axis=1)[:, :channels], rate, subtype=subtype)
        with soundfile.SoundFile(path) as file:
            file.seekable = lambda: False
            whole = file.read(file.frames, dtype="float32", always_2d=True).mean(axis=1)
        for offset, duration in ((0, 1.5), (0.123, 2.0), (0.7715625, 1.7285), (3.9, 4.05), (7.25, None)):
            end = None if duration is None else round((offset + duration) * rate)
            expected = whole[round(offset * rate) : end]
            expected = expected if rate == 16000 else soxr.resample(expected, rate, 16000)
            found = load_clip(Clip(path, offset=float(offset), duration=duration), 16000, 1)
            np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_only_the_part_is_read(self, tmp_path, monkeypatch):
        """Two seconds of an hour: where the format has an index of samples, nothing else is decoded."""
        path = tmp_path / "hour.wav"
        soundfile.write(path, np.tile(np.sin(np.arange(8000) / 9), 3600), 8000, subtype="PCM_U8")
        read = soundfile.SoundFile.read
        frames = []
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: frames.append(len(x := read(*a, **k))) or x)
        assert len(load_clip(Clip(path, offset=3000.0, duration=2.0), 8000, 1)) == 16_000
        assert sum(frames) == 16_000

    @pytest.mark.parametrize("duration", ["equal", "rounded", "none"])
    def test_a_duration_that_is_the_files_means_the_whole(self, duration):
        samples, rate = soundfile.read(CLIPS[0], dtype="float32")
        seconds = {"equal": len(samples) / rate, "rounded": round(len(samples) / rate, 1), "none": None}[duration]
        np.testing.assert_array_equal(load_clip(Clip(CLIPS[0], duration=seconds), rate, 1), samples)

    @pytest.mark.parametrize(("offset", "duration"), [(0.0, 2.2), (1.5, 1.0), (5.0, None), (2.0, 0.3), (1e8, 1.0)])
    def test_outside_of_the_file_are_rejected(self, offset, duration, tmp_path):
        path = tmp_path / "clip.wav"
        soundfile.write(path, np.ones(32_000), 16000)
        for check in (check_audio, load_clip):
            with pytest.raises(ValueError, match=r"clip\.wav \[\S+ s\] has \S+ s of audio, and needs at least \S+ s"):
                check(Clip(path, offset=offset, duration=duration), 16000, 1)

    def test_of_a_file_that_is_cut_are_rejected_and_not_shortened(self, tmp_path):
        path = tmp_path / "clip.flac"
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 160_000), 16000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"clip\.flac"):
            load_clip(Clip(path, offset=4.0, duration=4.0), 16000, 1)

    @pytest.mark.parametrize("suffix", ["wav", "mp3", "mp3 with a tag", "flac"])
    def test_whole_files_that_are_cut_are_warned_of_once(self, suffix, tmp_path, capsys):
        suffix, _, tag = suffix.partition(" ")
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        soundfile.write(whole, np.random.default_rng(0).normal(0, 0.1, 160_000), 16000)
        content = whole.read_bytes()
        if tag:
            content = b"ID3\3\0\0\0\0\2\0" + bytes(256) + content
            whole.write_bytes(content)
        cut.write_bytes(content[: len(content) // 2])
        assert len(load_clip(Clip(whole), 16000, 1)) == 160_000
        assert capsys.readouterr().err == ""
        if suffix == "flac":  # a frame that is cut is an error of the decoder
            with pytest.raises(ValueError, match=r"cut\.flac"):
                load_clip(Clip(cut), 16000, 1)
            return
        for _ in range(2):
            assert 70_000 < len(load_clip(Clip(cut), 16000, 1)) < 90_000
        warning = capsys.readouterr().err
        assert warning.startswith(f"warning: {cut} ends early: its header states 10.0 s of audio, and ")
        assert warning.count("\n") == 1

    def test_the_warning_of_a_file_that_is_cut_is_printed(self, tmp_path):
        """In a process of its own, since what libsndfile's decoders print is hidden while a file is read."""
        soundfile.write(tmp_path / "cut.wav", np.ones(16_000) / 2, 16000)
        os.truncate(tmp_path / "cut.wav", 20_000)
        done = run_python(
            "import sys; from pathlib import Path; from common.run.audio import Clip, load_clip; "
            "load_clip(Clip(Path(sys.argv[1])), 16000, 1)",
            tmp_path / "cut.wav",
        )
        assert done.stderr.startswith(f"warning: {tmp_path / 'cut.wav'} ends early: its header states 1.0 s of audio")

    def test_a_file_that_is_cut_behind_its_header_is_too_short(self, tmp_path):
        soundfile.write(tmp_path / "cut.wav", np.ones(16_000) / 2, 16000)
        os.truncate(tmp_path / "cut.wav", 44)
        for read in (check_audio, load_clip):
            with pytest.raises(ValueError, match=r"cut\.wav has 0.000 s of audio, and needs at least"):
                read(Clip(tmp_path / "cut.wav"), 16000, 1)

    @pytest.mark.parametrize("sizes", [(None, 0), (0, 0), (2**32 - 1, 2**32 - 1), (2**31 - 1, 2**31 - 37)])
    def test_wav_files_whose_header_does_not_know_their_length_are_read_to_the_end(self, sizes, tmp_path, capsys):
        """Their recorder was stopped, or wrote to a pipe."""
        samples = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
        path = tmp_path / "clip.wav"
        soundfile.write(path, samples, 16000)
        expected, content = load_clip(Clip(path), 16000, 1), bytearray(path.read_bytes())
        for place, size in zip((4, 40), sizes, strict=True):
            if size is not None:
                struct.pack_into("<I", content, place, size)
        path.write_bytes(content)
        assert check_audio(Clip(path), 16000, 1) == 1.0
        np.testing.assert_array_equal(load_clip(Clip(path), 16000, 1), expected)
        assert path.read_bytes() == content
        assert capsys.readouterr().err == ""

    def test_a_file_of_the_name_of_the_standard_input_is_that_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        soundfile.write("clip.wav", np.ones(16_000) / 2, 16000)
        Path("clip.wav").rename("-")
        for place in (Path("-"), Path("./-")):
            assert check_audio(Clip(place), 16000, 1) == 1.0
            assert len(load_clip(Clip(place), 16000, 1)) == 16_000

    def test_are_transcribed_by_every_engine_as_their_own_files_are(self, joined, tiny_export, tmp_path, capsys):
        """In NeMo's manifests each line names its part; reading the whole file for each would triple the words."""
        path, places = joined
        alone = manifest_of(tmp_path / "alone.jsonl", *({"audio_filepath": str(clip)} for clip in CLIPS))
        rows = [{"audio_filepath": str(path), "offset": at, "duration": long} for at, long in places]
        segments = manifest_of(tmp_path / "segments.jsonl", *rows)
        found = {}
        for manifest in (alone, segments):
            result = tmp_path / f"{manifest.stem}.json"
            argv = ("--model_dir", tiny_export, "--skip_nemo", "--manifest", manifest, "--json", result)
            assert test_real_speech.main([*map(str, argv)]) == 0
            clips = json.loads(result.read_text())["clips"]
            found[manifest.stem] = [[engine["text"] for engine in clip["engines"].values()] for clip in clips]
        assert found["segments"] == found["alone"]
        assert all(text for texts in found["alone"] for text in texts)
        assert f"{path} [0–{places[0][1]:g} s]" in capsys.readouterr().out


class TestManifests:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", "\r\n \r\n"])
    def test_with_byte_order_marks_and_any_line_ends_are_read(self, encoding, newline, tmp_path):
        rows = [
            {"audio_filepath": "a.flac", "text": "Ça va"},
            {"audio_filepath": "b.flac", "offset": 1, "duration": 2.5},
        ]
        path = manifest_of(tmp_path / "m.jsonl", *rows, encoding=encoding, newline=newline)
        first, second = read_clips(path)
        assert (first.path, first.text, first.offset, first.duration) == (tmp_path / "a.flac", "Ça va", 0, None)
        assert (second.offset, second.duration) == (1, 2.5)
        assert first.line == f"{path}:1"

    @pytest.mark.parametrize("key", LANGUAGE_KEYS)
    def test_name_the_language_of_a_text_as_nemos_do(self, key, tmp_path):
        row = {"audio_filepath": "a.flac", "text": "Ça va", "source_lang": "en", key: "fr"}
        assert [clip.lang for clip in read_clips(manifest_of(tmp_path / "m.jsonl", row))] == ["fr"]

    def test_a_duration_without_an_offset_describes_the_whole_file(self, tiny_export, tmp_path, capsys):
        """Manifests of corpora have a duration in each line, which is not always that of the file."""
        length = soundfile.info(CLIPS[0]).duration
        row = {"audio_filepath": str(CLIPS[0])}
        rows = [
            {**row, "duration": length + 0.7},
            {**row, "duration": length - 0.7},
            {**row, "duration": length + 0.01},
        ]
        clips = read_clips(manifest_of(tmp_path / "m.jsonl", *rows, {**row, "offset": 0, "duration": length - 0.7}))
        config = RuntimeConfig.read(tiny_export)
        config.check_clips(clips)
        seconds = [check_audio(clip, config.sample_rate, config.min_samples) for clip in clips]
        assert seconds == pytest.approx([length, length, length, length - 0.7], abs=0.001)
        warning = capsys.readouterr().err
        assert warning.startswith(f"warning: {tmp_path / 'm.jsonl'}:1 and 1 other lines give a duration")
        whole = config.read_audio(CLIPS[0])
        assert [len(whole) - len(config.read_clip(clip)) for clip in clips] == [0, 0, 0, pytest.approx(11_200, abs=160)]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"audio_filepath": "a"}\n{"audio_filepath": "b"}'.encode("utf-16"), "is not in UTF-8"),
            ('{"audio_filepath": "a"}\n{"audio_filepath": "b"}'.encode("utf-16-le"), ":1: a line must be a JSON"),
            ('{"audio_filepath": "a"}\n{"audio_filepath": "café"}'.encode("latin-1"), "is not in UTF-8"),
            (b'{"audio_filepath": 5}', "audio_filepath must be a string, not 5"),
            (b'{"audio_filepath": ["a"]}', "audio_filepath must be a string"),
            (b'{"audio_filepath": null}', ":1: a line must be a JSON object with audio_filepath"),
            (b'{"audio_filepath": "a", "text": 5}', "text must be a string, not 5"),
            (b'{"audio_filepath": "a", "lang": 5}', "lang must be a string"),
            (b'{"audio_filepath": "a", "offset": -1}', "offset must be a number of seconds, 0 or more"),
            (b'{"audio_filepath": "a", "offset": NaN}', "offset must be a number of seconds, 0 or more, not nan"),
            (b'{"audio_filepath": "a", "duration": Infinity}', "a number of seconds, 0 or more, not inf"),
            (b'{"audio_filepath": "a", "duration": "2.5"}', "a number of seconds, 0 or more, not '2.5'"),
            (b"\n\n[1]", ":3: a line must be a JSON object"),
            (b'{"audio_filepath": "a"', ":1: a line must be a JSON object"),
            (b"\n \n", "m.jsonl lists no clip"),
        ],
    )  # fmt: skip
    def test_that_are_not_are_rejected_with_their_line(self, content, message, tmp_path):
        (tmp_path / "m.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.jsonl(:[13]: a line| is not| lists)") as error:
            read_clips(tmp_path / "m.jsonl")
        assert message in str(error.value)

    def test_need_texts_where_words_are_counted_and_an_empty_one_is_silence(self, tmp_path):
        path = manifest_of(tmp_path / "m.jsonl", {"audio_filepath": "a", "text": ""}, {"audio_filepath": "b"})
        assert [clip.text for clip in read_clips(path)] == ["", None]
        with pytest.raises(ValueError, match=r"m\.jsonl:2: b has no text"):
            read_clips(path, with_text=True)


def odd_places(folder):
    """Name → path of something that is not a regular file."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    return {"folder is not a": folder / "folder", "pipe is not a": folder / "pipe", "/dev/null is not a": "/dev/null",
            "loop": folder / "loop", "there is nothing at": folder / "none"}  # fmt: skip


class TestBeforeTheWork:
    """These faults are found before any model is loaded; loading one would raise here."""

    @pytest.fixture(autouse=True)
    def no_models(self, monkeypatch):
        def load(*_, **__):
            pytest.fail("a model was loaded")

        for place in ("common.run.genai.GenAI", "common.evaluate.engines.GenAI", "common.quantize.calibration.GenAI"):
            monkeypatch.setattr(f"{place}.__init__", load)
        for name in ("fuse", "load"):
            monkeypatch.setattr(f"common.quantize.rewrite.{name}", load)

    def commands(self, folder, manifest, audio, target):
        common = ("--model_dir", folder, "--output_dir", target)
        return {
            "audio": (test_real_speech, "--model_dir", folder, "--skip_nemo", "--audio", CLIPS[0], audio),
            "manifest": (test_real_speech, "--model_dir", folder, "--skip_nemo", "--manifest", manifest),
            "eval": (optimize_encoder, *common, "--eval_manifest", manifest),
            "calibration": (optimize_encoder, *common, "--quant_method", "int8", "--calibration_manifest", manifest),
        }

    @pytest.mark.parametrize("command", ["audio", "manifest", "eval", "calibration"])
    def test_clips_that_are_missing_too_short_or_no_files(self, command, tiny_export, tmp_path, capsys):
        short = tmp_path / "short.wav"
        soundfile.write(short, np.zeros(150), 16000)
        (tmp_path / "text.wav").write_text("that libsndfile reads")
        cases = {**odd_places(tmp_path), "0.009 s": short, "that libsndfile reads": tmp_path / "text.wav"}
        for message, path in cases.items():
            rows = [{"audio_filepath": str(path), "text": "a"} for path in (CLIPS[0], path)]
            manifest = manifest_of(tmp_path / "m.jsonl", *rows)
            script, *argv = self.commands(tiny_export, manifest, path, tmp_path / "out")[command]
            error = rejected(capsys, script, *argv)
            assert message in error
            assert (f"{manifest}:2: " in error) == (command != "audio")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["manifest", "eval", "calibration"])
    def test_segments_outside_and_manifests_that_are_no_files(self, command, tiny_export, tmp_path, capsys):
        row = {"audio_filepath": str(CLIPS[0]), "text": "a", "offset": 100}
        manifest = manifest_of(tmp_path / "m.jsonl", row)
        script, *argv = self.commands(tiny_export, manifest, None, tmp_path / "out")[command]
        error = rejected(capsys, script, *argv)
        assert f"{manifest}:1: {CLIPS[0]} [100– s] has 0.000 s of audio, and needs at least " in error
        for message, path in odd_places(tmp_path).items():
            script, *argv = self.commands(tiny_export, path, None, tmp_path / "out")[command]
            assert message in rejected(capsys, script, *argv)

    def test_texts_without_words_are_nothing_to_count(self, tiny_export, tmp_path, capsys):
        manifest = manifest_of(tmp_path / "m.jsonl", {"audio_filepath": str(CLIPS[0]), "text": ""})
        script, *argv = self.commands(tiny_export, manifest, None, tmp_path / "out")["eval"]
        assert "have no word to count errors by" in rejected(capsys, script, *argv)


def test_shared_clips_are_those_of_one_file_whose_segments_overlap(tmp_path):
    (tmp_path / "a.wav").touch()
    (tmp_path / "link.wav").symlink_to("a.wav")
    (tmp_path / "sub").mkdir()
    a, link, other = tmp_path / "sub" / ".." / "a.wav", tmp_path / "link.wav", tmp_path / "b.wav"
    calibration = [Clip(a, offset=2.0, duration=2.0)]
    for shared, clip in (
        (True, Clip(link)), (True, Clip(link, offset=3.5, duration=1.0)), (True, Clip(a, duration=2.5)),
        (False, Clip(link, offset=4.0)), (False, Clip(a, duration=2.0)), (False, Clip(other)),
    ):  # fmt: skip
        assert bool(shared_clips([clip], calibration)) is shared, clip


def test_a_manifest_that_calibrates_and_judges_is_warned_of(tiny_export, tmp_path, capsys):
    manifest = SAMPLES / "manifest.jsonl"
    both = ("--calibration_manifest", manifest, "--eval_manifest", manifest, "--quant_method", "int8")
    argv = ("--model_dir", tiny_export, "--output_dir", tmp_path / "out", *both)
    assert optimize_encoder.main([*map(str, argv)]) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: 11 of 11 clips of --eval_manifest are in --calibration_manifest too")
    assert error.count("\n") == 1


class TestWordsOfSilence:
    def test_no_words_have_no_rate(self):
        assert str(word_error_rate(["", ""], ["", ""])) == "–"
        inserted = word_error_rate(["", ""], ["one two", "three"])
        assert inserted == WordErrorRate(3, 0, None, None)
        assert str(inserted) == "– (3 inserted)"

    def test_words_in_silence_count_where_other_clips_have_words(self):
        found = word_error_rate(["", "a b c d"], ["one", "a b c d"])
        assert (found.errors, found.words, found.percent) == (1, 4, 25)
        assert (found.low, found.high) == (0, 25)  # a draw of the silent clip alone has no rate, and is left out

    def test_are_shown_as_words_and_not_per_cent(self, tiny_export, tmp_path, capsys):
        silence = tmp_path / "silence.wav"
        soundfile.write(silence, np.zeros(32_000), 16000)
        rows = ({"audio_filepath": str(path), "text": ""} for path in (silence, CLIPS[0]))
        manifest = manifest_of(tmp_path / "m.jsonl", *rows)
        argv = ("--model_dir", tiny_export, "--skip_nemo", "--manifest", manifest, "--json", tmp_path / "found.json")
        assert test_real_speech.main([*map(str, argv)]) == 0
        output = capsys.readouterr().out
        rows = list(json.loads((tmp_path / "found.json").read_text())["engines"].values())
        words = rows[0]["wer"]["errors"]
        assert words > 0
        assert all(row["wer"] == {"errors": words, "words": 0, "low": None, "high": None} for row in rows)
        assert f"– ({words} inserted)" in output
        assert "00.0" not in output


class TestChannels:
    def test_that_cancel_out_are_rejected(self, tmp_path):
        samples, rate = soundfile.read(CLIPS[0], dtype="float32")
        path = tmp_path / "clip.wav"
        for other in (-samples, -0.999 * samples):
            soundfile.write(path, np.stack([samples, other], axis=1), rate)
            with pytest.raises(ValueError, match=r"the channels of .*clip\.wav cancel each other out"):
                load_clip(Clip(path), 16000, 1)

    def test_that_do_not_are_averaged(self, tmp_path):
        samples, rate = soundfile.read(CLIPS[0], dtype="float32")
        noise = np.random.default_rng(0).normal(0, 0.1, (len(samples), 64)).astype(np.float32)
        path = tmp_path / "clip.wav"
        for channels in (
            np.stack([samples, 0 * samples], 1), np.stack([samples, -0.9 * samples], 1), 0 * noise, noise, noise[:, :1],
        ):  # fmt: skip
            soundfile.write(path, channels, rate, subtype="FLOAT")
            np.testing.assert_allclose(load_clip(Clip(path), rate, 1), channels.mean(axis=1), atol=1e-6)
