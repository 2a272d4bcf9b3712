"""The data of a comparison of engines on speech: clips, their transcripts, and where two engines differ."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

from common.evaluate.differences import Difference
from common.evaluate.text_rules import TextRule, comparable, explaining_rules
from common.evaluate.wer import WordErrorRate, normalize, word_error_rate
from common.run.audio import Clip
from common.run.decode import TimedWord

NEMO = "NeMo"
TRANSFORMERS = "transformers"
REFERENCES = (NEMO, TRANSFORMERS)  # the references' names among the engines; a comparison has one of them or none


@dataclass(frozen=True)
class Transcript:
    """One engine's result on one clip."""

    tokens: list[int]
    text: str
    seconds: float  # that the engine took, features included
    words: list[TimedWord] | None = None  # where times were asked for, of the engines that give them


@dataclass
class ComparedClip(Clip):
    """One clip and its transcripts, by the name of the engine."""

    seconds: float = 0.0  # of audio
    transcripts: dict[str, Transcript] = field(default_factory=dict)
    one_window: bool = True  # whether the encoder is given the whole clip at once, as the reference's is

    @classmethod
    def of(cls, clip: Clip) -> Self:
        """`clip`, without transcripts as yet."""
        return cls(**vars(clip))

    @property
    def name(self) -> str:
        """The file, and the segment of it."""
        return f"{self.path}{self.segment}"

    @property
    def reference(self) -> str | None:
        """The name of the reference among the engines; None without one."""
        return next((name for name in REFERENCES if name in self.transcripts), None)

    @property
    def expected(self) -> Transcript:
        """The reference's transcript."""
        return self.transcripts[self.reference or NEMO]

    def texts(self, engine: str, rules: Sequence[TextRule]) -> tuple[str, str]:
        """The reference's text and the engine's, both without what differs by rule."""
        return comparable(self.expected.text, self.transcripts[engine].text, rules)

    def rules_that_explain(self, engine: str, rules: Sequence[TextRule]) -> list[str]:
        """The names of the rules by which the engine's text differs from the reference's for the same tokens."""
        other = self.transcripts[engine]
        if engine == self.reference or other.tokens != self.expected.tokens:
            return []
        return explaining_rules(self.expected.text, other.text, rules) or []


@dataclass(frozen=True)
class FolderEngines:
    """The names of the engines that run a model folder; None for one that was not chosen."""

    genai: str | None
    raw: str | None  # plain ONNX Runtime
    is_float32: bool  # whether the folder is neither quantized nor float16, so that it must equal the reference

    @property
    def names(self) -> list[str]:
        """The names of the engines that run, in their order."""
        return [name for name in (self.genai, self.raw) if name is not None]


@dataclass(frozen=True)
class EngineDifference:
    """Where a float32 engine differs from its reference on a clip."""

    clip: ComparedClip
    engine: str
    difference: Difference


@dataclass(frozen=True)
class EngineFigures:
    """One engine's figures over all clips, by their keys in --json; None where there is nothing to compare with."""

    rtfx: float  # seconds of audio that are transcribed in one second
    wer: WordErrorRate | None = None  # against the clips' texts, as written
    normalised_wer: WordErrorRate | None = None  # without case and punctuation
    clips_compared: int | None = None  # of one window, with the reference; the names below say nemo for any reference
    clips_of_several_windows: int | None = None
    clips_differing_from_nemo: int | None = None  # of those compared, with other tokens than the reference's
    wer_against_nemo: WordErrorRate | None = None  # on the clips of one window
    wer_against_nemo_of_several_windows: WordErrorRate | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison has measured, and what is needed to judge it."""

    clips: Sequence[ComparedClip]
    engines: Sequence[FolderEngines]
    differences: list[EngineDifference] = field(default_factory=list)  # collected clip by clip
    rules: Sequence[TextRule] = ()  # by which the reference's text may differ
    window_seconds: float  # of audio that the engines decode at a time; the reference decodes a clip whole
    frame_seconds: float  # length of an encoder frame

    @property
    def reference(self) -> str | None:
        """The name of the reference among the engines; None without one."""
        return self.clips[0].reference

    @property
    def float32_engines(self) -> list[FolderEngines]:
        return [each for each in self.engines if each.is_float32]

    @property
    def clips_of_one_window(self) -> list[ComparedClip]:
        return [clip for clip in self.clips if clip.one_window]

    @property
    def clips_of_several_windows(self) -> list[ComparedClip]:
        return [clip for clip in self.clips if not clip.one_window]

    @cached_property
    def figures(self) -> dict[str, EngineFigures]:
        """The figures of each engine, in the order in which the engines ran."""
        return {engine: self._figures_of(engine) for engine in self.clips[0].transcripts}

    def _figures_of(self, engine: str) -> EngineFigures:
        audio_seconds = sum(clip.seconds for clip in self.clips)
        rtfx = audio_seconds / sum(clip.transcripts[engine].seconds for clip in self.clips)
        pairs = [(clip.text, clip.transcripts[engine].text) for clip in self.clips if clip.text is not None]
        normalised = [(normalize(text), normalize(transcript)) for text, transcript in pairs]
        figures = EngineFigures(rtfx, _error_rate(pairs), _error_rate(normalised))
        if self.reference in (None, engine):
            return figures
        whole, cut = self.clips_of_one_window, self.clips_of_several_windows
        return EngineFigures(
            rtfx,
            figures.wer,
            figures.normalised_wer,
            clips_compared=len(whole),
            clips_of_several_windows=len(cut),
            clips_differing_from_nemo=sum(clip.transcripts[engine].tokens != clip.expected.tokens for clip in whole),
            wer_against_nemo=_error_rate([clip.texts(engine, self.rules) for clip in whole]),
            wer_against_nemo_of_several_windows=_error_rate([clip.texts(engine, self.rules) for clip in cut]),
        )

    def words(self, clip: ComparedClip) -> list[TimedWord]:
        """The words of a clip with their times, by plain ONNX Runtime on the first folder."""
        raw = self.engines[0].raw
        return (clip.transcripts[raw].words or []) if raw else []

    def as_json(self) -> dict[str, Any]:
        """Every transcript, figure and difference, for --json."""
        return {
            "engines": {
                engine: {key: value for key, value in asdict(figures).items() if value is not None}
                for engine, figures in self.figures.items()
            },
            "clips": [self._clip_json(clip) for clip in self.clips],
            "differences": [_difference_json(each) for each in self.differences],
        }

    def _clip_json(self, clip: ComparedClip) -> dict[str, Any]:
        return {
            "audio_filepath": str(clip.path),
            "offset": clip.offset,
            "seconds": clip.seconds,
            "text": clip.text,
            "engines": {engine: self._transcript_json(made) for engine, made in clip.transcripts.items()},
        }

    def _transcript_json(self, transcript: Transcript) -> dict[str, Any]:
        words = None if transcript.words is None else [self._word_json(word) for word in transcript.words]
        return {**asdict(transcript), "words": words}

    def _word_json(self, word: TimedWord) -> dict[str, Any]:
        start, end = (round(frame * self.frame_seconds, 3) for frame in (word.start, word.end))
        confidence = {} if word.confidence is None else asdict(word.confidence)
        return {"text": word.text, "start": start, "end": end, **{name: round(x, 4) for name, x in confidence.items()}}


def _error_rate(pairs: Sequence[tuple[str, str]]) -> WordErrorRate | None:
    """The error rate over pairs of a reference and a transcript; None without pairs."""
    if not pairs:
        return None
    return word_error_rate([reference for reference, _ in pairs], [transcript for _, transcript in pairs])


def _difference_json(each: EngineDifference) -> dict[str, Any]:
    difference = each.difference
    return {
        "audio_filepath": str(each.clip.path),
        "offset": each.clip.offset,
        "engine": each.engine,
        "index": difference.index,
        "frame": difference.frame,
        "expected": difference.expected,
        "actual": difference.actual,
        "excuse": difference.excuse,
    }
