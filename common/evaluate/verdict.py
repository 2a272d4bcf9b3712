"""What a comparison prints: the transcripts of each clip, a table over all clips, and the verdict.

The verdict says what was compared with what, where the engines differ, and whether that is an error. What could not be
compared is listed too, with the reason.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from common.cli import CheckError, print_table, progress_bar
from common.contract import ENCODER
from common.evaluate.blanks import print_flaws
from common.evaluate.compare import ComparedClip, Comparison, Difference
from common.evaluate.speed import why_slower
from common.evaluate.text_rules import explaining_rules
from common.evaluate.wer import (
    CONFIDENCE,
    MAX_PRINTED_CLIPS,
    NONE,
    empty_warning,
    high_error_warning,
    no_rate,
    word_errors,
)
from common.evaluate.words import furthest_apart
from common.run.decode import TimedWord

# The largest difference of a word's start or end from the reference's, in encoder frames.
TIMES_TOLERANCE = 1
CLEARLY_SLOWER = 0.9  # of the speed of float32; less of a difference may be chance
CLIP_HEADER = ("engine", "WER", "against {}", "transcript")
CORPUS_HEADER = (
    *("engine", "RTFx", "without features", "WER", "normalised WER", "against {}"),
    "clips with other tokens",
)


# ---- transcripts and the table


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
    reference = comparison.reference.name if comparison.reference else None
    rows = [
        (
            engine,
            NONE if clip.text is None else _clip_percent(clip.text, made.text),
            # against the reference's own text; a difference by rule is no error
            NONE if reference in (None, engine) else _clip_percent(*comparison.comparable_texts(clip, engine)),
            made.text,
        )
        for engine, made in clip.transcripts.items()
    ]
    print_table(_with_figures(_titles(CLIP_HEADER, comparison), rows), indent="  ")
    for note in clip_notes(comparison, clip):
        print(f"  {note}")


def _explained(draw: Difference) -> str:
    """A difference of the runtimes on a quantized folder, with the margin of the decision."""
    return draw.explained("no decision is known" if draw.margin is None else f"logits {draw.margin:.1e} apart")


def _titles(header: Sequence[str], comparison: Comparison) -> tuple[str, ...]:
    return tuple(title.format(comparison.reference.name if comparison.reference else "") for title in header)


def _with_figures(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """A table of the columns in which there is something to compare with."""
    columns = [column for column in zip(titles, *rows, strict=True) if any(cell != NONE for cell in column[1:])]
    return list(zip(*columns, strict=True))


def _clip_percent(reference: str, transcript: str) -> str:
    """Word error rate of one clip in per cent, as written."""
    errors, words = word_errors(reference, transcript)
    return f"{100 * errors / words:.1f}" if words else no_rate(errors)


def clip_notes(comparison: Comparison, clip: ComparedClip) -> list[str]:
    """What a reader of a clip's table must know: why its rows may differ from the reference's."""
    notes = [f"{engine} differs from plain ONNX Runtime, {_explained(draw)}" for engine, draw in clip.draws.items()]
    if comparison.reference is None:
        return notes
    name = comparison.reference.name
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
    print_table(corpus_table(comparison))
    print("\n".join(corpus_notes(comparison)))
    if reason := _why_clearly_slower(comparison):
        print(reason)
    genai = [folder.genai_engine.name for folder in comparison.folders if folder.genai_engine]
    print_flaws(comparison.flaws_table, without_times=genai)


def corpus_table(comparison: Comparison) -> list[tuple[str, ...]]:
    """Titles, and a row of figures over all clips for each engine; columns without a figure are left out."""
    titles = _titles(CORPUS_HEADER, comparison)
    rows = [
        (
            engine,
            f"{figures.rtfx:.1f}",
            f"{figures.rtfx_without_features:.1f}",
            str(figures.wer or NONE),
            str(figures.normalised_wer or NONE),
            str(figures.wer_against_nemo or NONE),
            NONE
            if figures.clips_compared is None
            else f"{figures.clips_differing_from_nemo} of {figures.clips_compared}",
        )
        for engine, figures in comparison.figures.items()
    ]
    return _with_figures(titles, rows)


def corpus_notes(comparison: Comparison) -> list[str]:
    """What the columns of corpus_table mean, a line for each."""
    source = comparison.reference.name if comparison.reference else "GenAI"
    notes = [
        "RTFx: seconds of audio transcribed in one second; larger is faster",
        f"without features: the same without the time of the features; plain ONNX Runtime is given those of {source}",
    ]
    if any(clip.text is not None for clip in comparison.clips):
        notes += [
            f"WER: word error rate against the clips' texts, with its {CONFIDENCE} % bootstrap interval over clips",
            "normalised WER: without case and punctuation (whisper_normalizer)",
        ]
    if comparison.reference:
        notes += [
            f"against {source}: WER against its text, on clips of one window, without what differs by rule",
            f"clips with other tokens: clips of one window whose tokens differ from those of {source}",
        ]
    return notes


def _why_clearly_slower(comparison: Comparison) -> str | None:
    """Why an optimized folder is clearly slower than the exported one in the same runtime; None where it is not."""
    if len(comparison.folders) < 2 or comparison.folders[0].is_float32:
        return None
    optimized, exported = comparison.folders
    encoder_bytes = ENCODER.bytes_in(exported.path)
    for own, other in zip(optimized.engines, exported.engines, strict=True):
        before, after = (comparison.figures[each.name].rtfx_without_features for each in (other, own))
        if reason := why_slower(CLEARLY_SLOWER * before, after, encoder_bytes):
            return reason
    return None


# ---- the verdict


def print_and_judge(comparison: Comparison) -> None:
    """Say what was compared, and with what result. Raises CheckError as judge_tokens and judge_texts do."""
    print_warnings(comparison)
    print_verdict(comparison)
    judge_tokens(comparison)
    judge_texts(comparison)


def print_warnings(comparison: Comparison) -> None:
    """Warn of each engine whose transcripts are all empty, and of a float32 engine that has most words wrong."""
    for engine in comparison.figures:
        if warning := empty_warning(engine, (clip.transcripts[engine].text for clip in comparison.clips)):
            print(warning)
    float32 = [engine for folder in comparison.float32_folders for engine in reversed(folder.engines)]
    judged = float32[0] if float32 else comparison.reference
    rate = comparison.figures[judged.name].normalised_wer if judged else None
    if rate and (warning := high_error_warning(rate)):
        print(warning)


def print_verdict(comparison: Comparison) -> None:
    """Say what the comparison of tokens found, and what was not compared."""
    if comparison.reference is None:
        print("nothing was compared with NeMo (--skip_nemo)")
    reference = comparison.reference.name if comparison.reference else "plain ONNX Runtime"
    compared = comparison.clips_of_one_window if comparison.reference else comparison.clips
    folders = comparison.float32_folders
    if not folders:
        print("no float32 engine was compared: the exported folder is not beside the optimized one, or was not chosen")
    elif not any(folder.engines for folder in folders):
        print("no engines were compared token for token: no engine of a float32 folder ran")
    elif comparison.reference is None and all(len(folder.engines) < 2 for folder in folders):
        print("no engines were compared token for token: of each float32 folder one engine ran")
    elif compared:
        equal = sum(not clip.differences for clip in compared)
        engine = "float32 ONNX" if comparison.reference else "GenAI in float32"
        kind = " of one window" if comparison.reference else ""
        print(f"{engine} equals {reference} token for token on {equal} of {len(compared)} clips{kind}")
    else:
        print(
            f"no clip was compared with {reference} token for token: none fits a window of "
            f"{comparison.config.window_seconds:g} s, and {reference} transcribes a clip whole"
        )
    _print_clips_of_several_windows(comparison)
    _print_draws(comparison)


def _print_draws(comparison: Comparison) -> None:
    """Count the clips on which GenAI and plain ONNX Runtime differ on a quantized folder."""
    for engine in comparison.figures:
        draws = [clip.draws[engine] for clip in comparison.clips if engine in clip.draws]
        if draws:
            margins = [draw.margin for draw in draws if draw.margin is not None]
            apart = f", whose logits are at most {max(margins):.1e} apart" if margins else ""
            print(
                f"{engine} differs from plain ONNX Runtime on {len(draws)} of {len(comparison.clips)} clips: on "
                f"quantized weights, rounding of the features decides between two choices there{apart}"
            )


def _print_clips_of_several_windows(comparison: Comparison) -> None:
    rates = {engine: row.wer_against_nemo_of_several_windows for engine, row in comparison.figures.items()}
    words = ", ".join(f"{engine} {rate.percent:.2f} %" for engine, rate in rates.items() if rate)
    if comparison.reference and words:
        name = comparison.reference.name
        print(
            f"{len(comparison.clips_of_several_windows)} of {len(comparison.clips)} clips have several windows of "
            f"{comparison.config.window_seconds:g} s and are not compared token for token: {name} transcribed them "
            f"whole, GenAI and ONNX Runtime did not; word errors against {name}: {words}"
        )


def judge_tokens(comparison: Comparison) -> None:
    """List every difference of a float32 engine; raise CheckError if one has no excuse."""
    unexcused = 0
    for clip in comparison.clips:
        for engine, difference in clip.differences.items():
            print(f"{clip.name}: {engine}, {difference}")
            unexcused += difference.excuse is None
    if unexcused:
        raise CheckError(f"float32 ONNX differs from its reference in {unexcused} cases, listed above")


def judge_texts(comparison: Comparison) -> None:
    """Compare texts of equal tokens: each engine's with the reference's own, and GenAI's with what `tokenizers` makes
    of plain ONNX Runtime's. Print what was compared; raise CheckError where texts differ and no rule explains it."""
    pairs = [
        (folder.onnx_engine.name, folder.genai_engine.name)
        for folder in comparison.folders
        if folder.onnx_engine and folder.genai_engine
    ]
    library = comparison.reference.name if comparison.reference else None
    if library:
        pairs = [(library, engine.name) for folder in comparison.folders for engine in folder.engines] + pairs
    explanations: list[list[str]] = []  # of each text compared with the reference's own, the rules by which it differs
    wrong = []
    for clip in comparison.clips:
        for reference, engine in pairs:
            expected, actual = clip.transcripts[reference], clip.transcripts[engine]
            if not expected.tokens or expected.tokens != actual.tokens:
                continue
            names = explaining_rules(expected.text, actual.text, comparison.rules if reference == library else ())
            if names is None:
                wrong.append(
                    f"{clip.name}: {reference} shows its tokens as {expected.text!r}, {engine} the same tokens as "
                    f"{actual.text!r}; no rule explains it"
                )
            elif reference == library:
                explanations.append(names)
    if library and (explanations or not wrong):
        print(_texts_summary(explanations, library))
    if wrong:
        print("\n".join(wrong))
        raise CheckError(
            f"the same tokens have different texts in {len(wrong)} cases, listed above; the folder's tokenizer is "
            "broken: make it again with export_tokenizer.py"
        )


def _texts_summary(explanations: Sequence[Sequence[str]], reference: str) -> str:
    if not explanations:
        return f"no text was compared with that of {reference}: no engine has its tokens on a clip with words"
    same = sum(not names for names in explanations)
    by_rule = Counter(name for names in explanations for name in names)
    named = "; ".join(f"{name} ({count})" for name, count in by_rule.items())
    return f"{same} transcripts with the tokens of {reference} also have its text, letter for letter" + (
        f"; {len(explanations) - same} differ from it by rule: {named}" if by_rule else ""
    )


def judge_times(comparison: Comparison, ids_of_other_words: frozenset[int]) -> None:
    """Say how far the times of float32 ONNX's words are from the reference's; raise CheckError beyond the tolerance.

    Only clips of one window are compared whose tokens are the same and none of `ids_of_other_words` (text_rules.py).
    """
    assert comparison.reference, "times are compared with a reference's"
    name = comparison.reference.name
    for onnx in (folder.onnx_engine.name for folder in comparison.float32_folders if folder.onnx_engine):
        words = 0
        furthest = 0.0
        left_out: Counter[str] = Counter()
        for clip in comparison.clips:
            if reason := _why_no_times(clip, name, onnx, ids_of_other_words):
                left_out[reason] += 1
                continue
            expected, actual = clip.transcripts[name].words or [], clip.transcripts[onnx].nemo_words or []
            apart = furthest_apart(expected, actual)
            if apart > TIMES_TOLERANCE:
                raise CheckError(f"{clip.name}: {_times_error(name, expected, actual, apart)}")
            words += len(expected)
            furthest = max(furthest, apart)
        without = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        if not words:
            print(f"{onnx}: no times of words were compared with those of {name}; clips left out: {without}")
            continue
        print(
            f"{onnx}: {words} words; their times differ from those of {name} by at most {furthest:g} frames of "
            f"{comparison.config.frame_seconds:g} s" + (f"; clips left out: {without}" if without else "")
        )


def _why_no_times(clip: ComparedClip, reference: str, onnx: str, ids_of_other_words: frozenset[int]) -> str | None:
    expected, actual = clip.transcripts[reference], clip.transcripts[onnx]
    if not clip.one_window:
        return "of several windows"
    if expected.tokens != actual.tokens:
        return f"with other tokens than {reference}"
    if expected.words is None:
        return f"to whose words {reference} gives no times"
    if not expected.words:
        return "without a word"
    return "with bytes, marks or unknown pieces" if ids_of_other_words.intersection(expected.tokens) else None


def _times_error(name: str, expected: Sequence[TimedWord], actual: Sequence[TimedWord], apart: float) -> str:
    if apart < float("inf"):
        return f"expected words within {TIMES_TOLERANCE} encoder frame of those of {name}, got {apart:g}"
    return f"expected the words of {name}, {[word.text for word in expected]}, got {[word.text for word in actual]}"
