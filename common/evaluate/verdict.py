"""What a comparison prints: the transcripts of each clip, a table over all clips, and the verdict.

The verdict says what was compared with what, where the engines differ, and whether that is an error. What could not be
compared is counted too, with the reason.
"""

from collections import Counter
from typing import Any

from common.cli import CheckError, print_table, progress_bar
from common.contract import ENCODER
from common.evaluate.blanks import print_flaws
from common.evaluate.compare import QUANTIZED, Comparison
from common.evaluate.engines import GENAI_ENGINE
from common.evaluate.speed import why_slower
from common.evaluate.text_rules import explaining_rules, ids_of_other_words
from common.evaluate.words import (
    CONFIDENCE,
    MAX_PRINTED_CLIPS,
    NONE,
    furthest_apart,
    print_warnings,
    timed_words,
    word_errors,
)

# The largest difference of a word's start or end from the reference's, in encoder frames.
TIMES_TOLERANCE = 1
CLEARLY_SLOWER = 0.9  # of the speed of float32; less of a difference may be chance
# The columns of the table over all clips: the key of the figure, the title, and what it means. {0} is the reference,
# {1} the engine that computes the features.
COLUMNS = (
    ("rtfx", "RTFx", "seconds of audio transcribed in one second; larger is faster"),
    ("rtfx_without_features", "without features",
     "the same without the time of the features; plain ONNX Runtime is given {1}'s features"),
    ("wer", "WER", f"word error rate against the clips' texts, with its {CONFIDENCE} % bootstrap interval over clips"),
    ("normalised_wer", "normalised WER", "without case and punctuation (whisper_normalizer)"),
    ("wer_against_nemo", "against {0}",
     "WER against its text, on clips of one window, without what differs by rule"),
    ("clips_differing_from_nemo", "clips with other tokens",
     "clips of one window whose tokens differ from {0}'s"),
)  # fmt: skip


# ---- transcripts and the table


def transcribe_and_print(comparison: Comparison, *, print_times: bool) -> None:
    """Let every engine transcribe every clip of `comparison`.

    Where there are few clips, prints for each a line with its transcript as soon as the first engine has made it, the
    transcripts of all engines where they differ, and the times of its words where `print_times` asks for them. Shows a
    progress bar where there are many.
    """
    count = len(comparison.clips)
    first, last = comparison.engines[0], comparison.engines[-1]
    with progress_bar(total=count, task="transcribing", unit="clip", shown=count > MAX_PRINTED_CLIPS) as bar:
        for pool, engine in comparison.transcribe():
            for clip in pool if count <= MAX_PRINTED_CLIPS else ():
                if engine is (first if len(pool) == 1 else last):
                    text = clip.transcripts[first.name].text
                    print(f"{clip.name}  {clip.seconds:.1f} s  {text}", flush=True)
                    if clip.text is not None and word_errors(clip.text, text)[0]:
                        print(f"  text of the clip: {clip.text}", flush=True)
                if engine is last:
                    if len({made.text for made in clip.transcripts.values()}) > 1:
                        rows = [(name, made.text) for name, made in clip.transcripts.items()]
                        print_table([("engine", "transcript"), *rows], indent="  ")
                    for name, draw in clip.draws.items():
                        print(f"  {name} differs from plain ONNX Runtime, {draw}")
                    for word in comparison.words(clip) if print_times else ():
                        start, end = (frame * comparison.config.frame_seconds for frame in (word.start, word.end))
                        sure = f"{100 * word.confidence.max_prob:4.0f} %" if word.confidence else ""
                        print(f"  {start:8.2f} {end:8.2f} {sure}  {word.text}")
            if engine is last:
                bar.update(len(pool))


def print_corpus(comparison: Comparison) -> None:
    """Print one table over all clips, with a line for each engine, and what its columns mean."""
    clips = comparison.clips
    print(f"{len(clips)} clip{'' if len(clips) == 1 else 's'}, {sum(clip.seconds for clip in clips):.0f} s of audio")
    table, notes = corpus_table(comparison)
    print_table(table)
    print("\n".join(notes))
    if len(comparison.folders) > 1 and not comparison.folders[0].is_float32:
        (_, *optimized), (folder, *exported) = comparison.by_folder
        reasons = set()
        for own, former in zip(optimized, exported, strict=True):
            if own and former:
                before, after = (comparison.figures[each.name]["rtfx_without_features"] for each in (former, own))
                reasons.add(why_slower(CLEARLY_SLOWER * before, after, ENCODER.bytes_in(folder.path)))
        for reason in filter(None, reasons):  # the same of both runtimes
            print(reason)
    genai = [engine.name for engine in comparison.engines if engine.kind == GENAI_ENGINE]
    print_flaws(comparison.flaws_table, without_times=genai)


def corpus_table(comparison: Comparison) -> tuple[list[tuple[str, ...]], list[str]]:
    """Titles, and a row of figures over all clips for each engine; and what the columns mean, a line for each."""

    def cell(figures: dict[str, Any], key: str) -> str:
        value = figures.get(key, NONE)
        if isinstance(value, float):
            return f"{value:.1f}"
        return f"{value} of {figures['clips_compared']}" if isinstance(value, int) else str(value)

    library = comparison.reference.name if comparison.reference else ""
    columns = [each for each in COLUMNS if any(each[0] in figures for figures in comparison.figures.values())]
    titles = [title.format(library) for _, title, _ in columns]
    meanings = [meaning.format(library, library or "GenAI") for _, _, meaning in columns]
    rows = [(engine, *(cell(own, key) for key, _, _ in columns)) for engine, own in comparison.figures.items()]
    notes = [f"{title}: {meaning}" for title, meaning in zip(titles, meanings, strict=True)]
    return [("engine", *titles), *rows], notes


# ---- the verdict


def judge(comparison: Comparison, *, with_times: bool) -> None:
    """Say what was compared, and with what result, and warn where the figures mean little.

    with_times: compare times of words with the reference's as well. Raises CheckError as judge_tokens, judge_texts and
    judge_times do.
    """
    float32 = [each for folder, *own in comparison.by_folder if folder.is_float32 for each in reversed(own) if each]
    judged = float32[0].name if float32 else comparison.reference.name if comparison.reference else ""
    print_warnings(
        {engine: [clip.transcripts[engine].text for clip in comparison.clips] for engine in comparison.figures},
        comparison.figures.get(judged, {}).get("normalised_wer"),
    )
    judge_tokens(comparison)
    judge_texts(comparison)
    if with_times:
        judge_times(comparison)


def judge_tokens(comparison: Comparison) -> None:
    """Say on how many clips the tokens are equal, and what was not compared, and list every difference of a float32
    engine; raise CheckError if one has no excuse."""
    library, window = comparison.reference, f"{comparison.config.window_seconds:g} s"
    reference = library.name if library else "plain ONNX Runtime"
    clips = [clip for clip in comparison.clips if clip.one_window or not library]
    pairs = [own for folder, *own in comparison.by_folder if folder.is_float32]
    if library is None:
        print("nothing was compared with NeMo, which did not run")
    if clips and any(any(own) if library else all(own) for own in pairs):
        equal = sum(not clip.differences for clip in clips)
        engine, kind = ("float32 ONNX", " of one window") if library else ("GenAI in float32", "")
        print(f"{engine} equals {reference} token for token on {equal} of {len(clips)} clips{kind}")
    else:
        needed = f"a clip of at most {window}" if library else "both genai and onnx among --engines"
        print(f"nothing was compared with {reference} token for token: that needs a float32 folder and {needed}")
    cut = {engine: each.get("wer_against_nemo_of_several_windows") for engine, each in comparison.figures.items()}
    if words := ", ".join(f"{engine} {rate.percent:.2f} %" for engine, rate in cut.items() if rate):
        print(
            f"{len(comparison.clips) - len(clips)} of {len(comparison.clips)} clips have several windows of {window}, "
            f"and {reference} transcribed them whole; word errors against it: {words}"
        )
    for engine in comparison.figures:
        draws = [clip.draws[engine] for clip in comparison.clips if engine in clip.draws]
        if draws:
            print(
                f"{engine} differs from plain ONNX Runtime on {len(draws)} of {len(comparison.clips)} clips: "
                f"{QUANTIZED}, by logits that are at most {max(draw.margin or 0 for draw in draws):.1e} apart"
            )
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
    pairs = [(onnx.name, genai.name) for _, genai, onnx in comparison.by_folder if genai and onnx]
    library = comparison.reference.name if comparison.reference else None
    if library:
        pairs += [(library, engine.name) for engine in comparison.engines if engine.folder]
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
    if explanations:
        same = sum(not names for names in explanations)
        named = Counter(name for names in explanations for name in names)
        by_rule = "; ".join(f"{name} ({count})" for name, count in named.items())
        print(
            f"{same} transcripts with the tokens of {library} also have its text, letter for letter"
            + (f"; {len(explanations) - same} differ from it by rule: {by_rule}" if named else "")
        )
    elif library and not wrong:
        print(f"no text was compared with {library}'s: no engine has its tokens on a clip with words")
    if wrong:
        print("\n".join(wrong))
        raise CheckError(
            f"the same tokens have different texts in {len(wrong)} cases, listed above; the folder's tokenizer is "
            "broken: make it again with export_tokenizer.py"
        )


def judge_times(comparison: Comparison) -> None:
    """Say how far the times of float32 ONNX's words are from the reference's; raise CheckError beyond the tolerance.

    Only clips of one window are compared whose tokens are the same and none of ids_of_other_words.
    """
    assert comparison.reference, "times are compared with a reference's"
    name = comparison.reference.name
    others = ids_of_other_words(comparison.reference.sentencepiece_model)
    for folder, _, onnx in comparison.by_folder:
        if not onnx or not folder.is_float32:
            continue
        counts, apart = [], [0.0]  # words of each clip that is compared, and frames
        for clip in comparison.clips:
            expected, actual = clip.transcripts[name], clip.transcripts[onnx.name]
            is_same = clip.one_window and expected.tokens == actual.tokens and not others.intersection(expected.tokens)
            if not (is_same and expected.words and actual.hypothesis):
                continue
            words = timed_words(actual.hypothesis.emitted, folder.pieces)  # as NeMo joins them
            counts.append(len(words))
            apart.append(furthest_apart(expected.words, words))
            if apart[-1] > TIMES_TOLERANCE:
                raise CheckError(
                    f"{clip.name}: words begin or end {apart[-1]:g} encoder frames from {name}'s, and the limit is "
                    f"{TIMES_TOLERANCE}: {[word.text for word in words]} for {[word.text for word in expected.words]}"
                )
        found = f"the times of {sum(counts)} words differ from {name}'s by at most {max(apart):g} frames of "
        found = f"{found}{comparison.config.frame_seconds:g} s" if counts else "no times of words were compared"
        if left_out := len(comparison.clips) - len(counts):
            found += f"; {left_out} clips left out, which have several windows, other tokens, tokens that are words of "
            found += f"their own, or no words with times of {name}"
        print(f"{onnx.name}: {found}")
