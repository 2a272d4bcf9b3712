"""Several engines transcribe the same clips; the tokens of those that run in float32 are compared with a reference's.

The reference is NeMo, or transformers for a checkpoint of that format. Every engine is given the same samples. The
reference computes its own features, and plain ONNX Runtime is given those or, without a reference, GenAI's. GenAI
always computes its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.evaluate.differences import Difference, excused_by, first_difference, first_token_difference
from common.evaluate.engines import ComparedFolder, timed
from common.evaluate.text_rules import TextRule
from common.evaluate.transcripts import ComparedClip, Comparison, EngineDifference, Transcript
from common.evaluate.words import timed_words
from common.run import decode
from common.run.decode import GENAI_RULE, NEMO_RULE, Hypothesis
from common.run.genai import GenAI
from common.run.reference import Reference

# So much audio at a time is sorted by length into batches: more needs less padding, and more memory, 8 MB a minute.
POOL_SECONDS = 1200


@dataclass
class Recording:
    """A clip while it is being transcribed."""

    clip: ComparedClip
    samples: np.ndarray  # mono, at the model's rate
    features: np.ndarray | None = None  # [M, T]
    features_seconds: float = 0.0  # that it took to compute them
    reference: decode.Transcript | None = None  # the reference's result, where its tokens and frames must be matched
    traced: dict[str, Hypothesis] = field(default_factory=dict)  # by the name of an engine on plain ONNX Runtime

    def compute_features(self, source: Callable[[], GenAI | Reference]) -> np.ndarray:
        """Features [M, T] by the first source that is asked; later calls return the same without loading theirs."""
        if self.features is not None:
            return self.features
        features, self.features_seconds = timed(source().features, self.samples)
        self.features = features
        return features


Pool = list[Recording]
OnEngine = Callable[[str], None]  # is called with the name of an engine that has transcribed a whole pool


@dataclass(frozen=True)
class SideBySide:
    """The engines, and how they are run: the reference first, then GenAI and plain ONNX Runtime on each folder."""

    folders: Sequence[ComparedFolder]
    reference: Reference | None
    batch_size: int = 1  # clips that plain ONNX Runtime takes at a time
    with_times: bool = False  # whether words are given with their times as well

    def read(self, clips: Sequence[ComparedClip]) -> Iterator[Pool]:
        """The clips with their samples, one at a time or in pools to make batches from. Raises as read_clip does."""
        config = self.folders[0].config
        pool: Pool = []
        seconds = 0.0
        for clip in clips:
            samples = config.read_clip(clip)
            clip.seconds = len(samples) / config.sample_rate
            clip.one_window = config.fits_one_window(clip.seconds)
            pool.append(Recording(clip, samples))
            seconds += clip.seconds
            if self.batch_size == 1 or seconds >= POOL_SECONDS or clip is clips[-1]:
                yield pool
                pool = []
                seconds = 0.0

    def comparison_of(self, clips: Sequence[ComparedClip], rules: Sequence[TextRule]) -> Comparison:
        """A Comparison on `clips`, which are not transcribed yet; the reference's text may differ by `rules`."""
        config = self.folders[0].config
        return Comparison(
            clips=clips,
            engines=[folder.engines for folder in self.folders],
            rules=rules,
            window_seconds=config.chunk / config.sample_rate,
            frame_seconds=config.frame_seconds,
        )

    def transcribe(self, pool: Pool, on_engine: OnEngine) -> None:
        """Let each engine in turn transcribe the whole pool, into `transcripts` of every clip."""
        if self.reference:
            for recording in pool:
                _run_reference(self.reference, recording, with_times=self.with_times)
            on_engine(self.reference.name)
        for folder in self.folders:
            if name := folder.engines.genai:
                for recording in pool:
                    tokens, seconds = timed(folder.genai.transcribe, recording.samples)
                    recording.clip.transcripts[name] = Transcript(tokens, folder.genai.text(tokens), seconds)
                on_engine(name)
            if name := folder.engines.raw:
                self._run_raw(folder, name, pool)
                on_engine(name)

    def _run_raw(self, folder: ComparedFolder, name: str, pool: Pool) -> None:
        """Run plain ONNX Runtime in batches; the time is divided among the clips by their length."""
        features = [recording.compute_features(lambda: folder.genai) for recording in pool]
        rule = NEMO_RULE if self.reference else GENAI_RULE
        hypotheses, seconds = timed(folder.raw.transcribe_all, features, rule, self.batch_size)
        per_second = seconds / sum(recording.clip.seconds for recording in pool)
        for recording, hypothesis in zip(pool, hypotheses, strict=True):
            recording.clip.transcripts[name] = Transcript(
                hypothesis.tokens,
                folder.raw_text(hypothesis.tokens),
                recording.features_seconds + per_second * recording.clip.seconds,
                timed_words(hypothesis.emitted, folder.pieces) if self.with_times else None,
            )
            recording.traced[name] = hypothesis

    def differences(self, pool: Pool) -> list[EngineDifference]:
        """Where float32 engines differ from the reference; without a reference, GenAI from plain ONNX Runtime."""
        return [
            EngineDifference(recording.clip, engine, difference)
            for recording in pool
            for folder in self.folders
            if folder.engines.is_float32
            for engine, difference in self._compare(recording, folder)
        ]

    def _compare(self, recording: Recording, folder: ComparedFolder) -> Iterator[tuple[str, Difference]]:
        """Yield the name of each engine that differs, with its difference.

        GenAI computes its own features, so it is compared with plain ONNX Runtime on those features by GenAI's rule,
        and that result with the reference. Without a reference, a clip in a batch is also compared with itself alone.
        """
        names, reference = folder.engines, recording.reference
        traced = recording.traced[names.raw] if names.raw else None
        if names.raw and traced and reference:
            yield from self._explained(recording, names.raw, _difference_from(reference, traced), traced)
        if not names.genai or not (traced or reference):
            return
        tokens = recording.clip.transcripts[names.genai].tokens
        if tokens == (reference.tokens if reference else None if self.reference or not traced else traced.tokens):
            return
        alone = traced if not self.reference and self.batch_size == 1 else None  # on GenAI's features, in no batch
        baseline = alone or folder.raw.transcribe(folder.genai.features(recording.samples))
        difference = first_token_difference(baseline, tokens)
        if reference and difference is None:
            difference = _difference_from(reference, baseline)
        yield from self._explained(recording, names.genai, difference, baseline)
        if names.raw and traced and not self.reference:
            in_batch = first_difference(baseline.tokens, baseline.frames, traced)
            yield from self._explained(recording, names.raw, in_batch, traced)

    def _explained(
        self, recording: Recording, engine: str, difference: Difference | None, actual: Hypothesis
    ) -> Iterator[tuple[str, Difference]]:
        """The difference, if there is one; with a reference, only the reference's decisions can excuse it."""
        library = self.reference
        if difference and difference.excuse and library:
            reference = library.trace(recording.compute_features(lambda: library))
            difference = excused_by(reference, difference, actual)
        if difference:
            yield engine, difference


def _run_reference(reference: Reference, recording: Recording, *, with_times: bool) -> None:
    features = recording.compute_features(lambda: reference)
    made, seconds = timed(reference.transcribe, features)
    words = reference.words(features) if with_times else None
    seconds += recording.features_seconds
    recording.clip.transcripts[reference.name] = Transcript(made.tokens, made.text, seconds, words)
    if recording.clip.one_window:  # a clip that is cut into windows may well be decoded differently
        recording.reference = made


def _difference_from(reference: decode.Transcript, actual: Hypothesis) -> Difference | None:
    return first_difference(reference.tokens, reference.frames or [], actual)
