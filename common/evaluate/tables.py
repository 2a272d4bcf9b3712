"""Tables of a comparison for a terminal: one for each clip, and one over all clips."""

from collections import Counter
from collections.abc import Iterable, Sequence

from common.cli import progress_bar
from common.evaluate.side_by_side import Pool, SideBySide
from common.evaluate.text_rules import TextRule
from common.evaluate.transcripts import NEMO, REFERENCES, ComparedClip, Comparison, EngineFigures
from common.evaluate.wer import CONFIDENCE, WordErrorRate, no_rate, word_errors
from common.run.decode import TimedWord

MAX_PRINTED_CLIPS = 20  # transcripts of more clips than a person reads are only in the --json file
NONE = "–"  # stands for a figure where there is nothing to compare with
CLIP_HEADER = ("engine", "RTFx", "WER", "against {}", "transcript")
CORPUS_HEADER = ("engine", "RTFx", "WER", "normalised WER", "against {}", "clips with other tokens")
RTFX_MEANING = "RTFx: seconds of audio transcribed in one second, features included; larger is faster"


def format_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The cells in columns of these widths; a last cell beyond the columns is not padded."""
    padded = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False)]
    return "  ".join([*padded, *cells[len(widths) :]]).rstrip()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of one length, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(format_row(row, widths))


class ClipTables:
    """Prints a table for each clip. The lines of a clip that is transcribed alone are printed as soon as each engine is
    done with it, those of the clips of a batch when every engine is done."""

    def __init__(
        self,
        engines: Sequence[str],
        rules: Sequence[TextRule],
        window_seconds: float,
        frame_seconds: float,
        words_of: str | None,
    ) -> None:
        """words_of: the engine whose words are listed with their times, if any."""
        reference = next((name for name in REFERENCES if name in engines), NEMO)
        self.header = _named(CLIP_HEADER, reference)
        self.widths = (max(map(len, engines)), 6, 5, len(self.header[3]))
        self.rules = rules
        self.window_seconds = window_seconds
        self.frame_seconds = frame_seconds
        self.words_of = words_of
        self.clip: ComparedClip | None = None  # whose table is being printed
        print(f"{RTFX_MEANING}; WER: word error rate in %, against the clip's text and that of {reference}")

    def begin(self, pool: Pool) -> None:
        """To be called before the engines run."""
        self.clip = pool[0].clip if len(pool) == 1 else None
        if self.clip:
            self._print_header(self.clip)

    def engine_done(self, engine: str) -> None:
        """To be called when an engine has transcribed the clips."""
        if self.clip:
            self._print_row(self.clip, engine)

    def finish(self, pool: Pool) -> None:
        """To be called when every engine has transcribed the clips."""
        for clip in (recording.clip for recording in pool):
            if clip is not self.clip:
                self._print_header(clip)
                for engine in clip.transcripts:
                    self._print_row(clip, engine)
            for note in clip_notes(clip, self.rules, self.window_seconds):
                print(f"  {note}")
            if self.words_of:
                print_words(clip.transcripts[self.words_of].words or (), self.frame_seconds)

    def _print_header(self, clip: ComparedClip) -> None:
        print(f"{clip.name}  {clip.seconds:.1f} s" + ("" if clip.text is None else f"  {clip.text!r}"))
        print(f"  {format_row(self.header, self.widths)}", flush=True)

    def _print_row(self, clip: ComparedClip, engine: str) -> None:
        transcript = clip.transcripts[engine]
        row = (
            engine,
            f"{clip.seconds / transcript.seconds:.1f}",
            clip_percent(clip.text, transcript.text),
            percent_against_reference(clip, engine, self.rules),
            transcript.text,
        )
        print(f"  {format_row(row, self.widths)}", flush=True)


def transcribe_and_print(engines: SideBySide, comparison: Comparison, *, print_times: bool) -> None:
    """Let every engine transcribe every clip of `comparison`, and collect the differences in it.

    Prints a table for each clip where there are few, with the times of its words where `print_times` asks for them;
    shows a progress bar where there are many.
    """
    clips = comparison.clips
    if len(clips) > MAX_PRINTED_CLIPS:
        with progress_bar(total=len(clips), task="transcribing", unit="clip") as bar:
            for pool in engines.read(clips):
                engines.transcribe(pool, lambda engine: None)
                comparison.differences.extend(engines.differences(pool))
                bar.update(len(pool))
        return
    names = [name for each in comparison.engines for name in each.names]
    tables = ClipTables(
        names if engines.reference is None else [engines.reference.name, *names],
        comparison.rules,
        comparison.window_seconds,
        comparison.frame_seconds,
        words_of=comparison.engines[0].raw if print_times else None,
    )
    for pool in engines.read(clips):
        tables.begin(pool)
        engines.transcribe(pool, tables.engine_done)
        tables.finish(pool)
        comparison.differences.extend(engines.differences(pool))


def clip_percent(reference: str | None, transcript: str) -> str:
    """Word error rate of one clip in per cent, as written."""
    if reference is None:
        return NONE
    errors, words = word_errors(reference, transcript)
    return f"{100 * errors / words:.1f}" if words else no_rate(errors)


def percent_against_reference(clip: ComparedClip, engine: str, rules: Sequence[TextRule]) -> str:
    """The word error rate of one clip against the reference's own text; a difference by rule is no error."""
    if clip.reference in (None, engine):
        return NONE
    reference, transcript = clip.texts(engine, rules)
    return clip_percent(reference, transcript)


def clip_notes(clip: ComparedClip, rules: Sequence[TextRule], window_seconds: float) -> list[str]:
    """What a reader of a clip's table must know: why its rows may differ from the reference's."""
    if clip.reference is None:
        return []
    notes = []
    if not clip.one_window:
        notes.append(
            f"{clip.reference} transcribed this clip whole, GenAI and ONNX Runtime in windows of {window_seconds:g} s"
        )
    named = Counter(name for engine in clip.transcripts for name in clip.rules_that_explain(engine, rules))
    if named:
        notes.append(f"differs from the text of {clip.reference} by rule: {'; '.join(named)}")
    return notes


def print_words(words: Iterable[TimedWord], frame_seconds: float) -> None:
    """A line for each word: start and end in seconds, and its probability (`max_prob` of Confidence) in per cent."""
    for word in words:
        sure = f"{100 * word.confidence.max_prob:4.0f} %" if word.confidence else ""
        print(f"  {word.start * frame_seconds:8.2f} {word.end * frame_seconds:8.2f} {sure}  {word.text}")


def print_corpus(comparison: Comparison) -> None:
    """Print what the columns mean, and then one table over all clips, with a line for each engine."""
    audio_seconds = sum(clip.seconds for clip in comparison.clips)
    print(f"{len(comparison.clips)} clips, {audio_seconds:.0f} s of audio")
    print(RTFX_MEANING)
    print(f"WER: word error rate against the clips' texts, with its {CONFIDENCE} % bootstrap interval over clips")
    print("normalised WER: without case and punctuation (whisper_normalizer)")
    if name := comparison.reference:
        print(f"against {name}: WER against the text of {name}, on clips of one window, without what differs by rule")
        print(f"clips with other tokens: those of one window whose tokens differ from those of {name}")
    print_table(
        [
            _named(CORPUS_HEADER, comparison.reference or NEMO),
            *(_corpus_row(*item) for item in comparison.figures.items()),
        ]
    )


def _named(header: Sequence[str], reference: str) -> tuple[str, ...]:
    return tuple(title.format(reference) for title in header)


def _corpus_row(engine: str, figures: EngineFigures) -> tuple[str, ...]:
    compared = figures.clips_compared
    return (
        engine,
        f"{figures.rtfx:.1f}",
        _rate_text(figures.wer),
        _rate_text(figures.normalised_wer),
        _rate_text(figures.wer_against_nemo),
        NONE if compared is None else f"{figures.clips_differing_from_nemo} of {compared}",
    )


def _rate_text(rate: WordErrorRate | None) -> str:
    return NONE if rate is None else str(rate)
