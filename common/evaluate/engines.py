"""The engines of a comparison: NeMo or transformers, and each folder in ONNX Runtime GenAI and plain ONNX Runtime.

An engine is loaded when it is first asked for, and then runs once on noise, since a first run allocates memory. Plain
ONNX Runtime computes no features: it is given NeMo's or, without NeMo, those of GenAI, which is loaded to compute them.
"""

import argparse
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from tokenizers import Tokenizer

from common.checkpoint import transformers
from common.checkpoint.find import FORMAT_HELP, FORMAT_NAMES, find_checkpoint, recorded_checkpoint
from common.cli import Parser
from common.evaluate.text_rules import TextRule, text_rules
from common.evaluate.words import Pieces, timed_words
from common.export.scripts import suppress, suppressed_ids
from common.folder import CHECKPOINT, EXPORTED, FILES, MANIFEST, is_float16, read_location, read_manifest
from common.layouts.genai import GENAI
from common.layouts.layout import check_same_checkpoint
from common.run.audio import Clip
from common.run.config import RuntimeConfig
from common.run.decode import BlankZero, Hypothesis, TimedWord, Transcript
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime, OpenGraph, OrtGraph
from common.run.reference import Nemo, Reference, Transformers

# What --engines and --folders choose from.
NEMO_ENGINE, GENAI_ENGINE, ONNX_ENGINE = ENGINES = ("nemo", "genai", "onnx")
OPTIMIZED_FOLDER, EXPORTED_FOLDER, BOTH_FOLDERS = FOLDERS = ("optimized", "exported", "both")
WARM_UP_FRAMES = 100  # of features

P = ParamSpec("P")
R = TypeVar("R")


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


@dataclass(eq=False)
class Engine(ABC):
    """A model in the library or the runtime that transcribes with it.

    It is loaded when it is first used, and then runs once on noise, since a first run allocates memory.
    """

    name: str  # of its rows and its results; no other engine of a comparison has it

    @abstractmethod
    def transcribe(self, recordings: Sequence[Recording]) -> list[Transcript]:
        """A transcript of each recording. Raises ValueError where the model gives no numbers, and ValueError or
        FileNotFoundError where it is loaded now and that fails."""


class LibraryEngine(Engine):
    """The reference: NeMo or transformers, which encode every recording in one window."""

    def __init__(self, reference: Reference, rules: Sequence[TextRule] = (), *, with_times: bool = False) -> None:
        """rules: those by which its text may differ from an exported folder's. with_times: whether to give words."""
        super().__init__(reference.name)
        self.reference = reference
        self.rules = rules
        self.with_times = with_times

    def transcribe(self, recordings: Sequence[Recording]) -> list[Transcript]:
        transcripts = []
        for recording in recordings:
            made, seconds = timed(self.reference.transcribe, recording.features)
            transcripts.append(
                replace(
                    made,
                    seconds=recording.features_seconds + seconds,
                    features_seconds=recording.features_seconds,
                    words=self.reference.words(recording.features) if self.with_times else None,
                )
            )
        return transcripts


@dataclass(eq=False)
class GenAIEngine(Engine):
    """A model folder in GenAI, which computes its own features and text, and gives no times."""

    folder: "OpenFolder"

    def transcribe(self, recordings: Sequence[Recording]) -> list[Transcript]:
        genai = self.folder.genai
        transcripts = []
        for recording in recordings:
            inputs, features_seconds = timed(genai.inputs, recording.samples)
            tokens, seconds = timed(genai.generate, inputs, len(recording.samples))
            transcripts.append(Transcript(tokens, genai.text(tokens), features_seconds + seconds, features_seconds))
        return transcripts


@dataclass(eq=False)
class OnnxEngine(Engine):
    """A model folder in plain ONNX Runtime, which is given the features of another engine."""

    folder: "OpenFolder"
    _: KW_ONLY
    rule: BlankZero = BlankZero.GENAI
    batch_size: int = 1
    whole: bool = False  # whether to encode every recording in one window, however long it is
    with_times: bool = False  # whether to give words
    spell: Callable[[list[int]], str] | None = None  # the text of tokens; None: by the folder's tokenizer.json

    def transcribe(self, recordings: Sequence[Recording]) -> list[Transcript]:
        """A transcript of each recording; the time of all of them is divided among them by their length."""
        features = [recording.features for recording in recordings]
        onnx = self.folder.onnx
        hypotheses, seconds = timed(onnx.transcribe_all, features, self.rule, self.batch_size, whole=self.whole)
        per_sample = seconds / sum(len(recording.samples) for recording in recordings)
        spell = self.spell or self.folder.spell
        return [
            Transcript(
                hypothesis.tokens,
                spell(hypothesis.tokens),
                recording.features_seconds + per_sample * len(recording.samples),
                recording.features_seconds,
                hypothesis.frames,
                self._words(hypothesis, self.folder.config.frame_seconds),
                self._words(hypothesis),
                hypothesis,
            )
            for recording, hypothesis in zip(recordings, hypotheses, strict=True)
        ]

    def _words(self, hypothesis: Hypothesis, frame_seconds: float = 0.0) -> list[TimedWord] | None:
        return timed_words(hypothesis.emitted, self.folder.pieces, frame_seconds) if self.with_times else None


class OpenFolder:
    """A model folder whose runtimes are loaded when they are first used.

    open_graph: how plain ONNX Runtime loads each graph.
    """

    def __init__(self, path: Path, open_graph: OpenGraph = OrtGraph) -> None:
        self.path = path
        self.config = RuntimeConfig.read(path)
        self._open_graph = open_graph
        self.genai_engine: GenAIEngine | None = None  # the engines of a comparison; None where they are not to run
        self.onnx_engine: OnnxEngine | None = None

    @property
    def engines(self) -> list[Engine]:
        """The engines of a comparison that run this folder, in their order."""
        return [engine for engine in (self.genai_engine, self.onnx_engine) if engine is not None]

    @cached_property
    def is_float32(self) -> bool:
        """Whether the weights are those of the export, unquantized and float32, so that it must equal the reference."""
        manifest = read_manifest(self.path)
        if is_float16(manifest):
            return False
        if "optimize" not in manifest:
            return True
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

    @cached_property
    def spell(self) -> Callable[[list[int]], str]:
        """A function that gives the text of tokens, by Hugging Face's reader of the folder's tokenizer.json."""
        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        return lambda tokens: str(tokenizer.decode(tokens)).strip()

    def noise(self) -> np.ndarray:
        """A second of noise, [samples], to warm an engine up with."""
        return np.random.default_rng(0).normal(0, 0.1, self.config.sample_rate).astype(np.float32)


def input_files(folders: Sequence[OpenFolder], clips: Sequence[Clip], *named: Path | str | None) -> Iterator[Path]:
    """The files that a comparison reads, which no result may overwrite; `named`: those on its command line, if any."""
    yield from (Path(path) for path in named if path)
    yield from (clip.path for clip in clips)
    for folder in folders:
        manifest = read_manifest(folder.path)
        yield from (folder.path / name for name in {MANIFEST, *GENAI.files, *manifest.get(FILES, {})})
        if checkpoint := read_location(folder.path, CHECKPOINT):
            yield checkpoint


def open_folders(
    path: Path, engines: frozenset[str], folders: str = BOTH_FOLDERS, *, batch_size: int = 1, with_times: bool = False
) -> list[OpenFolder]:
    """The folder at `path`, and the exported folder that it was optimized from, where that is still there.

    engines: those of ENGINES that run.
    folders: one of FOLDERS; a folder that is asked for alone must be there.
    batch_size: the number of clips that plain ONNX Runtime takes at a time.
    with_times: whether words are given with their times as well.
    Raises ValueError or FileNotFoundError, naming the command that repairs the folder, where one lacks a file or holds
    parts of different checkpoints.
    """
    paths = _chosen_folders(path, folders)
    for each in paths:
        GENAI.check_one_checkpoint(each)
        check_same_checkpoint(path, each)
    opened = [OpenFolder(each) for each in paths]
    for folder, label in zip(opened, labels(paths), strict=True):
        if GENAI_ENGINE in engines:
            folder.genai_engine = GenAIEngine(f"GenAI {label}", folder)
        if ONNX_ENGINE in engines:
            folder.onnx_engine = OnnxEngine(
                f"ONNX Runtime {label}",
                folder,
                rule=BlankZero.NEMO if NEMO_ENGINE in engines else BlankZero.GENAI,
                batch_size=batch_size,
                with_times=with_times,
            )
    return opened


def labels(folders: Sequence[Path]) -> list[str]:
    """A label for each folder that no other has: its name, with as many folders above it as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    length = 1
    while len({each[-length:] for each in parts}) < len(set(parts)):
        length += 1
    return ["/".join(each[-length:]) for each in parts]


def _chosen_folders(path: Path, folders: str) -> list[Path]:
    is_optimized = "optimize" in read_manifest(path)
    exported = read_location(path, EXPORTED)
    beside = [exported.resolve()] if exported and exported.is_dir() else []
    if folders == BOTH_FOLDERS:
        return [path, *beside]
    if folders == OPTIMIZED_FOLDER and not is_optimized:
        raise ValueError(f"--folders {folders} needs an optimized folder; {path} is an exported one")
    if folders == EXPORTED_FOLDER and is_optimized:
        if not beside:
            raise FileNotFoundError(
                f"the exported folder that {path} was optimized from is not there; name it as --model_dir"
            )
        return beside
    return [path]


def engine_names(text: str) -> frozenset[str]:
    """The value of --engines. Raises ArgumentTypeError for a name that is not one of ENGINES."""
    names = frozenset(text.split(","))
    if not names <= {*ENGINES}:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(ENGINES)}, got {text}")
    return names


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


def load_reference(
    folder: OpenFolder,
    model_name: str | None = None,
    checkpoint_format: str | None = None,
    *,
    with_times: bool = False,
) -> LibraryEngine:
    """Load the reference.

    model_name: the checkpoint, or None for the one that `folder` was exported from.
    Raises ValueError where the vocabulary is not the folder's, and as find_checkpoint and recorded_checkpoint do.
    """
    if model_name:
        checkpoint = find_checkpoint(model_name, checkpoint_format=checkpoint_format)
    else:
        checkpoint = recorded_checkpoint(folder.path)
    model = checkpoint.load_model()
    scripts = read_manifest(folder.path).get("export", {}).get("flags", {}).get("scripts")
    suppress(model.joint, suppressed_ids(checkpoint, scripts))  # as in the folder
    reference: Reference = Transformers(model) if checkpoint.format is transformers else Nemo(model)
    if reference.model.decoder.blank_idx != folder.config.blank_id:
        raise ValueError(
            f"{folder.path} was exported from another checkpoint than {checkpoint.path}, which has another vocabulary; "
            "give another --model_name"
        )
    reference.transcribe(reference.features(folder.noise()))
    return LibraryEngine(reference, text_rules(reference.sentencepiece_model, reference.name), with_times=with_times)


def timed(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, float]:
    """The result of a call, and the seconds that it took."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start
