"""The manifests of clips that optimize_encoder.py is given: to fit weights to, and to count word errors on."""

from pathlib import Path

from common.cli import warn
from common.evaluate.wer import normalize
from common.layouts import LAYOUTS
from common.quantize.methods import OptimizeOptions
from common.run.audio import Clip, read_clips, shared_clips
from common.run.config import RuntimeConfig


def read_speech_manifests(
    options: OptimizeOptions, source: Path, speech_folder: str | None
) -> tuple[list[Clip], list[Clip]]:
    """The clips of --calibration_manifest and of --eval_manifest, none where there is no manifest.

    Called before the work: raises ValueError where no folder's runtime computes their features, or no text has a word,
    and as read_clips and check_clips do. Warns of clips in both, since a model does better on what it was fitted to.
    """
    if speech_folder is None and (options.calibration_manifest or options.eval_manifest):
        able = " or ".join(layout.runtime for layout in LAYOUTS.values() if layout.measures_speech)
        raise ValueError(
            f"--calibration_manifest and --eval_manifest expect a folder for {able}, which computes their features, "
            f"got none in {source}; export with --runtime all"
        )
    calibration = read_clips(options.calibration_manifest) if options.calibration_manifest else []
    evaluation = read_clips(options.eval_manifest, with_text=True) if options.eval_manifest else []
    if evaluation and not any(normalize(clip.text or "") for clip in evaluation):
        raise ValueError(f"expected words in the texts of {options.eval_manifest}, got none; add texts")
    if speech_folder is not None:
        RuntimeConfig.read(source / speech_folder).check_clips((*calibration, *evaluation))
    if shared := shared_clips(evaluation, calibration):
        warn(
            f"{len(shared)} of {len(evaluation)} clips of --eval_manifest are in --calibration_manifest too, such as "
            f"{shared[0].path}{shared[0].segment}; the word error rate on them is better than on other speech"
        )
    return calibration, evaluation
