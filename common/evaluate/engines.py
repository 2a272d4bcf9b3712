"""The engines of a comparison: NeMo or transformers, and each folder in ONNX Runtime GenAI and plain ONNX Runtime.

An engine is loaded when it is first asked for, and then runs once on noise, since a first run allocates memory. Plain
ONNX Runtime computes no features: it is given NeMo's or, without NeMo, those of GenAI, which is loaded to compute them.
"""

import argparse
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from tokenizers import Tokenizer

from common.checkpoint import transformers
from common.checkpoint.find import FORMAT_HELP, FORMAT_NAMES, find_checkpoint, format_of, recorded_checkpoint
from common.cli import Parser
from common.evaluate.text_rules import TextRule, text_rules, transformers_text_rules
from common.evaluate.transcripts import FolderEngines
from common.evaluate.words import Pieces
from common.export.writing import suppress, suppressed_ids
from common.folder import CHECKPOINT, EXPORTED, FILES, MANIFEST, is_float16, read_location, read_manifest
from common.layouts.genai import GENAI
from common.layouts.identity import check_one_checkpoint, check_same_checkpoint
from common.run.audio import Clip
from common.run.config import RuntimeConfig
from common.run.decode import GENAI_RULE, BlankZero, Hypothesis
from common.run.genai import GenAI
from common.run.ort import MAPPED, OnnxRuntime, OpenGraph, OrtGraph
from common.run.reference import Nemo, Reference, Transformers

# What --engines and --folders choose from.
NEMO_ENGINE, GENAI_ENGINE, ONNX_ENGINE = ENGINES = ("nemo", "genai", "onnx")
OPTIMIZED_FOLDER, EXPORTED_FOLDER, BOTH_FOLDERS = FOLDERS = ("optimized", "exported", "both")
WARM_UP_FRAMES = 100  # of features

P = ParamSpec("P")
R = TypeVar("R")


class ComparedFolder:
    """A model folder with the engines that run it."""

    def __init__(self, path: Path, engines: Collection[str] = ENGINES) -> None:
        self.path = path
        self.config = RuntimeConfig.read(path)
        self.engines = FolderEngines(
            f"GenAI {path.name}" if GENAI_ENGINE in engines else None,
            f"ONNX Runtime {path.name}" if ONNX_ENGINE in engines else None,
            _is_float32(path),
        )

    @cached_property
    def genai(self) -> GenAI:
        genai = GenAI(self.path)
        genai.transcribe(self.noise())
        return genai

    @cached_property
    def raw(self) -> OnnxRuntime:
        raw = OnnxRuntime(self.path)
        mels = raw.encoder.session.get_inputs()[0].shape[1]
        raw.transcribe(np.random.default_rng(0).standard_normal((mels, WARM_UP_FRAMES), dtype=np.float32))
        return raw

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces.read(self.path)

    @cached_property
    def raw_text(self) -> Callable[[list[int]], str]:
        """A function that gives the text of plain ONNX Runtime's tokens; GenAI has a tokenizer of its own."""
        return tokenizer_text(self.path)

    def noise(self) -> np.ndarray:
        """A second of noise, [samples], to warm an engine up with."""
        return np.random.default_rng(0).normal(0, 0.1, self.config.sample_rate).astype(np.float32)

    def files(self) -> Iterator[Path]:
        """The files of the folder that are read, and the checkpoint that it names; no result may overwrite them."""
        manifest = read_manifest(self.path)
        yield from (self.path / name for name in {MANIFEST, *GENAI.files, *manifest.get(FILES, {})})
        if checkpoint := read_location(self.path, CHECKPOINT):
            yield checkpoint


def tokenizer_text(folder: Path) -> Callable[[list[int]], str]:
    """A function that gives the text of tokens, by Hugging Face's reader of the folder's tokenizer.json."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda tokens: str(tokenizer.decode(tokens)).strip()


def input_files(folders: Sequence[ComparedFolder], clips: Sequence[Clip], *named: Path | str | None) -> Iterator[Path]:
    """The files that a comparison reads, which no result may overwrite; `named`: those on its command line, if any."""
    yield from (Path(path) for path in named if path)
    yield from (file for folder in folders for file in folder.files())
    yield from (clip.path for clip in clips)


def _is_float32(folder: Path) -> bool:
    """Whether the weights are those of the export, unquantized and float32."""
    manifest = read_manifest(folder)
    if is_float16(manifest):
        return False
    if "optimize" not in manifest:
        return True
    flags = manifest["optimize"].get("flags", {})
    return bool(flags.get("skip_quantization")) and flags.get("decoder_joint_precision", "fp32") == "fp32"


def open_folders(path: Path, engines: Collection[str] = ENGINES, folders: str = BOTH_FOLDERS) -> list[ComparedFolder]:
    """The folder at `path`, and the exported folder that it was optimized from, where that is still there.

    engines: those of ENGINES to run.
    folders: one of FOLDERS; a folder that is asked for alone must be there.
    Raises ValueError or FileNotFoundError, naming the command that repairs the folder, where one lacks a file or holds
    parts of different checkpoints.
    """
    paths = _chosen_folders(path, folders)
    for each in paths:
        check_one_checkpoint(each)
        check_same_checkpoint(path, each)
    return [ComparedFolder(each, engines) for each in paths]


def _chosen_folders(path: Path, folders: str) -> list[Path]:
    is_optimized = "optimize" in read_manifest(path)
    exported = read_location(path, EXPORTED)
    beside = [exported.resolve()] if exported and exported.is_dir() else []
    if folders == BOTH_FOLDERS:
        return [path, *beside]
    if folders == OPTIMIZED_FOLDER and not is_optimized:
        raise ValueError(f"--folders {folders} expects an optimized folder, got {path}, which is exported")
    if folders == EXPORTED_FOLDER and is_optimized:
        if not beside:
            raise FileNotFoundError(
                f"expected the exported folder that {path} was optimized from, found none; name it as --model_dir"
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
    """Add --engines, --folders and the flags for the reference's checkpoint. `check_engine_flags` completes them."""
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


def check_engine_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Set `args.engines` to the engines that run. Ends the script where flags do not go together."""
    if args.engines is None:  # GenAI only on request, since it doubles the time of a stress test
        args.engines = frozenset(ENGINES) - ({GENAI_ENGINE} if args.stress is not None else set())
    args.engines -= {NEMO_ENGINE} if args.skip_nemo else set()
    if not args.engines or (args.model_name and NEMO_ENGINE not in args.engines):
        parser.error(f"argument --engines: expected {'nemo' if args.model_name else 'genai or onnx'}, got no such name")
    if args.checkpoint_format and not args.model_name:
        parser.error("argument --checkpoint_format: expected --model_name with it")


def load_reference(
    folder: ComparedFolder, model_name: str | None = None, checkpoint_format: str | None = None
) -> tuple[Reference, Sequence[TextRule]]:
    """Load the reference; returns it with the rules by which its text may differ from the folder's.

    model_name: the checkpoint, or None for the one that `folder` was exported from.
    Raises ValueError where the vocabulary is not the folder's, and as find_checkpoint and recorded_checkpoint do.
    """
    if model_name:
        checkpoint = find_checkpoint(model_name, checkpoint_format=checkpoint_format)
    else:
        checkpoint = recorded_checkpoint(folder.path)
    known = format_of(checkpoint)
    is_transformers = known is transformers
    model = known.load_model(checkpoint)
    scripts = read_manifest(folder.path).get("export", {}).get("flags", {}).get("scripts")
    suppress(model.joint, suppressed_ids(checkpoint, scripts))  # as in the folder
    reference: Reference = Transformers(model) if is_transformers else Nemo(model)
    if reference.model.decoder.blank_idx != folder.config.blank_id:
        raise ValueError(
            f"expected the checkpoint that {folder.path} was exported from, got {checkpoint}, which has another "
            "vocabulary; give another --model_name"
        )
    reference.transcribe(reference.features(folder.noise()))
    rules = transformers_text_rules if is_transformers else text_rules
    return reference, rules(reference.sentencepiece_model)


class BothModels:
    """An optimized folder and the exported one beside it, each in plain ONNX Runtime with its own tokenizer.

    GenAI computes the features, from the optimized folder. The float32 weights stay in their data file, since both
    models are in memory at once; the optimized one is small. Raises as GenAI and OnnxRuntime do.
    """

    def __init__(self, exported: Path, optimized: Path) -> None:
        self.genai = GenAI(optimized)
        self.float32 = KeptOutputs(exported, MAPPED)
        self.optimized = KeptOutputs(optimized)
        self.float32_text = tokenizer_text(exported)
        self.optimized_text = self.genai.text


class KeptOutputs(OnnxRuntime):
    """Plain ONNX Runtime that keeps the encoder's outputs of the last clip, [S, D] of each window."""

    def __init__(self, folder: Path, open_graph: OpenGraph = OrtGraph) -> None:
        super().__init__(folder, open_graph)
        self.outputs: list[np.ndarray] = []

    def encode(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        encoded = super().encode(features)
        self.outputs += encoded
        return encoded

    def transcribe(self, features: np.ndarray, rule: BlankZero = GENAI_RULE, *, whole: bool = False) -> Hypothesis:
        self.outputs = []
        return super().transcribe(features, rule, whole=whole)


def timed(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, float]:
    """The result of a call, and the seconds that it took."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start
