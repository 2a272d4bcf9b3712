"""Several engines transcribe the same clips; the tokens of those that run in float32 are compared with a reference's.

The reference is NeMo, or transformers for a checkpoint of that format. Every engine is given the same samples. The
reference computes its own features, and plain ONNX Runtime is given those or, without a reference, GenAI's. GenAI
always computes its own.

Greedy decoding follows the largest logit, so two engines that differ by rounding alone may differ in a token where two
logits are nearly equal. Such a difference is excused, and so are those where the rules of NeMo and GenAI differ, and
where a step is forced that transformers does not force. On a quantized folder, where rounding of the activations makes
small differences larger, GenAI and plain ONNX Runtime may differ on clips that they decode alike in float32: these are
listed, with the distance of the two choices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from common.contract import PARITY_TOLERANCE
from common.evaluate.blanks import Flaws, find_flaws, flaws_table
from common.evaluate.engines import Engine, LibraryEngine, OpenFolder, Recording
from common.evaluate.text_rules import TextRule, comparable
from common.evaluate.wer import WordErrorRate, normalize, word_error_rate
from common.run.audio import Clip
from common.run.config import RuntimeConfig
from common.run.decode import Hypothesis, Step, TimedWord, Transcript

# So much audio at a time is sorted by length into batches: more needs less padding, and more memory, 8 MB a minute.
POOL_SECONDS = 1200


# ---- where two decodings differ

NO_LIMIT = "a step was forced after the configured number of tokens on one frame, which transformers does not limit"


@dataclass(frozen=True)
class Difference:
    """The first difference of two decodings."""

    index: int  # of the token among those emitted
    frame: int  # encoder frame
    expected: int | None  # token; None: the reference has ended
    actual: int | None  # token; None: the decoding has ended
    excuse: str | None  # None: nothing excuses it
    margin: float | None = None  # between the two best choices of the nearest decision, where decisions are known

    def __str__(self) -> str:
        """In words; tokens are counted from 1."""
        return self.explained(self.excuse or "nothing excuses it")

    def explained(self, reason: str) -> str:
        """The same with another reason."""
        place = f"token {self.index + 1} of the transcript, encoder frame {self.frame}"
        if self.expected == self.actual:
            return f"{place}: token {self.expected} is emitted at another frame; {reason}"
        expected, actual = ("no token" if token is None else token for token in (self.expected, self.actual))
        return f"{place}: expected {expected}, got {actual}; {reason}"


def first_difference(
    expected: Transcript | Hypothesis, actual: Transcript | Hypothesis, *, limits_symbols: bool = True
) -> Difference | None:
    """Compare the tokens of two decodings and, where both have them, the encoder frames that these were emitted at;
    None where they are equal. Without frames, `expected` is a Hypothesis.

    If `actual` is a Hypothesis, its decisions between the last common token and the first different one may excuse the
    difference: if the two best choices of one of them are closer than the parity tolerance, if NeMo and GenAI differ by
    design in one of them, or if a step was forced and `expected` forces none (`limits_symbols` is false).
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
    frames = [each.frames[index] for each in (expected, actual) if each.frames and index < len(each.frames)]
    if not frames:  # `actual`, which has no frames, goes on where `expected` has ended
        assert isinstance(expected, Hypothesis), "without frames only a Hypothesis says where it ended"
        frames = [expected.steps[-1].frame]
    return Difference(
        index,
        frames[0],
        expected.tokens[index] if index < len(expected.tokens) else None,
        actual.tokens[index] if index < len(actual.tokens) else None,
        _excuse(actual, index, limits_symbols=limits_symbols) if isinstance(actual, Hypothesis) else None,
        next((_margin(each, index) for each in (actual, expected) if isinstance(each, Hypothesis)), None),
    )


def _decisions(hypothesis: Hypothesis, index: int) -> list[Step]:
    """The decisions between token `index` - 1 and token `index`."""
    positions = [i for i, step in enumerate(hypothesis.steps) if step.token != hypothesis.blank_id]
    begin = positions[index - 1] if index else 0  # that token's duration is one of the decisions
    end = positions[index] + 1 if index < len(positions) else len(hypothesis.steps)
    return hypothesis.steps[begin:end]


def _margin(hypothesis: Hypothesis, index: int) -> float | None:
    """The smallest distance of the two best choices in those decisions; None where there are none."""
    return min((step.margin for step in _decisions(hypothesis, index)), default=None)


def _excuse(hypothesis: Hypothesis, index: int, *, limits_symbols: bool) -> str | None:
    """The excuse for a different decision between token `index` - 1 and token `index`; None if there is none."""
    nearest = _margin(hypothesis, index)
    if nearest is not None and nearest < PARITY_TOLERANCE:
        return f"top-two margin {nearest:.1e} under the tolerance {PARITY_TOLERANCE:.0e}"
    if any(step.blank_zero for step in _decisions(hypothesis, index)):
        return "blank with duration 0, where the greedy rules of NeMo and GenAI differ"
    if not limits_symbols and any(step.is_forced for step in _decisions(hypothesis, index)):
        return NO_LIMIT
    return None


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


@dataclass(frozen=True)
class EngineFigures:
    """One engine's figures over all clips, by their keys in --json; None where there is nothing to compare with."""

    rtfx: float  # seconds of audio that are transcribed in one second, features included
    rtfx_without_features: float
    wer: WordErrorRate | None = None  # against the clips' texts, as written
    normalised_wer: WordErrorRate | None = None  # without case and punctuation
    clips_compared: int | None = None  # of one window, with the reference; the names below say nemo for any reference
    clips_of_several_windows: int | None = None
    clips_differing_from_nemo: int | None = None  # of those compared, with other tokens than the reference's
    wer_against_nemo: WordErrorRate | None = None  # on the clips of one window
    wer_against_nemo_of_several_windows: WordErrorRate | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The clips and the engines of a comparison: the reference first, then GenAI and plain ONNX Runtime on each
    folder."""

    clips: Sequence[ComparedClip]
    folders: Sequence[OpenFolder]
    reference: LibraryEngine | None

    @property
    def engines(self) -> list[Engine]:
        """The engines in the order in which they run."""
        own: list[Engine] = [engine for folder in self.folders for engine in folder.engines]
        return own if self.reference is None else [self.reference, *own]

    @property
    def rules(self) -> Sequence[TextRule]:
        """The rules by which the reference's text may differ from a folder's."""
        return self.reference.rules if self.reference else ()

    @property
    def config(self) -> RuntimeConfig:
        """The numbers of decoding, which all folders share."""
        return self.folders[0].config

    @property
    def float32_folders(self) -> list[OpenFolder]:
        """The folders whose engines must have the reference's tokens."""
        return [folder for folder in self.folders if folder.is_float32]

    @property
    def timed_reference(self) -> str | None:
        """The engine with whose words blank stretches are compared: the reference or, without one, plain ONNX Runtime
        in float32."""
        own = [folder.onnx_engine.name for folder in self.float32_folders if folder.onnx_engine]
        return self.reference.name if self.reference else own[-1] if own else None

    @property
    def flaws_table(self) -> list[tuple[str, ...]]:
        """The flaws of all transcripts, as flaws_table gives them."""
        return flaws_table(((clip.label, clip.flaws) for clip in self.clips), self.timed_reference)

    @property
    def clips_of_one_window(self) -> list[ComparedClip]:
        return [clip for clip in self.clips if clip.one_window]

    @property
    def clips_of_several_windows(self) -> list[ComparedClip]:
        return [clip for clip in self.clips if not clip.one_window]

    def transcribe(self) -> Iterator[tuple[list[ComparedClip], Engine]]:
        """Let each engine in turn transcribe the clips, one at a time or in pools to make batches from.

        Yields a pool whenever an engine has transcribed it; where that was the last engine, its differences are known
        as well. Raises as RuntimeConfig.read_clip and Engine.transcribe do.
        """
        engines = self.engines
        for clips, recordings in self._pools():
            for engine in engines:
                for clip, transcript in zip(clips, engine.transcribe(recordings), strict=True):
                    clip.transcripts[engine.name] = transcript
                if engine is engines[-1]:
                    for clip, recording in zip(clips, recordings, strict=True):
                        self._find_differences(clip, recording)
                        clip.flaws = find_flaws(
                            recording.samples,
                            clip.transcripts,
                            self.folders[0].pieces,
                            self.config,
                            reference=self.timed_reference,
                            text=clip.text,
                        )
                yield clips, engine

    def _pools(self) -> Iterator[tuple[list[ComparedClip], list[Recording]]]:
        """The clips with their samples, one at a time or in pools to make batches from."""
        features_by = self.reference.reference if self.reference else self.folders[0].genai
        onnx = self.folders[0].onnx_engine
        in_batches = onnx is not None and onnx.batch_size > 1
        clips: list[ComparedClip] = []
        recordings: list[Recording] = []
        for clip in self.clips:
            samples = self.config.read_clip(clip)
            clip.seconds = len(samples) / self.config.sample_rate
            clip.one_window = clip.seconds <= self.config.window_seconds
            clips.append(clip)
            recordings.append(Recording(samples, features_by))
            if not in_batches or sum(each.seconds for each in clips) >= POOL_SECONDS or clip is self.clips[-1]:
                yield clips, recordings
                clips, recordings = [], []

    def _find_differences(self, clip: ComparedClip, recording: Recording) -> None:
        """Compare float32 engines with the reference; without a reference, GenAI with plain ONNX Runtime. On quantized
        folders GenAI is compared with plain ONNX Runtime.

        The decisions of plain ONNX Runtime are not needed afterwards and are dropped.
        """
        limits_symbols = self.reference is None or self.reference.reference.limits_symbols
        for folder in self.float32_folders:
            for engine, expected, actual in self._pairs_to_compare(clip, recording, folder):
                difference = first_difference(expected, actual, limits_symbols=limits_symbols)
                # Only the reference's own decisions excuse a difference: where a broken graph gives equal logits, each
                # of its decisions is a near tie. A step is forced only after tokens that the reference has as well.
                if difference and difference.excuse not in (None, NO_LIMIT) and self.reference:
                    own = first_difference(actual, self.reference.reference.trace(recording.features))
                    difference = replace(difference, excuse=own.excuse if own else None)
                if difference:
                    clip.differences.setdefault(engine.name, difference)
        for folder in self.folders:
            if folder.is_float32 or not folder.genai_engine or not folder.onnx_engine:
                continue
            traced, name = clip.transcripts[folder.onnx_engine.name].hypothesis, folder.genai_engine.name
            if traced and (draw := first_difference(traced, clip.transcripts[name])):
                clip.draws[name] = draw
        for name, transcript in clip.transcripts.items():
            clip.transcripts[name] = replace(transcript, hypothesis=None)

    def _pairs_to_compare(
        self, clip: ComparedClip, recording: Recording, folder: OpenFolder
    ) -> Iterator[tuple[Engine, Transcript | Hypothesis, Transcript | Hypothesis]]:
        """Yield each engine of a folder that may differ, with two decodings that must be equal.

        GenAI computes its own features, so it is compared with plain ONNX Runtime on those features by GenAI's rule,
        and that result with the reference. Without a reference, a clip in a batch is also compared with itself alone.
        The reference decodes a clip whole and may well decode it differently than in windows, so it is no reference for
        a clip of several windows.
        """
        onnx, genai = folder.onnx_engine, folder.genai_engine
        traced = clip.transcripts[onnx.name].hypothesis if onnx else None
        reference = clip.transcripts[self.reference.name] if self.reference and clip.one_window else None
        if onnx and traced and reference:
            yield onnx, reference, traced
        if not genai or not (traced or reference):
            return
        made = clip.transcripts[genai.name]
        if made.tokens == (reference.tokens if reference else None if self.reference or not traced else traced.tokens):
            return
        alone = traced if onnx and not self.reference and onnx.batch_size == 1 else None  # on GenAI's features
        own = alone or folder.onnx.transcribe(folder.genai.features(recording.samples))
        yield genai, own, made
        if reference:
            yield genai, reference, own
        if onnx and traced and not self.reference:
            yield onnx, own, traced

    @cached_property
    def figures(self) -> dict[str, EngineFigures]:
        """The figures of each engine, in the order in which the engines ran."""
        return {engine.name: self._figures_of(engine) for engine in self.engines}

    def _figures_of(self, engine: Engine) -> EngineFigures:
        made = [(clip, clip.transcripts[engine.name]) for clip in self.clips]
        audio_seconds = sum(clip.seconds for clip in self.clips)
        seconds = sum(transcript.seconds for _, transcript in made)
        features_seconds = sum(transcript.features_seconds for _, transcript in made)
        pairs = [(clip.text, transcript.text) for clip, transcript in made if clip.text is not None]
        figures = EngineFigures(
            rtfx=audio_seconds / seconds,
            rtfx_without_features=audio_seconds / (seconds - features_seconds),
            wer=_error_rate(pairs),
            normalised_wer=_error_rate([(normalize(text), normalize(transcript)) for text, transcript in pairs]),
        )
        if self.reference in (None, engine):
            return figures
        whole, cut = self.clips_of_one_window, self.clips_of_several_windows
        return replace(
            figures,
            clips_compared=len(whole),
            clips_of_several_windows=len(cut),
            clips_differing_from_nemo=sum(
                clip.transcripts[engine.name].tokens != self.expected(clip).tokens for clip in whole
            ),
            wer_against_nemo=_error_rate([self.comparable_texts(clip, engine.name) for clip in whole]),
            wer_against_nemo_of_several_windows=_error_rate([self.comparable_texts(clip, engine.name) for clip in cut]),
        )

    def expected(self, clip: ComparedClip) -> Transcript:
        """The reference's transcript of a clip."""
        assert self.reference, "only where there is a reference"
        return clip.transcripts[self.reference.name]

    def comparable_texts(self, clip: ComparedClip, engine: str) -> tuple[str, str]:
        """The reference's text of a clip and an engine's, both without what differs by rule."""
        return comparable(self.expected(clip).text, clip.transcripts[engine].text, self.rules)

    def words(self, clip: ComparedClip) -> list[TimedWord]:
        """The words of a clip with their times, by plain ONNX Runtime on the first folder."""
        onnx = self.folders[0].onnx_engine
        return (clip.transcripts[onnx.name].words or []) if onnx else []

    def as_json(self) -> dict[str, Any]:
        """Every transcript, figure and difference, for --json."""
        return {
            "engines": {
                engine: {key: value for key, value in asdict(figures).items() if value is not None}
                for engine, figures in self.figures.items()
            },
            "clips": [
                {
                    "audio_filepath": str(clip.path),
                    "offset": clip.offset,
                    "duration": clip.seconds,
                    "text": clip.text,
                    "engines": {
                        name: {**self._transcript_json(made), **asdict(clip.flaws[name])}
                        for name, made in clip.transcripts.items()
                    },
                }
                for clip in self.clips
            ],
            "differences": self._listed([clip.differences for clip in self.clips]),
            "draws": self._listed([clip.draws for clip in self.clips]),
        }

    def _listed(self, found: Sequence[Mapping[str, Difference]]) -> list[dict[str, Any]]:
        """What was found on each clip, by engine, in one list."""
        return [
            {"audio_filepath": str(clip.path), "offset": clip.offset, "engine": engine, **asdict(difference)}
            for clip, by_engine in zip(self.clips, found, strict=True)
            for engine, difference in by_engine.items()
        ]

    def _transcript_json(self, transcript: Transcript) -> dict[str, Any]:
        return {
            "tokens": transcript.tokens,
            "text": transcript.text,
            "seconds": transcript.seconds,
            "features_seconds": transcript.features_seconds,
            "words": None if transcript.words is None else [self._word_json(word) for word in transcript.words],
        }

    def _word_json(self, word: TimedWord) -> dict[str, Any]:
        start, end = (round(frame * self.config.frame_seconds, 3) for frame in (word.start, word.end))
        confidence = {} if word.confidence is None else asdict(word.confidence)
        return {"text": word.text, "start": start, "end": end, **{name: round(x, 4) for name, x in confidence.items()}}


def _error_rate(pairs: Sequence[tuple[str, str]]) -> WordErrorRate | None:
    """The error rate over pairs of a reference and a transcript; None without pairs."""
    if not pairs:
        return None
    return word_error_rate([reference for reference, _ in pairs], [transcript for _, transcript in pairs])
