"""Several engines transcribe the same clips; the tokens of those that run in float32 are compared with a reference's.

The reference is NeMo, or transformers for a checkpoint of that format. Every engine is given the same samples. The
reference computes its own features, and plain ONNX Runtime is given those or, without a reference, GenAI's. GenAI
always computes its own.

Greedy decoding follows the largest logit, so two engines that differ by rounding alone may differ in a token where two
logits are nearly equal. The reasons that excuse a difference are listed in EXCUSES. On a quantized folder, where
rounding of the activations makes small differences larger, GenAI and plain ONNX Runtime may differ on clips that they
decode alike in float32: these are listed, with the distance of the two choices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from common.contract import PARITY_TOLERANCE
from common.evaluate.blanks import Flaws, find_flaws, flaws_table
from common.evaluate.engines import GENAI_ENGINE, ONNX_ENGINE, Engine, OpenFolder, Recording
from common.evaluate.text_rules import TextRule, comparable, text_rules
from common.evaluate.words import WordErrorRate, normalize, word_error_rate
from common.run.audio import Clip
from common.run.config import RuntimeConfig
from common.run.decode import Hypothesis, Step, TimedWord, Transcript
from common.run.reference import Reference

# So much audio at a time is sorted by length into batches: more needs less padding, and more memory, 8 MB a minute.
POOL_SECONDS = 1200


# ---- where two decodings differ

NEAR_TIE = f"the two best choices are closer than the tolerance of {PARITY_TOLERANCE:.0e}"
BLANK_ZERO = "a blank has duration 0, where the greedy rules of NeMo and GenAI differ"
NO_LIMIT = "a step was forced after the configured number of tokens on one frame, which transformers does not limit"
QUANTIZED = "on quantized weights, rounding of the features decides"  # excuses GenAI and plain ONNX Runtime

# The reasons that excuse a difference from the reference, and whether a decision just before it gives that reason.
EXCUSES: dict[str, Callable[[Step], bool]] = {
    NO_LIMIT: lambda step: step.is_forced,
    NEAR_TIE: lambda step: step.margin < PARITY_TOLERANCE,
    BLANK_ZERO: lambda step: step.blank_zero,
}


@dataclass(frozen=True)
class Difference:
    """The first difference of two decodings. The names of the fields are keys of --json."""

    index: int  # of the token among those emitted
    frame: int  # encoder frame
    expected: int | None  # token; None: the reference has ended
    actual: int | None  # token; None: the decoding has ended
    excuse: str | None  # None: nothing excuses it
    margin: float | None  # logits; between the two best choices of the nearest decision

    def __str__(self) -> str:
        """In words; tokens are counted from 1."""
        expected, actual = ("no token" if token is None else token for token in (self.expected, self.actual))
        what = f"expected {expected}, got {actual}"
        if expected == actual:
            what = f"token {expected} is emitted at another frame"
        margin = "" if self.margin is None else f" (logits {self.margin:.1e} apart)"
        place = f"token {self.index + 1} of the transcript, encoder frame {self.frame}"
        return f"{place}: {what}; {self.excuse or 'nothing excuses it'}{margin}"


def first_difference(
    expected: Transcript | Hypothesis, actual: Transcript | Hypothesis, excuses: Sequence[str] = (NEAR_TIE, BLANK_ZERO)
) -> Difference | None:
    """Compare the tokens of two decodings, of which one is a Hypothesis, and where both have them the encoder frames
    that these were emitted at; None where they are equal.

    If `actual` is a Hypothesis, its decisions between the last common token and the first different one may excuse the
    difference, by one of `excuses`.
    """
    one: Sequence[object] = expected.tokens
    other: Sequence[object] = actual.tokens
    if expected.frames is not None and actual.frames is not None:
        one = list(zip(expected.tokens, expected.frames, strict=True))
        other = list(zip(actual.tokens, actual.frames, strict=True))
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    index = next((i for i, (own, its) in pairs if own != its), min(len(one), len(other)))
    traced = actual if isinstance(actual, Hypothesis) else expected
    assert isinstance(traced, Hypothesis), "a Hypothesis knows its decisions"
    places = [i for i, step in enumerate(traced.steps) if step.token != traced.blank_id]
    begin = places[index - 1] if index else 0  # that token's duration is one of the decisions
    end = places[index] + 1 if index < len(places) else len(traced.steps)
    decisions = traced.steps[begin:end]
    frames = [each.frames[index] for each in (expected, actual) if each.frames and index < len(each.frames)]
    reasons = (reason for reason in excuses if any(map(EXCUSES[reason], decisions)))
    return Difference(
        index,
        frames[0] if frames else decisions[-1].frame,
        expected.tokens[index] if index < len(expected.tokens) else None,
        actual.tokens[index] if index < len(actual.tokens) else None,
        excuse=next(reasons, None) if traced is actual else None,
        margin=min((step.margin for step in decisions), default=None),
    )


# ---- the comparison


@dataclass
class ComparedClip(Clip):
    """One clip with what the engines have made of it, by the names of the engines."""

    seconds: float = 0.0  # of audio
    one_window: bool = True  # whether the encoder is given the whole clip at once, as the reference's is
    transcripts: dict[str, Transcript] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)  # of float32 engines from their reference
    draws: dict[str, Difference] = field(default_factory=dict)  # of GenAI from plain ONNX Runtime, on quantized folders
    flaws: dict[str, Flaws] = field(default_factory=dict)  # of each engine's transcript


@dataclass(eq=False, kw_only=True)
class Comparison:
    """The clips and the engines of a comparison."""

    clips: Sequence[ComparedClip]
    folders: Sequence[OpenFolder]  # the one that is asked for first
    engines: Sequence[Engine]  # in the order of engines_of
    reference: Reference | None = None
    batch_size: int = 1  # of plain ONNX Runtime

    @property
    def config(self) -> RuntimeConfig:
        """The numbers of decoding, which all folders share."""
        return self.folders[0].config

    @cached_property
    def rules(self) -> Sequence[TextRule]:
        """The rules by which the reference's text may differ from a folder's."""
        return text_rules(self.reference.sentencepiece_model, self.reference.name) if self.reference else ()

    @property
    def by_folder(self) -> list[tuple[OpenFolder, Engine | None, Engine | None]]:
        """Each folder with its engines, GenAI and plain ONNX Runtime; None for one that does not run."""
        found = [{each.kind: each for each in self.engines if each.folder is folder} for folder in self.folders]
        own = ((each.get(GENAI_ENGINE), each.get(ONNX_ENGINE)) for each in found)
        return [(folder, *engines) for folder, engines in zip(self.folders, own, strict=True)]

    @property
    def timed_reference(self) -> str | None:
        """The engine with whose words blank stretches are compared: the reference or, without one, plain ONNX Runtime
        in float32."""
        if self.reference:
            return self.reference.name
        return next((onnx.name for folder, _, onnx in reversed(self.by_folder) if onnx and folder.is_float32), None)

    @property
    def flaws_table(self) -> list[tuple[str, ...]]:
        """The flaws of all transcripts, as flaws_table gives them."""
        return flaws_table(((clip.label, clip.flaws) for clip in self.clips), self.timed_reference)

    def transcribe(self) -> Iterator[tuple[list[ComparedClip], Engine]]:
        """Let each engine in turn transcribe the clips, one at a time or in pools to make batches from.

        Yields a pool whenever an engine has transcribed it; where that was the last engine, its differences are known
        as well. Raises as RuntimeConfig.read_clip and Engine.transcribe do.
        """
        features_by = self.reference or self.folders[0].genai
        clips: list[ComparedClip] = []  # of the pool
        recordings: list[Recording] = []
        for clip in self.clips:
            samples = self.config.read_clip(clip)
            clip.seconds = len(samples) / self.config.sample_rate
            clip.one_window = clip.seconds <= self.config.window_seconds
            clips.append(clip)
            recordings.append(Recording(samples, features_by))
            is_full = self.batch_size == 1 or sum(each.seconds for each in clips) >= POOL_SECONDS
            if not is_full and clip is not self.clips[-1]:
                continue
            for engine in self.engines:
                for own, transcript in zip(clips, engine.transcribe(recordings), strict=True):
                    own.transcripts[engine.name] = transcript
                if engine is self.engines[-1]:
                    for own, recording in zip(clips, recordings, strict=True):
                        self._find_differences(own, recording)
                yield clips, engine
            clips, recordings = [], []

    def _find_differences(self, clip: ComparedClip, recording: Recording) -> None:
        """Compare float32 engines with the reference, or without one GenAI with plain ONNX Runtime. On quantized
        folders GenAI is compared with plain ONNX Runtime. Find the flaws of all transcripts.

        GenAI computes its own features, so where its tokens are not the reference's, it is compared with plain ONNX
        Runtime on those features by GenAI's rule, and that result with the reference. The reference decodes a clip
        whole and may well decode it differently than in windows, so it is no reference for a clip of several windows.
        """
        library = self.reference
        expected = clip.transcripts[library.name] if library and clip.one_window else None
        pairs: list[tuple[Engine, Transcript | Hypothesis, Transcript | Hypothesis]] = []  # which must be equal
        for folder, genai, onnx in self.by_folder:
            traced = clip.transcripts[onnx.name].hypothesis if onnx else None
            if onnx and traced and expected and folder.is_float32:
                pairs.append((onnx, expected, traced))
            if not genai:
                continue
            made = clip.transcripts[genai.name]
            if not folder.is_float32:
                if traced and (draw := first_difference(traced, made)):
                    clip.draws[genai.name] = replace(draw, excuse=QUANTIZED)
            elif library is None:
                if traced:  # in batches, which round differently, near ties are excused
                    pairs.append((genai, traced, made) if self.batch_size == 1 else (genai, made, traced))
            elif (traced or expected) and made.tokens != (expected.tokens if expected else None):
                own = folder.onnx.transcribe(folder.genai.features(recording.samples))
                pairs += [(genai, own, made), *([(genai, expected, own)] if expected else [])]
        excuses = (NEAR_TIE, BLANK_ZERO) if library is None or library.limits_symbols else tuple(EXCUSES)
        for engine, one, other in pairs:
            difference = first_difference(one, other, excuses)
            # Only the reference's own decisions excuse a difference: where a broken graph gives equal logits, each of
            # its decisions is a near tie. A step is forced only after tokens that the reference has as well.
            if library and difference and difference.excuse not in (None, NO_LIMIT):
                own_difference = first_difference(other, library.trace(recording.features))
                difference = replace(difference, excuse=own_difference.excuse if own_difference else None)
            if difference:
                clip.differences.setdefault(engine.name, difference)
        pieces, reference = self.folders[0].pieces, self.timed_reference
        clip.flaws = find_flaws(
            recording.samples, clip.transcripts, pieces, self.config, reference=reference, text=clip.text
        )

    @cached_property
    def figures(self) -> dict[str, dict[str, Any]]:
        """The figures of each engine over all clips, by their keys in --json; a figure is left out where there is
        nothing to compare with. The keys say nemo for any reference."""
        return {engine.name: self._figures_of(engine.name) for engine in self.engines}

    def _figures_of(self, engine: str) -> dict[str, Any]:
        made = [clip.transcripts[engine] for clip in self.clips]
        audio_seconds = sum(clip.seconds for clip in self.clips)
        seconds = sum(transcript.seconds for transcript in made)
        features_seconds = sum(transcript.features_seconds for transcript in made)
        texts = [(clip.text, own.text) for clip, own in zip(self.clips, made, strict=True) if clip.text is not None]
        figures: dict[str, Any] = {
            "rtfx": audio_seconds / seconds,  # seconds of audio that are transcribed in one second
            "rtfx_without_features": audio_seconds / (seconds - features_seconds),
            "wer": _error_rate(texts),
            "normalised_wer": _error_rate([(normalize(text), normalize(transcript)) for text, transcript in texts]),
        }
        if self.reference and engine != self.reference.name:
            texts_of: dict[bool, list[tuple[str, str]]] = {True: [], False: []}  # by whether the clip has one window
            differing = 0
            for clip, own in zip(self.clips, made, strict=True):
                expected = clip.transcripts[self.reference.name]
                texts_of[clip.one_window].append(comparable(expected.text, own.text, self.rules))
                differing += clip.one_window and expected.tokens != own.tokens
            figures |= {
                "clips_compared": len(texts_of[True]),
                "clips_of_several_windows": len(texts_of[False]),
                "clips_differing_from_nemo": differing,
                "wer_against_nemo": _error_rate(texts_of[True]),
                "wer_against_nemo_of_several_windows": _error_rate(texts_of[False]),
            }
        return {key: value for key, value in figures.items() if value is not None}

    def words(self, clip: ComparedClip) -> list[TimedWord]:
        """The words of a clip with their times, by plain ONNX Runtime on the first folder."""
        _, _, onnx = self.by_folder[0]
        return (clip.transcripts[onnx.name].words or []) if onnx else []

    def as_json(self) -> dict[str, Any]:
        """Every transcript, figure and difference, for --json."""

        def place(clip: Clip) -> dict[str, Any]:
            return {"audio_filepath": str(clip.path), "offset": clip.offset}

        return {
            "engines": {
                engine: {key: asdict(x) if isinstance(x, WordErrorRate) else x for key, x in figures.items()}
                for engine, figures in self.figures.items()
            },
            "clips": [
                {
                    **place(clip),
                    "duration": clip.seconds,
                    "text": clip.text,
                    "engines": {
                        name: {**self._transcript_json(made), **asdict(clip.flaws[name])}
                        for name, made in clip.transcripts.items()
                    },
                }
                for clip in self.clips
            ],
            **{
                found: [
                    {**place(clip), "engine": engine, **asdict(each)}
                    for clip in self.clips
                    for engine, each in getattr(clip, found).items()
                ]
                for found in ("differences", "draws")
            },
        }

    def _transcript_json(self, transcript: Transcript) -> dict[str, Any]:
        words = [
            {
                "text": word.text,
                "start": round(word.start * self.config.frame_seconds, 3),
                "end": round(word.end * self.config.frame_seconds, 3),
                **({name: round(x, 4) for name, x in asdict(word.confidence).items()} if word.confidence else {}),
            }
            for word in transcript.words or ()
        ]
        shown = {key: getattr(transcript, key) for key in ("tokens", "text", "seconds", "features_seconds")}
        return {**shown, "words": None if transcript.words is None else words}


def _error_rate(pairs: Sequence[tuple[str, str]]) -> WordErrorRate | None:
    """The error rate over pairs of a reference and a transcript; None without pairs."""
    return word_error_rate([one for one, _ in pairs], [other for _, other in pairs]) if pairs else None
