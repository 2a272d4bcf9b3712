"""Confidences of plain ONNX Runtime: how far they are from NeMo's own, and how often words are right at each of them.

    python -m benchmarks.confidence --model_name samples/parakeet-tdt-tiny.nemo --model_dir onnx_models \
        --manifest samples/manifest.jsonl

Out: for each measure the largest difference over the clips on which both emit the same tokens, token by token and word
by word, and a markdown table of its reliability against the texts. NeMo decodes each clip once for each measure.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.bench import machine
from common.cli import quiet_libraries
from common.evaluate.words import Pieces, comparable_words, timed_words, word_runs
from common.run.audio import read_clips
from common.run.decode import BlankZero
from common.run.ort import OnnxRuntime
from common.run.reference import Nemo

# Fields of Confidence, with NeMo's configuration of the same measure; settings not named here have NeMo's default.
METHODS = {"max_prob": {"name": "max_prob", "alpha": 1.0}, "entropy": {"name": "entropy"}}
# Upper ends of the bins of confidence; most words are near 1, where the bins are narrow.
BIN_ENDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


def words_right(text: str, words: Sequence[str]) -> list[bool]:
    """Whether each word of a transcript is a word of the text, in an alignment with the fewest errors."""
    right = [False] * len(words)
    for _, other, is_equal in word_runs(comparable_words(text.split()), comparable_words(words)):
        if is_equal:
            right[other.start : other.stop] = [True] * len(other)
    return right


@dataclass(frozen=True)
class Bin:
    """The words whose confidence is at least `low` and below `high`; only the last bin includes `high`."""

    low: float
    high: float
    words: int
    right: int
    mean: float  # confidence of these words

    @property
    def share_right(self) -> float:
        return self.right / self.words


def bins(words: Iterable[tuple[float, bool]]) -> list[Bin]:
    """Pairs of a confidence in 0 … 1 and whether the word is right → the bins that have words."""
    pairs = list(words)
    made = []
    for low, high in zip((0.0, *BIN_ENDS), BIN_ENDS, strict=False):
        own = [(sure, right) for sure, right in pairs if low <= sure and (sure < high or high == BIN_ENDS[-1])]
        if own:
            mean = sum(sure for sure, _ in own) / len(own)
            made.append(Bin(low, high, len(own), sum(right for _, right in own), mean))
    return made


def calibration_error(made: Sequence[Bin]) -> float:
    """Expected calibration error (Naeini et al., AAAI 2015): how far the confidence and the share of right words are
    apart, on average over the words."""
    words = sum(each.words for each in made)
    return sum(each.words * abs(each.share_right - each.mean) for each in made) / max(words, 1)


def nemo_confidences(model: Any, method: dict[str, Any]) -> Callable[[np.ndarray], Any]:
    """A function of features [M, T] that gives NeMo's own Hypothesis, with token_confidence and word_confidence."""
    import torch
    from nemo.collections.asr.parts.submodules.rnnt_decoding import RNNTBPEDecoding
    from omegaconf import OmegaConf

    config = model.cfg.decoding.copy()
    config.strategy = "greedy_batch"
    confidence = {"preserve_word_confidence": True, "method_cfg": method}
    OmegaConf.update(config, "confidence_cfg", confidence, force_add=True)
    decoding = RNNTBPEDecoding(config, model.decoder, model.joint, model.tokenizer)

    def decode(features: np.ndarray) -> Any:
        with torch.inference_mode():
            encoded = model.encoder(
                audio_signal=torch.from_numpy(features)[None], length=torch.tensor([features.shape[1]])
            )
            return decoding.rnnt_decoder_predictions_tensor(*encoded, return_hypotheses=True)[0]

    return decode


def largest(differences: list[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(differences)).max()) if differences else 0.0


def main(argv: list[str] | None = None) -> int:
    from common.checkpoint.find import find_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", type=Path, required=True, help="the .nemo file of --model_dir")
    parser.add_argument("--model_dir", type=Path, required=True, help="its exported folder")
    parser.add_argument("--manifest", type=Path, required=True, help="clips with texts")
    args = parser.parse_args(argv)
    quiet_libraries()
    model = find_checkpoint(str(args.model_name)).load_model()
    nemo, raw, pieces = Nemo(model), OnnxRuntime(args.model_dir), Pieces.read(args.model_dir)
    decoders = {field: nemo_confidences(model, method) for field, method in METHODS.items()}
    tokens, words = ({field: [] for field in METHODS} for _ in range(2))  # differences, an array for each clip
    judged = {field: [] for field in METHODS}  # confidence of a word and whether it is right
    clips = read_clips(args.manifest, with_text=True)
    same = 0
    for clip in tqdm(clips, unit="clip", leave=False, disable=None):
        features = nemo.features(raw.config.read_clip(clip))
        found = raw.transcribe(features, BlankZero.NEMO)
        own = timed_words(found.emitted, pieces)
        right = words_right(clip.text, [word.text for word in own])
        for field, decode in decoders.items():
            confidences = [getattr(word.confidence, field) for word in own]
            judged[field] += zip(confidences, right, strict=True)
            expected = decode(features)
            if found.tokens == [int(token) for token in expected.y_sequence]:
                same += field == next(iter(METHODS))
                of_tokens = [getattr(step.confidence, field) for step in found.emitted]
                tokens[field].append(np.subtract(of_tokens, expected.token_confidence))
                words[field].append(np.subtract(confidences, expected.word_confidence))

    print(machine())
    print(f"{same} of {len(clips)} clips have NeMo's tokens")
    for field, pairs in judged.items():
        counts = [sum(map(len, differences[field])) for differences in (tokens, words)]
        print(f"\n{field}: from NeMo's by at most {largest(tokens[field]):.1e} on {counts[0]} tokens and "
              f"{largest(words[field]):.1e} on {counts[1]} words; expected calibration error of {len(pairs)} words "
              f"{calibration_error(bins(pairs)):.3f}\n")  # fmt: skip
        print("| confidence | words | mean | right |\n|---|---|---|---|")
        for each in bins(pairs):
            print(f"| {each.low:g} to {each.high:g} | {each.words} | {each.mean:.3f} | {each.share_right:.3f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
