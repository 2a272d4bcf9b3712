"""What a comparison on speech came to: what was compared with what, where the engines differ, and whether that is an
error. What could not be compared is said, with the reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.clips import Clip
from common.console import CheckError
from common.timestamps import Word, furthest_apart
from common.transcripts import (
    CONFIDENCE,
    Difference,
    TextRule,
    comparable,
    explaining_rules,
    high_error_warning,
    no_rate,
    normalize,
    word_error_rate,
    word_errors,
)

NEMO = "NeMo"
# Furthest that a word's time may be from NeMo's, in encoder frames.
TIMES_TOLERANCE = 1
SEVERAL_WINDOWS = "wer_against_nemo_of_several_windows"


@dataclass(frozen=True)
class Heard:
    """One engine's result on one clip; `seconds` is the time it took, features included."""

    tokens: list[int]
    text: str
    seconds: float
    words: list[Word] | None = None  # where times were asked for, of the engines that tell them


@dataclass
class HeardClip(Clip):
    """One clip and what each engine made of it."""

    seconds: float = 0.0
    heard: dict[str, Heard] = field(default_factory=dict)
    one_window: bool = True  # the encoder sees it whole, as NeMo's does


@dataclass(frozen=True)
class Engines:
    """The two engines of a model folder, by name."""

    genai: str
    raw: str
    is_float32: bool


# Clip, engine, and where it differs.
FoundDifference = tuple[HeardClip, str, Difference]


def percent(reference: str | None, hypothesis: str) -> str:
    """Word error rate of one clip, as written."""
    if reference is None:
        return "–"
    errors, words = word_errors(reference, hypothesis)
    return f"{100 * errors / words:.1f}" if words else no_rate(errors)


def percent_against_nemo(clip: HeardClip, engine: str, rules: Sequence[TextRule]) -> str:
    """The same against NeMo's own text; what differs by rule is no error."""
    if NEMO not in clip.heard or engine == NEMO:
        return percent(None, "")
    return percent(*comparable(clip.heard[NEMO].text, clip.heard[engine].text, rules))


def clip_notes(clip: HeardClip, rules: Sequence[TextRule], window_seconds: float) -> list[str]:
    """What a reader of a clip's table must know: why its rows may differ from NeMo's."""
    if NEMO not in clip.heard:
        return []
    notes = []
    if not clip.one_window:
        notes.append(f"NeMo transcribed this clip whole, GenAI and ONNX Runtime in windows of {window_seconds:g} s")
    named = Counter(name for engine in clip.heard for name in _rules_of(clip, engine, rules))
    if named:
        notes.append(f"differs from NeMo's own text by rule: {'; '.join(named)}")
    return notes


def _rules_of(clip: HeardClip, engine: str, rules: Sequence[TextRule]) -> list[str]:
    """The rules by which a text of NeMo's own tokens differs from NeMo's text."""
    if engine == NEMO or clip.heard[engine].tokens != clip.heard[NEMO].tokens:
        return []
    return explaining_rules(clip.heard[NEMO].text, clip.heard[engine].text, rules) or []


def print_corpus(clips: list[HeardClip], rules: Sequence[TextRule]) -> None:
    """One table over all clips, a line an engine."""
    seconds = sum(clip.seconds for clip in clips)
    print(f"{len(clips)} clips, {seconds:.0f} s; WER with its {CONFIDENCE} % bootstrap interval over clips")
    print("normalised: without case and punctuation (whisper_normalizer)")
    if NEMO in clips[0].heard:
        print("against NeMo: NeMo's own text as written, what differs by rule aside; clips of one window")
    rows = [("engine", "RTFx", "WER", "normalised WER", "against NeMo", "clips with other tokens")]
    for engine in clips[0].heard:
        row = corpus_row(clips, engine, rules)
        rates = [str(row.get(key, "–")) for key in ("wer", "normalised_wer", "wer_against_nemo")]
        other = f"{row['clips_unlike_nemo']} of {row['clips_compared']}" if "clips_compared" in row else "–"
        rows.append((engine, f"{row['rtfx']:.1f}", *rates, other))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def corpus_row(clips: list[HeardClip], engine: str, rules: Sequence[TextRule]) -> dict:
    """One engine's figures over the clips; a rate only where there is something to compare with."""
    heard = [clip.heard[engine] for clip in clips]
    row = {"rtfx": sum(clip.seconds for clip in clips) / sum(one.seconds for one in heard)}
    pairs = [(clip.text, one.text) for clip, one in zip(clips, heard, strict=True) if clip.text is not None]
    if pairs:
        references, hypotheses = zip(*pairs, strict=True)
        row["wer"] = word_error_rate(references, hypotheses)
        row["normalised_wer"] = word_error_rate([*map(normalize, references)], [*map(normalize, hypotheses)])
    if NEMO in clips[0].heard and engine != NEMO:
        whole, cut = [clip for clip in clips if clip.one_window], [clip for clip in clips if not clip.one_window]
        row["clips_compared"], row["clips_of_several_windows"] = len(whole), len(cut)
        row["clips_unlike_nemo"] = sum(clip.heard[engine].tokens != clip.heard[NEMO].tokens for clip in whole)
        for key, chosen in (("wer_against_nemo", whole), (SEVERAL_WINDOWS, cut)):
            if chosen:
                texts = [comparable(clip.heard[NEMO].text, clip.heard[engine].text, rules) for clip in chosen]
                row[key] = word_error_rate(*zip(*texts, strict=True))
    return row


def print_differences(differences: list[FoundDifference]) -> None:
    """A line for each difference of a float32 engine."""
    for clip, engine, difference in differences:
        print(
            f"{clip.path}{clip.segment}: {engine} parts at emission {difference.index}, frame {difference.frame}: "
            f"token {difference.found} for {difference.wanted}; {difference.excuse or 'nothing excuses it'}"
        )


def judge_tokens(differences: list[FoundDifference]) -> None:
    """List every difference of a float32 engine; raise CheckError if one has no excuse."""
    print_differences(differences)
    unexcused = [difference for *_, difference in differences if difference.excuse is None]
    if unexcused:
        raise CheckError(f"float32 ONNX differs from its reference in {len(unexcused)} cases, listed above")


def judge_texts(clips: list[HeardClip], engines: list[Engines], rules: Sequence[TextRule]) -> None:
    """Compare texts of equal tokens: each engine's with NeMo's own, and GenAI's with what `tokenizers` makes of plain
    ONNX Runtime's. Print what was compared; raise CheckError where they differ and no rule says why."""
    with_nemo = NEMO in clips[0].heard
    pairs = [(NEMO, name) for each in engines for name in (each.genai, each.raw)] if with_nemo else []
    pairs += [(each.raw, each.genai) for each in engines]
    same, explained, by_rule, wrong = 0, 0, Counter(), []
    for clip in clips:
        for reference, engine in pairs:
            expected, got = clip.heard[reference], clip.heard[engine]
            if not expected.tokens or expected.tokens != got.tokens:
                continue
            names = explaining_rules(expected.text, got.text, rules if reference == NEMO else ())
            if names is None:
                wrong.append(
                    f"{clip.path}{clip.segment}: {reference} shows its tokens as {expected.text!r}, {engine} the same "
                    f"tokens as {got.text!r}; no rule explains it"
                )
            elif reference == NEMO:
                same, explained = same + (not names), explained + bool(names)
                by_rule.update(names)
    if with_nemo and not (same or explained or wrong):
        print("no text was compared with NeMo's own: no engine has NeMo's tokens on a clip with words")
    elif with_nemo:
        named = "; ".join(f"{name} ({count})" for name, count in by_rule.items())
        print(
            f"of the transcripts with NeMo's tokens {same} are NeMo's own text letter for letter"
            + (f", {explained} by rule: {named}" if explained else "")
        )
    if wrong:
        print("\n".join(wrong))
        raise CheckError(
            f"expected one text for the same tokens, got another in {len(wrong)} cases, listed above; the folder's "
            "tokenizer is broken: make it again with export_tokenizer.py"
        )


def print_verdict(
    clips: list[HeardClip],
    engines: list[Engines],
    differences: list[FoundDifference],
    rules: Sequence[TextRule],
    window_seconds: float,
) -> None:
    """Say what the comparison of tokens came to, and what was not compared."""
    with_nemo = NEMO in clips[0].heard
    if not with_nemo:
        print("nothing was compared with NeMo (--skip_nemo)")
    float32 = [each for each in engines if each.is_float32]
    reference = NEMO if with_nemo else "plain ONNX Runtime"
    compared = [clip for clip in clips if clip.one_window] if with_nemo else clips
    if not float32:
        print("no float32 engine was compared: the folder is optimized, and the exported one is not beside it")
    elif compared:
        differing = {id(clip) for clip, *_ in differences}  # not the path: a file may have several segments
        equal = sum(id(clip) not in differing for clip in compared)
        engine = "float32 ONNX" if with_nemo else "GenAI in float32"
        kind = " of one window" if with_nemo else ""
        print(f"{engine} equals {reference} token for token on {equal} of {len(compared)} clips{kind}")
    else:
        print(f"no clip was compared with NeMo token for token: none fits a window of {window_seconds:g} s")
    rows = {engine: corpus_row(clips, engine, rules) for engine in clips[0].heard}
    cut = {engine: row[SEVERAL_WINDOWS] for engine, row in rows.items() if SEVERAL_WINDOWS in row}
    if cut:
        words = ", ".join(f"{engine} {rate.percent:.2f} %" for engine, rate in cut.items())
        print(
            f"{sum(not clip.one_window for clip in clips)} of {len(clips)} clips have several windows of "
            f"{window_seconds:g} s and are not compared token for token: NeMo transcribed them whole, GenAI and ONNX "
            f"Runtime did not; word errors against NeMo: {words}"
        )


def print_warnings(clips: list[HeardClip], engines: list[Engines], rules: Sequence[TextRule]) -> None:
    """A line for each engine without a word, and one where float32 has most words wrong."""
    for engine in clips[0].heard:
        if not any(clip.heard[engine].text.strip() for clip in clips):
            print(f"warning: every transcript of {engine} is empty, so nothing can be said of its words")
    float32 = [each.raw for each in engines if each.is_float32] or [name for name in (NEMO,) if name in clips[0].heard]
    rate = corpus_row(clips, float32[0], rules).get("normalised_wer") if float32 else None
    warning = high_error_warning(rate) if rate else None
    if warning:
        print(warning)


def judge_times(clips: list[HeardClip], engines: list[Engines], of_other_words: frozenset[int]) -> None:
    """Say how far the words of float32 ONNX are from NeMo's own times; raise CheckError if further than the tolerance.

    Compared are clips of one window whose tokens are the same, without any `of_other_words` (transcripts.py).
    """
    for raw in (each.raw for each in engines if each.is_float32):
        words, furthest, left_out = 0, 0, Counter()
        for clip in clips:
            expected, got = clip.heard[NEMO], clip.heard[raw]
            reason = _why_no_times(clip, expected, got, of_other_words)
            if reason:
                left_out[reason] += 1
                continue
            apart = furthest_apart(expected.words, got.words)
            if apart > TIMES_TOLERANCE:
                raise CheckError(f"{clip.path}{clip.segment}: {_times_error(expected.words, got.words, apart)}")
            words += len(expected.words)
            furthest = max(furthest, apart)
        without = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        if not words:
            print(f"{raw}: no word's times were compared with NeMo's own; clips left out: {without}")
            continue
        print(
            f"{raw}: {words} words, none further from NeMo's own times than {furthest} encoder frames"
            + (f"; clips left out: {without}" if without else "")
        )


def _why_no_times(clip: HeardClip, expected: Heard, got: Heard, of_other_words: frozenset[int]) -> str | None:
    if not clip.one_window:
        return "of several windows"
    if expected.tokens != got.tokens:
        return "with other tokens than NeMo's"
    if not expected.words:
        return "without a word"
    return "with bytes, marks or unknown pieces" if of_other_words.intersection(expected.tokens) else None


def _times_error(expected: list[Word], got: list[Word], apart: float) -> str:
    if apart < float("inf"):
        return f"expected words within {TIMES_TOLERANCE} encoder frame of NeMo's own, got {apart}"
    return f"expected NeMo's own words {[word.text for word in expected]}, got {[word.text for word in got]}"
