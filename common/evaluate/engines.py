"""The engines of a comparison: NeMo or transformers, and each folder in ONNX Runtime GenAI and plain ONNX Runtime.

An engine is loaded when it is first asked for, and then runs once on noise, since a first run allocates memory. Plain
ONNX Runtime computes no features: it is given NeMo's or, without NeMo, GenAI's, which is loaded for that.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from common.checkpoint import transformers
from common.checkpoint.find import FORMAT_HELP, FORMAT_NAMES, find_checkpoint, recorded_checkpoint
from common.cli import Parser
from common.evaluate.words import Pieces, timed_words
from common.folder import CHECKPOINT, EXPORTED, FILES, MANIFEST, is_float16, read_location, read_manifest
from common.layouts.genai import GENAI
from common.layouts.layout import check_same_checkpoint
from common.run.audio import Clip
from common.run.config import RuntimeConfig
from common.run.decode import BlankZero, Transcript
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime, OpenGraph, OrtGraph
from common.run.reference import Nemo, Reference, Transformers

# What --engines and --folders choose from.
NEMO_ENGINE, GENAI_ENGINE, ONNX_ENGINE = ENGINES = ("nemo", "genai", "onnx")
OPTIMIZED_FOLDER, EXPORTED_FOLDER, BOTH_FOLDERS = FOLDERS = ("optimized", "exported", "both")
WARM_UP_FRAMES = 100  # of features

P = ParamSpec("P")
R = TypeVar("R")


def timed(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, float]:
    """The result of a call, and the seconds that it took."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


@dataclass(eq=False)
class Recording:
    """Samples to transcribe, and their features for the engines that compute none, made when first asked for."""

    samples: np.ndarray  # [N], mono, at the model's rate
    features_by: Reference | GenAI
    features_seconds: float = field(default=0.0, init=False)  # that the features took, once they are made

    @cached_property
    def features(self) -> np.ndarray:
        """[M, T]."""
        features, self.features_seconds = timed(self.features_by.features, self.samples)
        return features


class OpenFolder:
    """A model folder whose runtimes are loaded when they are first used.

    open_graph: how plain ONNX Runtime loads each graph.
    """

    def __init__(self, path: Path, open_graph: OpenGraph = OrtGraph) -> None:
        self.path = path
        self.config = RuntimeConfig.read(path)
        self._open_graph = open_graph

    @cached_property
    def is_float32(self) -> bool:
        """Whether the weights are as exported, unquantized and float32, so that it must equal the reference."""
        manifest = read_manifest(self.path)
        if "optimize" not in manifest:
            return not is_float16(manifest)
        flags = manifest["optimize"].get("flags", {})
        return bool(flags.get("skip_quantization")) and flags.get("decoder_joint_precision", "fp32") == "fp32"

    @cached_property
    def genai(self) -> GenAI:
        """GenAI, which also computes the features where there is no reference."""
        genai = GenAI(self.path)
        genai.transcribe(self.noise())
        return genai

    @cached_property
    def onnx(self) -> OnnxRuntime:
        """Plain ONNX Runtime."""
        onnx = OnnxRuntime(self.path, self._open_graph)
        mels = onnx.encoder.session.get_inputs()[0].shape[1]
        onnx.transcribe(np.random.default_rng(0).standard_normal((mels, WARM_UP_FRAMES), dtype=np.float32))
        return onnx

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces.read(self.path)

    def noise(self) -> np.ndarray:
        """A second of noise, [samples], to warm an engine up with."""
        return np.random.default_rng(0).normal(0, 0.1, self.config.sample_rate).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Engine:
    """What transcribes: the library that a checkpoint belongs to, or a runtime with a model folder.

    `transcribe` gives a transcript of each recording. It raises ValueError where the model gives no numbers, and
    ValueError or FileNotFoundError where the model is loaded now and that fails.
    """

    name: str  # of its rows and its results; no other engine of a comparison has it
    kind: str  # of ENGINES
    transcribe: Callable[[Sequence[Recording]], list[Transcript]]
    folder: OpenFolder | None = None  # None: the library


def library_engine(reference: Reference, *, with_times: bool = False) -> Engine:
    """NeMo or transformers, which encode every recording in one window. with_times: whether to give words."""

    def transcribe(recording: Recording) -> Transcript:
        made, seconds = timed(reference.transcribe, recording.features)
        words = reference.words(recording.features) if with_times else None
        before = recording.features_seconds
        return replace(made, seconds=before + seconds, features_seconds=before, words=words)

    return Engine(reference.name, NEMO_ENGINE, lambda recordings: list(map(transcribe, recordings)))


def genai_engine(name: str, folder: OpenFolder) -> Engine:
    """A folder in GenAI, which computes its own features and text, and gives no times."""

    def transcribe(recording: Recording) -> Transcript:
        inputs, before = timed(folder.genai.inputs, recording.samples)
        tokens, seconds = timed(folder.genai.generate, inputs, len(recording.samples))
        return Transcript(tokens, folder.genai.text(tokens), before + seconds, before)

    return Engine(name, GENAI_ENGINE, lambda recordings: list(map(transcribe, recordings)), folder)


def onnx_engine(
    name: str, folder: OpenFolder, *, rule: BlankZero = BlankZero.GENAI, batch_size: int = 1, whole: bool = False
) -> Engine:
    """A folder in plain ONNX Runtime, which is given the features of another engine.

    whole: encode every recording in one window, however long it is. The time of several recordings is divided among
    them by their length.
    """

    def transcribe(recordings: Sequence[Recording]) -> list[Transcript]:
        features = [recording.features for recording in recordings]
        made, seconds = timed(folder.onnx.transcribe_all, features, rule, batch_size, whole=whole)
        per_sample = seconds / sum(len(recording.samples) for recording in recordings)
        return [
            Transcript(
                hypothesis.tokens,
                folder.pieces.spell(hypothesis.tokens),
                recording.features_seconds + per_sample * len(recording.samples),
                recording.features_seconds,
                hypothesis.frames,
                timed_words(hypothesis.emitted, folder.pieces, folder.config.frame_seconds),
                hypothesis,
            )
            for recording, hypothesis in zip(recordings, made, strict=True)
        ]

    return Engine(name, ONNX_ENGINE, transcribe, folder)


# ---- the engines and the folders of a command line


def add_engine_flags(parser: Parser) -> None:
    """Add --engines, --folders and the flags for the reference's checkpoint."""
    parser.add_argument("--engines", type=engine_names, metavar="LIST",
                        help=f"engines to run, separated by commas ({','.join(ENGINES)}; with --stress nemo,onnx); "
                             "onnx without nemo is given the features of GenAI, which is loaded for them")  # fmt: skip
    parser.add_argument("--folders", choices=FOLDERS, default=BOTH_FOLDERS,
                        help="the optimized folder, the exported one that it was made from, or both if there "
                             "are both (%(default)s)")  # fmt: skip
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--model_name", help="checkpoint of the reference (the one in manifest.json)")
    reference.add_argument("--skip_nemo", action="store_true", help="do without NeMo, which is then not even imported")
    parser.add_argument("--checkpoint_format", choices=FORMAT_NAMES, help=FORMAT_HELP)


def engine_names(text: str) -> frozenset[str]:
    """The value of --engines. Raises ArgumentTypeError for a name that is not one of ENGINES."""
    names = frozenset(text.split(","))
    if not names <= {*ENGINES}:
        raise argparse.ArgumentTypeError(f"{text} names an engine that is not one of {','.join(ENGINES)}")
    return names


def open_folders(path: Path, folders: str = BOTH_FOLDERS) -> list[OpenFolder]:
    """The folder at `path`, and the exported folder that it was optimized from, where that is still there.

    folders: one of FOLDERS; a folder that is asked for alone must be there.
    Raises ValueError or FileNotFoundError, naming the command that repairs the folder, where one lacks a file or holds
    parts of different checkpoints.
    """
    is_optimized = "optimize" in read_manifest(path)
    exported = read_location(path, EXPORTED)
    beside = [exported.resolve()] if exported and exported.is_dir() else []
    if folders == OPTIMIZED_FOLDER and not is_optimized:
        raise ValueError(f"--folders {folders} needs an optimized folder; {path} is an exported one")
    alone = beside if folders == EXPORTED_FOLDER and is_optimized else [path]
    if not alone:
        raise FileNotFoundError(
            f"the exported folder that {path} was optimized from is not there; name it as --model_dir"
        )
    paths = [path, *beside] if folders == BOTH_FOLDERS else alone
    for each in paths:
        GENAI.check_one_checkpoint(each)
        check_same_checkpoint(path, each)
    return [OpenFolder(each) for each in paths]


def input_files(folders: Sequence[OpenFolder], clips: Sequence[Clip], *named: Path | str | None) -> Iterator[Path]:
    """The files that a comparison reads, which no result may overwrite; `named`: those on its command line, if any."""
    yield from (Path(path) for path in named if path)
    yield from (clip.path for clip in clips)
    for folder in folders:
        yield from (folder.path / name for name in {MANIFEST, *GENAI.files, *read_manifest(folder.path).get(FILES, {})})
        if checkpoint := read_location(folder.path, CHECKPOINT):
            yield checkpoint


def load_reference(
    folder: OpenFolder, model_name: str | None = None, checkpoint_format: str | None = None
) -> Reference:
    """Load the reference.

    model_name: the checkpoint, or None for the one that `folder` was exported from.
    Raises ValueError where the vocabulary is not the folder's, and as find_checkpoint and recorded_checkpoint do.
    """
    from common.export.pipeline import suppress, suppressed_ids  # not needed where a folder is only run

    if model_name:
        checkpoint = find_checkpoint(model_name, checkpoint_format=checkpoint_format)
    else:
        checkpoint = recorded_checkpoint(folder.path)
    model = checkpoint.load_model()
    scripts = read_manifest(folder.path).get("export", {}).get("flags", {}).get("scripts")
    suppress(model.joint, suppressed_ids(checkpoint.tokenizer, scripts))  # as in the folder
    reference: Reference = Transformers(model) if checkpoint.format == transformers.NAME else Nemo(model)
    if reference.model.decoder.blank_idx != folder.config.blank_id:
        raise ValueError(
            f"{folder.path} was exported from another checkpoint than {checkpoint.path}, which has another vocabulary; "
            "give another --model_name"
        )
    reference.transcribe(reference.features(folder.noise()))
    return reference


def engines_of(
    folders: Sequence[OpenFolder],
    kinds: frozenset[str],
    reference: Reference | None,
    *,
    batch_size: int = 1,
    with_times: bool = False,
) -> list[Engine]:
    """The reference, then GenAI and plain ONNX Runtime on each folder, as far as `kinds`, of ENGINES, names them.

    batch_size: the number of clips that plain ONNX Runtime takes at a time. with_times: whether the reference gives
    words as well.
    """
    engines = [library_engine(reference, with_times=with_times)] if reference else []
    rule = BlankZero.NEMO if reference else BlankZero.GENAI
    for folder, label in zip(folders, labels([folder.path for folder in folders]), strict=True):
        if GENAI_ENGINE in kinds:
            engines.append(genai_engine(f"GenAI {label}", folder))
        if ONNX_ENGINE in kinds:
            engines.append(onnx_engine(f"ONNX Runtime {label}", folder, rule=rule, batch_size=batch_size))
    return engines


def labels(folders: Sequence[Path]) -> list[str]:
    """A label for each folder that no other has: its name, with as many folders above it as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    length = 1
    while len({each[-length:] for each in parts}) < len(set(parts)):
        length += 1
    return ["/".join(each[-length:]) for each in parts]
