"""The verdict of a comparison: what was compared with what, where the engines differ, and whether that is an error.

What could not be compared is listed too, with the reason.
"""

from collections import Counter
from collections.abc import Sequence

from common.cli import CheckError
from common.evaluate.text_rules import explaining_rules
from common.evaluate.transcripts import NEMO, ComparedClip, Comparison, EngineDifference
from common.evaluate.wer import high_error_warning
from common.evaluate.words import furthest_apart
from common.run.decode import TimedWord

# The largest difference of a word's start or end from the reference's, in encoder frames.
TIMES_TOLERANCE = 1


def print_and_judge(comparison: Comparison) -> None:
    """Say what was compared, and with what result. Raises CheckError as judge_tokens and judge_texts do."""
    print_warnings(comparison)
    print_verdict(comparison)
    judge_tokens(comparison.differences)
    judge_texts(comparison)


def print_warnings(comparison: Comparison) -> None:
    """Warn of each engine whose transcripts are all empty, and of a float32 engine that has most words wrong."""
    for engine in comparison.figures:
        if not any(clip.transcripts[engine].text.strip() for clip in comparison.clips):
            print(f"warning: every transcript of {engine} is empty, so its word errors mean nothing")
    names = [name for each in comparison.float32_engines for name in reversed(each.names)] or [NEMO]
    rate = comparison.figures[names[0]].normalised_wer if names[0] in comparison.figures else None
    warning = high_error_warning(rate) if rate else None
    if warning:
        print(warning)


def print_verdict(comparison: Comparison) -> None:
    """Say what the comparison of tokens found, and what was not compared."""
    if comparison.reference is None:
        print("nothing was compared with NeMo (--skip_nemo)")
    reference = comparison.reference or "plain ONNX Runtime"
    compared = comparison.clips_of_one_window if comparison.reference else comparison.clips
    if not comparison.float32_engines:
        print("no float32 engine was compared: the exported folder is not beside the optimized one, or was not chosen")
    elif comparison.reference is None and all(len(each.names) < 2 for each in comparison.float32_engines):
        print("no engines were compared token for token: of each float32 folder one engine ran")
    elif compared:
        differing = {id(each.clip) for each in comparison.differences}  # not the path: a file may have several segments
        equal = sum(id(clip) not in differing for clip in compared)
        engine = "float32 ONNX" if comparison.reference else "GenAI in float32"
        kind = " of one window" if comparison.reference else ""
        print(f"{engine} equals {reference} token for token on {equal} of {len(compared)} clips{kind}")
    else:
        print(
            f"no clip was compared with {reference} token for token: none fits a window of "
            f"{comparison.window_seconds:g} s, and {reference} transcribes a clip whole"
        )
    _print_clips_of_several_windows(comparison)


def _print_clips_of_several_windows(comparison: Comparison) -> None:
    rates = {engine: row.wer_against_nemo_of_several_windows for engine, row in comparison.figures.items()}
    words = ", ".join(f"{engine} {rate.percent:.2f} %" for engine, rate in rates.items() if rate)
    name = comparison.reference
    if words:
        print(
            f"{len(comparison.clips_of_several_windows)} of {len(comparison.clips)} clips have several windows of "
            f"{comparison.window_seconds:g} s and are not compared token for token: {name} transcribed them whole, "
            f"GenAI and ONNX Runtime did not; word errors against {name}: {words}"
        )


def judge_tokens(differences: Sequence[EngineDifference]) -> None:
    """List every difference of a float32 engine; raise CheckError if one has no excuse."""
    for each in differences:
        print(f"{each.clip.name}: {each.engine}, {describe(each)}")
    unexcused = sum(each.difference.excuse is None for each in differences)
    if unexcused:
        raise CheckError(f"float32 ONNX differs from its reference in {unexcused} cases, listed above")


def describe(each: EngineDifference) -> str:
    """One difference in words; tokens are counted from 1."""
    difference = each.difference
    reason = difference.excuse or "nothing excuses it"
    place = f"token {difference.index + 1} of the transcript, encoder frame {difference.frame}"
    if difference.expected == difference.actual:
        return f"{place}: token {difference.expected} is emitted at another frame; {reason}"
    expected, actual = ("no token" if token is None else token for token in (difference.expected, difference.actual))
    return f"{place}: expected {expected}, got {actual}; {reason}"


def judge_texts(comparison: Comparison) -> None:
    """Compare texts of equal tokens: each engine's with the reference's own, and GenAI's with what `tokenizers` makes
    of plain ONNX Runtime's. Print what was compared; raise CheckError where texts differ and no rule explains it."""
    pairs = [(each.raw, each.genai) for each in comparison.engines if each.raw and each.genai]
    name_of_reference = comparison.reference
    if name_of_reference:
        pairs = [(name_of_reference, name) for each in comparison.engines for name in each.names] + pairs
    explanations: list[list[str]] = []  # of each text compared with the reference's own, the rules by which it differs
    wrong = []
    for clip in comparison.clips:
        for reference, engine in pairs:
            expected, actual = clip.transcripts[reference], clip.transcripts[engine]
            if not expected.tokens or expected.tokens != actual.tokens:
                continue
            rules = comparison.rules if reference == name_of_reference else ()
            names = explaining_rules(expected.text, actual.text, rules)
            if names is None:
                wrong.append(
                    f"{clip.name}: {reference} shows its tokens as {expected.text!r}, {engine} the same tokens as "
                    f"{actual.text!r}; no rule explains it"
                )
            elif reference == name_of_reference:
                explanations.append(names)
    if name_of_reference and (explanations or not wrong):
        print(_texts_summary(explanations, name_of_reference))
    if wrong:
        print("\n".join(wrong))
        raise CheckError(
            f"expected one text for the same tokens, got another in {len(wrong)} cases, listed above; the folder's "
            "tokenizer is broken: make it again with export_tokenizer.py"
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
    for raw in (each.raw for each in comparison.float32_engines if each.raw):
        words = 0
        furthest = 0.0
        left_out: Counter[str] = Counter()
        for clip in comparison.clips:
            if reason := _why_no_times(clip, raw, ids_of_other_words):
                left_out[reason] += 1
                continue
            expected, actual = clip.expected.words or [], clip.transcripts[raw].words or []
            apart = furthest_apart(expected, actual)
            if apart > TIMES_TOLERANCE:
                raise CheckError(f"{clip.name}: {_times_error(comparison.reference, expected, actual, apart)}")
            words += len(expected)
            furthest = max(furthest, apart)
        without = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        if not words:
            name = comparison.reference
            print(f"{raw}: no times of words were compared with those of {name}; clips left out: {without}")
            continue
        print(
            f"{raw}: {words} words; their times differ from those of {comparison.reference} by at most {furthest:g} "
            f"frames of {comparison.frame_seconds:g} s" + (f"; clips left out: {without}" if without else "")
        )


def _why_no_times(clip: ComparedClip, raw: str, ids_of_other_words: frozenset[int]) -> str | None:
    expected, actual = clip.expected, clip.transcripts[raw]
    if not clip.one_window:
        return "of several windows"
    if expected.tokens != actual.tokens:
        return f"with other tokens than {clip.reference}"
    if expected.words is None:
        return f"to whose words {clip.reference} gives no times"
    if not expected.words:
        return "without a word"
    return "with bytes, marks or unknown pieces" if ids_of_other_words.intersection(expected.tokens) else None


def _times_error(name: str | None, expected: Sequence[TimedWord], actual: Sequence[TimedWord], apart: float) -> str:
    if apart < float("inf"):
        return f"expected words within {TIMES_TOLERANCE} encoder frame of those of {name}, got {apart:g}"
    return f"expected the words of {name}, {[word.text for word in expected]}, got {[word.text for word in actual]}"
