"""A stress test of model folders: its flags, the engines, and what it prints."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.cli import Parser
from common.evaluate.conditions import KINDS, Speech
from common.evaluate.engines import LibraryEngine, OpenFolder
from common.evaluate.stress import (
    StressedEngine,
    StressResults,
    StressTest,
    folder_engines,
    genai_engine,
    reference_engine,
    run_stress,
)
from common.evaluate.stress_table import print_stress, print_worst, worst_results, write_worst
from common.evaluate.word_limit import BothModels
from common.run.audio import Clip
from common.run.config import RuntimeConfig

FLOAT32, OPTIMIZED = "float32", "optimized"  # the names of their rows


@dataclass(frozen=True)
class StressOptions:
    """The flags of a stress test, under their own names."""

    stress: Sequence[str] | None = None  # kinds of conditions; empty: all; None: no stress test
    max_lost_words: float | None = None  # percentage points over float32
    stress_dir: Path | None = None  # where the audio of the worst clips is written
    seed: int = 0

    def validate(self) -> None:
        """Raise ValueError for flags that need --stress, an impossible limit, a seed that NumPy does not accept, and a
        folder that is not empty, in which the audio of two runs would be mixed."""
        if self.stress is None and (self.stress_dir or self.max_lost_words is not None):
            raise ValueError("--stress_dir and --max_lost_words expect --stress, got them without")
        if self.max_lost_words is not None and not 0 <= self.max_lost_words < math.inf:
            raise ValueError(f"expected --max_lost_words in points, 0 or more, got {self.max_lost_words}")
        if self.seed < 0:
            raise ValueError(f"expected a --seed of 0 or more, got {self.seed}")
        folder = self.stress_dir
        if folder and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"expected a new or empty folder for the worst clips, got {folder}; give another")


def add_stress_flags(parser: Parser) -> None:
    """Add the fields of StressOptions as flags."""
    kinds = ", ".join(KINDS)
    parser.add_argument("--stress", nargs="*", choices=KINDS, metavar="KIND",
                        help="transcribe the clips where speech is hard, and count the words lost, added and changed; "
                             f"KIND: any of {kinds} (all of them)")  # fmt: skip
    parser.add_argument("--max_lost_words", type=float, metavar="POINTS",
                        help="with --stress: percentage points by which the words that the optimized model loses or "
                             "changes may be more than float32's, under each condition; beyond, exit status 1 "
                             "(no limit)")  # fmt: skip
    parser.add_argument("--stress_dir", type=Path, metavar="FOLDER",
                        help="with --stress: write the audio of the worst clips there")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise of --stress (%(default)s)")


def stress_compared(
    folders: Sequence[OpenFolder], reference: LibraryEngine | None, clips: Sequence[Clip], options: StressOptions
) -> StressResults:
    """Run a stress test on the engines of a comparison. Raises ValueError where there is a limit but no float32 folder
    to compare with, and as run_stress does."""
    optimized, *exported = folders
    names = [OPTIMIZED if exported or not optimized.is_float32 else FLOAT32, FLOAT32]
    if options.max_lost_words is not None and not exported:
        raise ValueError(
            f"--max_lost_words expects an optimized folder and the exported one beside it, got {optimized.path} alone"
        )
    engines = [] if reference is None else [reference_engine(reference.reference)]
    for folder, name in reversed(list(zip(folders, names, strict=False))):
        if folder.onnx_engine:
            engines += folder_engines(name, folder.onnx, folder.spell)
        if folder.genai_engine:
            engines.append(genai_engine(f"{name}, GenAI" if folder.onnx_engine else name, folder.genai))
    baseline = FLOAT32 if exported else names[0] if reference is None else reference.name
    features = reference.features if reference else optimized.genai.features
    test = partial(StressTest, judged=names[0], engines=engines, baseline=baseline, features=features)
    return _run_and_print(test, optimized.config, clips, options)


def stress_optimized(models: BothModels, clips: Sequence[Clip], options: StressOptions) -> StressResults:
    """Run a stress test on an optimized folder that is being made and on its source. Raises as run_stress does."""
    engines: list[StressedEngine] = [
        *folder_engines(FLOAT32, models.float32.folder.onnx, models.float32.folder.spell),
        *folder_engines(OPTIMIZED, models.optimized.folder.onnx, models.genai.folder.genai.text),
    ]
    test = partial(StressTest, judged=OPTIMIZED, engines=engines, baseline=FLOAT32, features=models.genai.features)
    return _run_and_print(test, models.genai.folder.config, clips, options)


def _run_and_print(
    test_of: Callable[..., StressTest], config: RuntimeConfig, clips: Sequence[Clip], options: StressOptions
) -> StressResults:
    """Complete the test with the clips, run it and print its results. Raises as read_clip and run_stress do.

    test_of: gives a StressTest for the arguments that it lacks, above all the clips. All samples are read at once,
    230 MB per hour of audio, since the clips serve as noise for each other.
    """
    test = test_of(
        speech=Speech([config.read_clip(clip) for clip in clips], config.sample_rate, options.seed),
        names=[clip.label for clip in clips],
        texts=[clip.text for clip in clips],
        config=config,
        kinds=options.stress or (),
    )
    results = run_stress(test)
    print_stress(results)
    worst = worst_results(results)
    print_worst(results, worst)
    if options.stress_dir:
        paths = write_worst(options.stress_dir, test, worst)
        print(f"wrote the audio of the worst clips, {len(paths)} files, to {options.stress_dir}")
    return results
