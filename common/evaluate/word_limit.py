"""How many words an optimized folder loses: the rise of its word error rate is measured and held to a limit.

The optimized folder and the float32 folder transcribe the same clips. Both run in plain ONNX Runtime by GenAI's greedy
rule, on the features of GenAI's processor, for which the optimized folder is also loaded in GenAI. NeMo is not needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.cli import CheckError, progress, warn
from common.evaluate.blanks import Flaws, flaws_table, print_flaws
from common.evaluate.compare import ComparedClip, Comparison
from common.evaluate.engines import OpenFolder, Recording, onnx_engine
from common.evaluate.stress import FLOAT32, OPTIMIZED
from common.evaluate.words import (
    MAX_PRINTED_CLIPS,
    WordErrorRate,
    changes_text,
    normalize,
    print_warnings,
    word_error_rate,
    word_errors,
)
from common.quantize.fidelity import sqnr_db
from common.quantize.methods import OptimizeOptions
from common.run.audio import Clip, read_clips, shared_clips
from common.run.config import RuntimeConfig
from common.run.decode import Transcript
from common.run.ort import MAPPED


def read_speech_manifests(
    options: OptimizeOptions, source: Path, speech_folder: str | None
) -> tuple[list[Clip], list[Clip]]:
    """The clips of --calibration_manifest and of --eval_manifest, none where there is no manifest.

    Called before the work: raises ValueError where no folder's runtime computes their features, or no text has a word,
    and as read_clips and check_clips do. Warns of clips in both, since a model does better on what it was fitted to.
    """
    if speech_folder is None and (options.calibration_manifest or options.eval_manifest):
        raise ValueError(
            f"--calibration_manifest and --eval_manifest need a folder for genai, which computes the features, and "
            f"{source} has none; export with --runtime all"
        )
    calibration = read_clips(options.calibration_manifest) if options.calibration_manifest else []
    evaluation = read_clips(options.eval_manifest, with_text=True) if options.eval_manifest else []
    if evaluation and not any(normalize(clip.text or "") for clip in evaluation):
        raise ValueError(f"the texts of {options.eval_manifest} have no word to count errors by; add texts")
    if speech_folder is not None:
        RuntimeConfig.read(source / speech_folder).check_clips((*calibration, *evaluation))
    if shared := shared_clips(evaluation, calibration):
        warn(
            f"{len(shared)} of {len(evaluation)} clips of --eval_manifest are in --calibration_manifest too, such as "
            f"{shared[0].name}; the word error rate on them is better than on other speech"
        )
    return calibration, evaluation


@dataclass
class EvaluatedClip:
    """One clip and the transcripts of both folders. The names of the fields are keys of the report's JSON."""

    name: str
    lang: str | None
    seconds: float  # of audio
    text: str
    float32: str
    optimized: str
    sqnr_db: float | None  # of the encoder's output; None where both are equal
    flaws: dict[str, Flaws] = field(default_factory=dict)  # of both transcripts
    errors: tuple[int, int] = field(init=False)  # of float32 and of the optimized model, without case and punctuation

    def __post_init__(self) -> None:
        text, before, after = map(normalize, (self.text, self.float32, self.optimized))
        self.errors = word_errors(text, before)[0], word_errors(text, after)[0]


@dataclass(frozen=True)
class WordErrors:
    """Word error rates over all clips, or over the clips of one language; `increase` in percentage points."""

    lang: str | None
    clips: int
    float32: WordErrorRate
    optimized: WordErrorRate
    increase: WordErrorRate

    def __str__(self) -> str:
        rise = self.increase
        if not rise.words:
            return f"WER {self.float32} → {self.optimized}  of no words"
        points = f"{rise.percent:+.2f} points [{rise.low:+.2f}, {rise.high:+.2f}]"
        return f"WER {self.float32} → {self.optimized}  {points} of {rise.words} words"


def compare_words(
    exported: Path, optimized: Path, manifest: Path, clips: Sequence[Clip]
) -> tuple[Comparison, list[EvaluatedClip]]:
    """Transcribe the clips of `manifest`, which have texts, with both folders. Each folder's own tokenizer spells its
    tokens, and GenAI's tokenizer spells the optimized one's, so that words that a tokenizer loses are counted.

    The float32 weights stay in their data file, since both models are in memory at once; the optimized one is small.
    Raises CheckError where the optimized model gives no numbers, and as GenAI and Comparison.transcribe do.
    """
    before, after = OpenFolder(exported, MAPPED), OpenFolder(optimized)
    after.pieces = replace(after.pieces, spell=after.genai.text)
    engine = onnx_engine(OPTIMIZED, after)

    def transcribe(recordings: Sequence[Recording]) -> list[Transcript]:
        try:
            return engine.transcribe(recordings)
        except ValueError as error:
            raise CheckError(f"the optimized model fails on speech that float32 transcribes: {error}") from error

    comparison = Comparison(
        clips=[ComparedClip(**vars(clip)) for clip in clips],
        folders=[after, before],
        engines=[onnx_engine(FLOAT32, before), replace(engine, transcribe=transcribe)],
    )
    evaluated = []
    frames: list[np.ndarray] = []  # [S, D] of both, the windows of each one after the other
    before.onnx.kept, after.onnx.kept = [], []
    for (clip,), own in progress(comparison.transcribe(), total=2 * len(clips), task="transcribing", unit="transcript"):
        assert own.folder, "a folder runs"
        frames.append(np.concatenate(own.folder.onnx.kept or []))
        own.folder.onnx.kept = []
        if own.name == FLOAT32:
            continue
        ratio = sqnr_db(*frames)
        frames = []
        # Without the folders above the manifest, so that a report shows no home directory.
        inside = clip.path.is_relative_to(manifest.parent)
        place = clip.path.relative_to(manifest.parent).as_posix() if inside else clip.path.name
        evaluated.append(
            EvaluatedClip(
                place + clip.segment,
                clip.lang,
                round(clip.seconds, 3),
                clip.text or "",
                clip.transcripts[FLOAT32].text,
                clip.transcripts[OPTIMIZED].text,
                round(ratio, 2) if math.isfinite(ratio) else None,
                clip.flaws,
            )
        )
    before.onnx.kept = after.onnx.kept = None
    return comparison, evaluated


def word_table(clips: list[EvaluatedClip], write: Callable[[str], str] = normalize) -> list[WordErrors]:
    """Error rates over all clips, then by language where clips have one; `write` is applied to texts to compare."""
    table = []
    for lang in (None, *sorted({clip.lang for clip in clips if clip.lang is not None})):
        own = [clip for clip in clips if lang in (None, clip.lang)]
        written = [[write(text) for text in (clip.text, clip.float32, clip.optimized)] for clip in own]
        texts, before, after = (list(each) for each in zip(*written, strict=True))
        rates = word_error_rate(texts, before), word_error_rate(texts, after), word_error_rate(texts, after, before)
        table.append(WordErrors(lang, len(own), *rates))
    return table


def changed(clips: list[EvaluatedClip]) -> list[EvaluatedClip]:
    """The clips whose two transcripts differ, those with most additional errors first."""
    differing = [clip for clip in clips if clip.float32 != clip.optimized]
    return sorted(differing, key=lambda clip: clip.errors[0] - clip.errors[1])


def print_word_errors(table: list[WordErrors], clips: list[EvaluatedClip]) -> None:
    """A line for each language, and one for each clip that changed: [old → new], with its errors before and after."""
    for row in table[1:]:
        print(f"  {row.lang}: {row.clips} clips  {row}")
    texts = {f"the {name} model": [getattr(clip, name) for clip in clips] for name in (FLOAT32, OPTIMIZED)}
    print_warnings(texts, table[0].float32)
    differing = changed(clips)
    for clip in differing[:MAX_PRINTED_CLIPS]:
        before, after = clip.errors
        print(f"  {clip.name}: {before} → {after} errors  {changes_text(clip.float32, clip.optimized)}")
    if len(differing) > MAX_PRINTED_CLIPS:
        print(f"  and {len(differing) - MAX_PRINTED_CLIPS} more clips, which are in the report")
    print_flaws(flaws_table(((clip.name, clip.flaws) for clip in clips), "float32"))


def judge(table: list[WordErrors], limit: float) -> None:
    """Raise CheckError if the error rate over all clips, or in one language, rises by more than `limit` points.

    A rate over all clips may hide a language that got worse, so each language is held to the limit, although a single
    word may decide where a language has few. A language whose clips are all silent has no rate; words inserted there
    count only over all clips.
    """
    beyond = [
        f"{row.increase.percent:+.2f} points{f' in {row.lang}' if row.lang else ''} "
        f"({row.increase.errors} of {row.increase.words} words)"
        for row in table
        if row.increase.words and row.increase.percent > limit
    ]
    if beyond:
        raise CheckError(
            f"the word error rate rises by {', '.join(beyond)}, and the limit is +{limit:g}; nothing is written "
            "(without --max_wer_increase the folder is, with a report of it)"
        )
