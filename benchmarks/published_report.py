"""What benchmarks/published.py measured, as published.json, as tables, and beside what others have published."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.published_speech import CLIPS, SETS, SpeechSet
from common.cli import CheckError, size_text
from common.evaluate.speed import machine
from common.evaluate.words import NONE, WordErrorRate, normalize, word_error_rate
from common.folder import package_versions

FLOAT32 = "float32"
FAR = 1.0  # points between the published error rate and the interval of the measured one, beyond which it is far
# The conditions in the table; published.json has all that were tested. Their names are those of common/evaluate.
STRESS = ("-40 dB", "0.5 s of silence around", "babble, 12 dB", "telephone, 8 kHz")
FLAGS_OF_CPU = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")
RTN = ("--skip_fusion",)
INT8 = ("--quant_method", "int8", "--decoder_joint_precision", "int8")
INT8_4_BITS = ("--quant_method", "int8", "--weight_bits", "4", "--calibration_manifest")
RTN_2_BITS = ("--weight_bits", "2", "--decoder_joint_precision", "int8", "--skip_fusion")
METHODS = {"rtn": RTN, "int8": INT8, "int8_4_bits": INT8_4_BITS}
TERNARY = {"rtn": RTN, "int8": INT8, "rtn_2_bits": RTN_2_BITS}  # int8 finds ternary weights without a flag
TITLES = {"int8_4_bits": "int8, 4 bits, calibrated", "rtn_2_bits": "rtn, 2 bits"}
# How the README introduces the commands of METHODS and of TERNARY.
README_TITLES = {"int8": "fastest on a CPU", "int8_4_bits": "smallest", "rtn": "default, for a CPU"}
TERNARY_TITLES = {"int8": "redux: fastest", "rtn_2_bits": "redux: least memory"}
EUROPEAN = ("en", "de", "es", "fr", "it")


@dataclass(frozen=True)
class Model:
    """A published checkpoint. An unknown one is taken for a multilingual one of the 0.6B shape."""

    parameters: float = 0.627e9
    languages: tuple[str, ...] = EUROPEAN
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: METHODS)
    published: Mapping[str, float] = field(default_factory=dict)  # word error rates in per cent, by the key of the set
    source: str = ""  # of `published`, or what is published instead

    @property
    def memory(self) -> float:
        """Bytes: NeMo, which needs 6 bytes a weight while it loads, and the encoder in plain ONNX Runtime."""
        return 1e9 + 11 * self.parameters

    def disk(self, checkpoint: float) -> float:
        """Bytes besides speech: the checkpoint, twice the float32 export while it is written, three small folders."""
        return checkpoint + (8 + 2.3) * self.parameters

    def minutes(self, hours: float, methods: int) -> float:
        """About how long it takes on 4 cores to measure so many hours of speech, by the speeds of a random model of the
        0.6B shape: NeMo 16 times real time, float32 30, quantized 60; of a short list in 20 stress conditions each."""
        share = self.parameters / Model.parameters
        spoken = 60 * hours * (1 / 16 + 2 / 30 + methods / 60)
        fixed = 10 + 4 * methods + 3 + 2 * methods
        return share * (spoken + fixed)


# From the cards: the first three by NVIDIA (without case and punctuation; LibriSpeech by the rules of the Open ASR
# Leaderboard), the others by moondream, whose cards have means over several sets only.
MODELS = {
    "nvidia/parakeet-tdt-0.6b-v3": Model(
        published={
            "librispeech-test-other": 3.59,
            "fleurs-en_us": 4.85,
            "fleurs-de_de": 5.04,
            "fleurs-es_419": 3.45,
            "fleurs-fr_fr": 5.15,
            "fleurs-it_it": 3.00,
        },
        source="NVIDIA's card",
    ),
    "nvidia/parakeet-tdt-0.6b-v2": Model(
        languages=("en",), published={"librispeech-test-other": 3.19}, source="NVIDIA's card"
    ),
    "nvidia/parakeet-tdt_ctc-110m": Model(
        parameters=0.114e9, languages=("en",), published={"librispeech-test-other": 5.2}, source="NVIDIA's card"
    ),
    "moondream/parakeet-ultra": Model(
        source="moondream's card has means only: 5.80 % on seven English sets (v3: 6.26), 9.55 % on FLEURS in 25 "
        "languages (v3: 11.62)"
    ),
    "moondream/parakeet-redux": Model(
        methods=TERNARY,
        source="moondream's card has means only: 6.55 % on seven English sets (v3: 6.26), 10.56 % on FLEURS in 25 "
        "languages (v3: 11.62)",
    ),
}


# ---- the figures


def figures(
    name: str,
    model: Model,
    sources: Mapping[str, Any],
    fetched: Mapping[str, Any],
    results: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of published.json, from the results of the steps."""
    seconds = {key: counted[CLIPS]["seconds"] for key, counted in fetched.items()}
    library = _library_name(results["reference"])
    reference = {key: _of_engine(result["output"], library) for key, result in results["reference"].items()}
    engines: dict[str, Any] = {library: _engine(reference, seconds)}
    for method, measured in results["folders"].items():
        engines[method] = {"flags": measured["flags"], **_folder(measured, results["folders"][FLOAT32], seconds)}
    published = {
        "model": name,
        "commit": sources["commit"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {**machine(), **_processor()},
        "versions": package_versions(),
        "sets": {key: {"title": SETS[key].title, "commit": SETS[key].commit, **fetched[key]} for key in fetched},
        "missing": sources["missing"],
        "export": results["export"],
        "engines": engines,
        "published": dict(model.published),
        "source": model.source,
    }
    return {**published, "far": far_from_published(published)}


def _library_name(reference: Mapping[str, Any]) -> str:
    """NeMo, or transformers."""
    names = next(iter(reference.values()))["output"]["engines"]
    return next(name for name in names if not name.startswith(("GenAI", "ONNX Runtime")))


def _of_engine(output: Mapping[str, Any], engine: str) -> dict[str, Any]:
    """An engine's transcripts and speed in what test_real_speech.py has written."""
    return {
        "texts": [clip["text"] for clip in output["clips"]],
        "transcripts": [clip["engines"][engine]["text"] for clip in output["clips"]],
        "rtfx": output["engines"][engine]["rtfx"],
    }


def _engine(by_set: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Error rates of each set, and the speed over all of them; seconds: of the clips of each set."""
    return {
        "wer": {key: _rate(_rules(SETS[key]), one["texts"], one["transcripts"]) for key, one in by_set.items()},
        "rtfx": sum(seconds.values()) / sum(seconds[key] / one["rtfx"] for key, one in by_set.items()),
    }


def _rules(speech: SpeechSet) -> Callable[[str], str]:
    """The rules by which the published error rates of a set are counted."""
    if not speech.english_rules:
        return normalize
    from whisper_normalizer.english import EnglishTextNormalizer

    rules: Callable[[str], str] = EnglishTextNormalizer()
    return rules


def _rate(rules: Callable[[str], str], texts: Sequence[str], transcripts: Sequence[str]) -> dict[str, Any]:
    rate = word_error_rate([rules(text) for text in texts], [rules(text) for text in transcripts])
    return {"errors": rate.errors, "words": rate.words, "percent": rate.percent, "low": rate.low, "high": rate.high}


def _folder(measured: Mapping[str, Any], float32: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a folder in GenAI; those of a folder that was not written are why."""
    if "speech" not in measured:
        return {"failed": measured["optimize"]["failed"]}
    by_set, before = _genai(measured), _genai(float32)
    return {
        **_engine(by_set, seconds),
        "words_changed": None if measured is float32 else _rate(normalize, _transcripts(before), _transcripts(by_set)),
        "bytes": measured["bytes"],
        **measured["load"],
        "speed": measured.get("speed"),
        "stress": _missed(measured["stress"]["output"]),
    }


def _genai(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the only engine of these runs gives for each set."""
    outputs = {key: result["output"] for key, result in measured["speech"].items()}
    return {key: _of_engine(output, next(iter(output["engines"]))) for key, output in outputs.items()}


def _transcripts(by_set: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [text for one in by_set.values() for text in one["transcripts"]]


def _missed(stress: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The words missed under each condition, in windows."""
    engine = stress["results"][0]["engine"]
    totals: dict[str, dict[str, int]] = {}
    for result in stress["results"]:
        if result["engine"] == engine:
            counts = result["against_text"]
            total = totals.setdefault(result["condition"], {"missed": 0, "words": 0})
            total["missed"] += counts["lost"] + counts["changed"]
            total["words"] += counts["words"]
    return totals


def _processor() -> dict[str, Any]:
    """What else decides speeds: the extensions of the processor, and the memory."""
    fields = dict(
        line.partition(":")[::2]
        for path in (Path("/proc/meminfo"), Path("/proc/cpuinfo"))
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    fields = {key.strip(): value.split() for key, value in fields.items()}
    flags = fields.get("flags") or fields.get("Features") or []
    return {
        "extensions": [flag for flag in FLAGS_OF_CPU if flag in flags],
        "memory": int(fields["MemTotal"][0]) * 1024,
    }


# ---- beside what is published


def far_from_published(published: Mapping[str, Any]) -> list[str]:
    """A sentence for each set whose float32 error rate is far from the published one."""
    far = []
    for key, expected in published["published"].items():
        rate = published["engines"][FLOAT32]["wer"].get(key)
        if rate is None or rate["low"] is None:
            continue
        if not rate["low"] - FAR <= expected <= rate["high"] + FAR:
            far.append(
                f"{SETS[key].title}: float32 has {_percent(rate)} of the words wrong, and {published['source']} says "
                f"{expected:.2f} %"
            )
    return far


def judge(published: Mapping[str, Any]) -> None:
    """Raise CheckError where the table is not to be trusted, or not whole."""
    problems = [f"FAR FROM WHAT IS PUBLISHED: {sentence}" for sentence in published["far"]]
    problems += [f"left out: {reason}" for reason in published["missing"].values()]
    problems += published["failed_checks"]
    if problems:
        raise CheckError(f"{'; '.join(problems)}; the table is written all the same")


# ---- tables


def markdown(published: Mapping[str, Any]) -> str:
    """A section of docs/published.md: what was measured on what, error rates, and sizes and speeds."""
    cpu = published["machine"]
    sets = published["sets"]
    counts = ", ".join(
        f"{one['title']} ({one[CLIPS]['clips']} clips, {one[CLIPS]['seconds'] / 60:.1f} min)" for one in sets.values()
    )
    versions = ", ".join(f"{name} {version}" for name, version in published["versions"].items())
    lines = [
        f"### {published['model']} on {cpu['cpu']}",
        "",
        f"{published['date']}, commit `{published['commit']}`, {cpu['cores']} cores with "
        f"{', '.join(cpu['extensions']) or 'no known extension'}, {size_text(cpu['memory'])} of memory; {versions}.",
        f"{counts}." + ("" if published["published"] or not published["source"] else f" {published['source']}."),
        "",
        *(f"**Far from what is published.** {sentence}." for sentence in published["far"]),
        *(f"**Not measured:** {reason}." for reason in published["missing"].values()),
        *(f"**A check failed.** {failure}." for failure in published["failed_checks"]),
        "",
        *_table(_error_rows(published)),
        "",
        *_table(_cost_rows(published)),
    ]
    return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before) + "\n"


def _error_rows(published: Mapping[str, Any]) -> list[list[str]]:
    engines = published["engines"]
    rows = [["WER", published["source"] if published["published"] else "published", *map(_title, engines)]]
    for key, one in published["sets"].items():
        expected = published["published"].get(key)
        rates = [engine["wer"][key] if "wer" in engine else None for engine in engines.values()]
        rows.append(
            [one["title"], NONE if expected is None else f"{expected:.2f} %"]
            + [NONE if rate is None else _percent(rate) for rate in rates]
        )
    return rows


def _cost_rows(published: Mapping[str, Any]) -> list[list[str]]:
    """A row for each engine: size, load, memory, speeds, words changed, and words missed under stress."""
    rows = [
        [
            "",
            "size",
            "load",
            "memory",
            "encoder RTFx",
            "whole RTFx",
            "words changed",
            *(f"missed: {one}" for one in STRESS),
        ]
    ]
    for name, engine in published["engines"].items():
        if "failed" in engine and "rtfx" not in engine:
            rows.append([_title(name), engine["failed"], *[NONE] * (len(rows[0]) - 2)])
            continue
        changed = engine.get("words_changed")
        rows.append(
            [
                _title(name),
                size_text(engine["bytes"]) if "bytes" in engine else NONE,
                f"{engine['load_seconds']:.1f} s" if "load_seconds" in engine else NONE,
                size_text(engine["peak_memory"]) if "peak_memory" in engine else NONE,
                _encoder_speed(engine.get("speed")),
                f"{engine['rtfx']:.1f}",
                _percent(changed) if changed else NONE,
                *(_share(engine.get("stress", {}).get(one)) for one in STRESS),
            ]
        )
    return rows


def _encoder_speed(speed: Mapping[str, Any] | None) -> str:
    """In optimize_encoder.py, where both encoders take turns."""
    if speed is None:
        return NONE
    before, after = (speed[side]["rtfx"] for side in ("exported", "optimized"))
    return f"{after:.1f} ({after / before:.2f}× float32's {before:.1f})"


def readme_rows(published: Mapping[str, Any]) -> str:
    """The rows of the README's table of encoders, by its own commands."""
    rows = []
    titles = TERNARY_TITLES if set(TERNARY) <= set(published["engines"]) else README_TITLES
    for name, title in titles.items():
        engine = published["engines"].get(name, {})
        if "bytes" not in engine:
            continue
        command = " ".join(["python optimize_encoder.py", *engine["flags"]])
        command += " clips.jsonl" if command.endswith("manifest") else ""
        speed = engine["speed"]
        ratio = f"{speed['optimized']['rtfx'] / speed['exported']['rtfx']:.2f}×" if speed else NONE
        rows.append(f"| {title} | `{command}` | {size_text(engine['bytes'])} | {ratio} |\n")
    return "".join(rows)


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _percent(rate: Mapping[str, Any]) -> str:
    return str(WordErrorRate(rate["errors"], rate["words"], rate["low"], rate["high"]))


def _share(counts: Mapping[str, int] | None) -> str:
    return f"{100 * counts['missed'] / counts['words']:.1f} %" if counts and counts["words"] else NONE


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]
