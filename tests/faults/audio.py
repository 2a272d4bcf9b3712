"""Odd sound files: each is written by a function that is named after what is odd about the file."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr

from tests.helpers import SAMPLES, TINY

SPEECH = SAMPLES / "clips" / "029_hibari.flac"

Writer = Callable[[Path], Path]
CLIPS: dict[str, Writer] = {}


def speech(rate: int = 16000) -> np.ndarray:
    samples, _ = soundfile.read(SPEECH, dtype="float32")
    return samples if rate == 16000 else soxr.resample(samples, 16000, rate)


def clip(name: str, samples: np.ndarray, rate: int = 16000, suffix: str = "wav", subtype: str | None = None) -> None:
    def write(folder: Path) -> Path:
        path = folder / f"clip.{suffix}"
        soundfile.write(path, samples, rate, subtype=subtype)
        return path

    CLIPS[name] = write


def damaged(name: str, suffix: str, change: Callable[[bytearray], bytes | None], subtype: str | None = None) -> None:
    """Speech in a format, with its bytes changed."""

    def write(folder: Path) -> Path:
        path = folder / f"clip.{suffix}"
        soundfile.write(path, speech(), 16000, subtype=subtype)
        content = bytearray(path.read_bytes())
        changed = change(content)
        path.write_bytes(content if changed is None else changed)
        return path

    CLIPS[name] = write


def raw(name: str, content: bytes, suffix: str = "wav") -> None:
    def write(folder: Path) -> Path:
        path = folder / f"clip.{suffix}"
        path.write_bytes(content)
        return path

    CLIPS[name] = write


noise = np.random.default_rng(0).standard_normal(48_000).astype(np.float32)
sine = np.sin(np.arange(48_000, dtype=np.float32) / 10)

for name, samples in {
    "0 samples": noise[:0],
    "1 sample": noise[:1],
    "10 ms": noise[:160],
    "20 ms": noise[:320],
    "silence": 0 * noise,
    "constant 0.5": 0 * noise + 0.5,
    "white noise": 0.1 * noise,
    "a click": np.eye(1, 48_000, 24_000, dtype=np.float32)[0],
    "speech clipped at 1 %": np.clip(speech(), -0.01, 0.01) * 100,
    "speech at -100 dB": speech() * 1e-5,
    "noise of ±2^31": sine * 2.0**30,
    "noise of 1e30": noise * 1e30,
    "one NaN": np.where(np.arange(48_000) == 9, np.nan, sine),
    "one infinity": np.where(np.arange(48_000) == 9, np.inf, sine),
}.items():
    clip(name, samples, subtype="FLOAT")
for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM"):
    clip(f"speech, WAV {subtype}", speech(), subtype=subtype)
for suffix in ("flac", "ogg", "mp3", "aiff", "caf"):
    clip(f"speech, {suffix}", speech(), suffix=suffix)
for rate in (8000, 22_050, 96_000, 192_000):
    clip(f"speech, {rate} Hz", speech(rate), rate)
for channels in (2, 8):
    clip(f"speech, {channels} channels", np.stack([speech()] * channels, axis=1))
clip("one channel upside down", np.stack([speech(), -speech()], axis=1))
clip("noise, 512 channels", np.tile(0.1 * noise[:16_000, None], 512))
clip("1 Hz", noise, 1)
clip("10 MHz", noise, 10_000_000)


def half_an_hour(folder: Path) -> Path:
    """30 minutes at 192 kHz in 8 channels, which take 11 GB of memory if they are read at once."""
    path = folder / "clip.w64"
    second = np.tile((100 * sine).astype(np.int16)[:, None], (4, 8))
    with soundfile.SoundFile(path, "w", 192_000, 8, "PCM_U8", format="W64") as file:
        for _ in range(1800):
            file.write(second)
    return path


CLIPS["half an hour, 192 kHz, 8 channels"] = half_an_hour

raw("empty file", b"")
raw("text", b"this is not audio" * 100)
raw("a tar", TINY.read_bytes()[:100_000], "flac")
damaged("WAV that claims 4 GB", "wav", lambda content: struct.pack_into("<I", content, 40, 2**32 - 16))
damaged("WAV that claims no samples", "wav", lambda content: struct.pack_into("<I", content, 40, 0))
damaged("WAV that claims 65535 channels", "wav", lambda content: struct.pack_into("<H", content, 22, 65535))
damaged("WAV that claims 0 channels", "wav", lambda content: struct.pack_into("<H", content, 22, 0))
damaged("WAV that claims 0 Hz", "wav", lambda content: struct.pack_into("<I", content, 24, 0))
damaged("WAV cut in half", "wav", lambda content: bytes(content[: len(content) // 2]))
damaged(
    "FLAC that claims 2^36 samples", "flac", lambda c: c.__setitem__(slice(21, 26), bytes([c[21] | 15]) + b"\xff" * 4)
)
damaged("FLAC cut in half", "flac", lambda content: bytes(content[: len(content) // 2]))
damaged("OGG cut in half", "ogg", lambda content: bytes(content[: len(content) // 2]))
damaged("MP3 cut in half", "mp3", lambda content: bytes(content[: len(content) // 2]))
# Files of which less is there than the header states, in seconds: both are in a warning, and what is there is read.
WARNED_OF = {
    "WAV cut in half": (1.9, 1.0),
    "MP3 cut in half": (1.9, 0.9),
    "fuzzed mp3, seed 7": (351.2, 1.0),
    "fuzzed mp3, seed 19": (1.0, 0.6),
    "fuzzed mp3, seed 23": (483656.7, 1.0),
    "fuzzed mp3, seed 24": (1.0, 0.8),
}


def warning_of(name: str, path: Path) -> str:
    """What is printed beside the transcript of a clip: one line, or nothing."""
    if name not in WARNED_OF:
        return ""
    stated, found = WARNED_OF[name]
    return f"warning: {path} ends early: its header states {stated} s of audio, and {found} s are there\n"


def fuzzed(folder: Path, suffix: str, seed: int) -> Path:
    """Speech in a format with up to 30 bytes overwritten, half of them in its first 200."""
    path = folder / f"clip.{suffix}"
    soundfile.write(path, speech()[:16_000], 16000)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    draw = np.random.default_rng(seed)
    places = np.where(draw.random(30) < 0.5, draw.integers(4, 200, 30), draw.integers(4, len(content), 30))
    places = places[: draw.integers(1, 30)]
    content[places] = draw.integers(0, 256, len(places))
    path.write_bytes(content.tobytes())
    return path
