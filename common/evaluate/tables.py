"""What a comparison prints: the transcripts of each clip, and a table over all clips."""

from collections import Counter
from collections.abc import Iterable, Sequence

from common.cli import progress_bar
from common.evaluate.compare import ComparedClip, Comparison, EngineFigures
from common.evaluate.text_rules import explaining_rules
from common.evaluate.wer import CONFIDENCE, MAX_PRINTED_CLIPS, WordErrorRate, no_rate, word_errors
from common.run.decode import TimedWord

NONE = "–"  # stands for a figure where there is nothing to compare with
CLEARLY_SLOWER = 0.9  # of the speed of float32; less of a difference may be chance
CLIP_HEADER = ("engine", "WER", "against {}", "transcript")
CORPUS_HEADER = (
    *("engine", "RTFx", "without features", "WER", "normalised WER", "against {}"),
    "clips with other tokens",
)


def print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Rows of one length, in columns as wide as their widest cell; the last column is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(f"{indent}{'  '.join(f'{cell:{width}}' for cell, width in zip(row, widths, strict=True)).rstrip()}")


def transcribe_and_print(comparison: Comparison, *, print_times: bool) -> None:
    """Let every engine transcribe every clip of `comparison`.

    Where there are few clips, prints for each a line with its transcript as soon as the first engine has made it, the
    transcripts of all engines where they differ, and the times of its words where `print_times` asks for them. Shows a
    progress bar where there are many.
    """
    if len(comparison.clips) > MAX_PRINTED_CLIPS:
        with progress_bar(total=len(comparison.clips), task="transcribing", unit="clip") as bar:
            for pool, engine in comparison.transcribe():
                if engine is comparison.engines[-1]:
                    bar.update(len(pool))
        return
    first, last = comparison.engines[0], comparison.engines[-1]
    for pool, engine in comparison.transcribe():
        if engine is first and len(pool) == 1:
            _print_transcript(pool[0], engine.name)
        if engine is not last:
            continue
        for clip in pool:
            if len(pool) > 1:
                _print_transcript(clip, first.name)
            if len({transcript.text for transcript in clip.transcripts.values()}) > 1:
                _print_engines(comparison, clip)
            if print_times:
                print_words(comparison.words(clip), comparison.config.frame_seconds)


def _print_transcript(clip: ComparedClip, engine: str) -> None:
    """One line, and the text of the clip where the transcript has other words."""
    text = clip.transcripts[engine].text
    print(f"{clip.name}  {clip.seconds:.1f} s  {text}", flush=True)
    if clip.text is not None and word_errors(clip.text, text)[0]:
        print(f"  text of the clip: {clip.text}", flush=True)


def _print_engines(comparison: Comparison, clip: ComparedClip) -> None:
    """A table of all engines' transcripts of a clip on which they differ, and why they may."""
    rows = [
        (
            engine,
            NONE if clip.text is None else clip_percent(clip.text, made.text),
            percent_against_reference(comparison, clip, engine),
            made.text,
        )
        for engine, made in clip.transcripts.items()
    ]
    print_table(_with_figures(_titles(CLIP_HEADER, comparison), rows), indent="  ")
    for note in clip_notes(comparison, clip):
        print(f"  {note}")


def _titles(header: Sequence[str], comparison: Comparison) -> tuple[str, ...]:
    return tuple(title.format(comparison.reference.name if comparison.reference else "") for title in header)


def _with_figures(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """A table of the columns in which there is something to compare with."""
    columns = [column for column in zip(titles, *rows, strict=True) if any(cell != NONE for cell in column[1:])]
    return list(zip(*columns, strict=True))


def clip_percent(reference: str, transcript: str) -> str:
    """Word error rate of one clip in per cent, as written."""
    errors, words = word_errors(reference, transcript)
    return f"{100 * errors / words:.1f}" if words else no_rate(errors)


def percent_against_reference(comparison: Comparison, clip: ComparedClip, engine: str) -> str:
    """The word error rate of one clip against the reference's own text; a difference by rule is no error."""
    if comparison.reference is None or engine == comparison.reference.name:
        return NONE
    return clip_percent(*comparison.comparable_texts(clip, engine))


def clip_notes(comparison: Comparison, clip: ComparedClip) -> list[str]:
    """What a reader of a clip's table must know: why its rows may differ from the reference's."""
    if comparison.reference is None:
        return []
    name = comparison.reference.name
    notes = []
    if not clip.one_window:
        windows = f"windows of {comparison.config.window_seconds:g} s"
        notes.append(f"{name} transcribed this clip whole, GenAI and ONNX Runtime in {windows}")
    expected = comparison.expected(clip)
    named = Counter(
        rule
        for made in clip.transcripts.values()
        if made is not expected and made.tokens == expected.tokens
        for rule in explaining_rules(expected.text, made.text, comparison.rules) or ()
    )
    if named:
        notes.append(f"differs from the text of {name} by rule: {'; '.join(named)}")
    return notes


def print_words(words: Iterable[TimedWord], frame_seconds: float) -> None:
    """A line for each word: start and end in seconds, and its probability (`max_prob` of Confidence) in per cent."""
    for word in words:
        sure = f"{100 * word.confidence.max_prob:4.0f} %" if word.confidence else ""
        print(f"  {word.start * frame_seconds:8.2f} {word.end * frame_seconds:8.2f} {sure}  {word.text}")


def print_corpus(comparison: Comparison) -> None:
    """Print one table over all clips, with a line for each engine, and what its columns mean."""
    clips = comparison.clips
    audio_seconds = sum(clip.seconds for clip in clips)
    print(f"{len(clips)} clip{'' if len(clips) == 1 else 's'}, {audio_seconds:.0f} s of audio")
    titles = _titles(CORPUS_HEADER, comparison)
    table = _with_figures(titles, [_corpus_row(*item) for item in comparison.figures.items()])
    print_table(table)
    source = comparison.reference.name if comparison.reference else "GenAI"
    print("RTFx: seconds of audio transcribed in one second; larger is faster")
    print(f"without features: the same without the time of the features; plain ONNX Runtime is given those of {source}")
    if "WER" in table[0]:
        print(f"WER: word error rate against the clips' texts, with its {CONFIDENCE} % bootstrap interval over clips")
        print("normalised WER: without case and punctuation (whisper_normalizer)")
    if comparison.reference:
        print(f"against {source}: WER against its text, on clips of one window, without what differs by rule")
        print(f"clips with other tokens: clips of one window whose tokens differ from those of {source}")
    if _is_slower_than_float32(comparison):
        print(
            "the optimized folder is slower than float32 here: weights in 4 bits save space rather than time, int8 "
            "saves little time in a small model, and the speed on a few clips varies"
        )


def _corpus_row(engine: str, figures: EngineFigures) -> tuple[str, ...]:
    compared = figures.clips_compared
    return (
        engine,
        f"{figures.rtfx:.1f}",
        f"{figures.rtfx_without_features:.1f}",
        _rate_text(figures.wer),
        _rate_text(figures.normalised_wer),
        _rate_text(figures.wer_against_nemo),
        NONE if compared is None else f"{figures.clips_differing_from_nemo} of {compared}",
    )


def _rate_text(rate: WordErrorRate | None) -> str:
    return NONE if rate is None else str(rate)


def _is_slower_than_float32(comparison: Comparison) -> bool:
    """Whether an optimized folder is clearly slower than the exported one in the same runtime."""
    if len(comparison.folders) < 2 or comparison.folders[0].is_float32:
        return False
    optimized, exported = ([comparison.figures[each.name] for each in folder.engines] for folder in comparison.folders)
    return any(
        own.rtfx_without_features < CLEARLY_SLOWER * other.rtfx_without_features
        for own, other in zip(optimized, exported, strict=True)
    )
