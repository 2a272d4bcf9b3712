"""A model folder as one runtime reads it: its graphs, the files beside them, and the Python that runs it.

Each runtime is a module of this package with a subclass of `Layout`; the choices of `--runtime`, the checks, the model
card and the tests follow from it. `docs/architecture.md` shows how to add one.

The greedy loops of the runtimes, from their sources, and where they differ from NeMo's (common/run/decode.py):
    genai        durations by value; a blank of duration 0 takes the best other one; the limit of genai_config.json
    onnx-asr     durations by index; otherwise NeMo's rule, with the limit that config.json gives (src/onnx_asr/asr.py)
    sherpa-onnx  durations by index; otherwise NeMo's rule, with a limit of 5 that nothing changes
                 (sherpa-onnx/csrc/offline-transducer-greedy-search-nemo-decoder.cc)

Whether the parts of a folder belong to one checkpoint is decided by its manifest, which has the SHA-256 of the
checkpoint from which the graphs were exported (section `export`) and of the one whose tokenizer was exported (section
`tokenizer`). Where one of these is missing, as in a folder that was copied without its manifest, only sizes are
compared: the vocabulary in each file, and the logits of the last graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint import nemo
from common.checkpoint.hub import hub_name
from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import tokens_text
from common.cli import EXPORT_COMMAND, OPTIMIZE_COMMAND, TOKENIZER_COMMAND, Command
from common.contract import GENAI_CONFIG, Graph, View
from common.folder import CHECKPOINT, FILES, read_location, read_manifest
from common.run.ort import MAPPED

# To GenAI, 0 means "force a step after every token"; the largest int means "no limit" to GenAI and to onnx-asr.
NO_SYMBOL_LIMIT = 2**31 - 1
# The most durations that a TDT may have (published ones have 5); with more, the vocabulary is of another model.
MAX_DURATIONS = 32
REPORT_FILES = ("optimization_report.json", "optimization_report.html")

Features = Callable[[np.ndarray], np.ndarray]  # samples [N] → the features of the checkpoint's library, valid: [M, T]


class Layout(ABC):
    """One runtime's model folder."""

    runtime: ClassVar[str]  # the value of --runtime, and the name of the subfolder where a folder holds several
    packages: ClassVar[tuple[str, ...]]  # on PyPI, the runtime first: what `usage` needs and pip does not bring along
    cuda_packages: ClassVar[tuple[str, ...]] = ()  # instead of these, where others run on CUDA
    graphs: ClassVar[tuple[Graph, ...]]  # the encoder, then those that run once a token, the last named as in no other
    config_files: ClassVar[tuple[str, ...]] = ()
    optional_files: ClassVar[tuple[str, ...]] = ()  # that folders of some checkpoints have
    # Of a graph {name}.onnx that is quantized by {method}. Where there is one, a quantized encoder holds its weights,
    # as in the folders that others publish: many of the runtime's clients do not load weights beside a graph.
    second_name: ClassVar[str] = ""
    vocabulary: ClassVar[tuple[str, ...]]  # the first file has a line for each token
    vocabulary_command: ClassVar[Command] = EXPORT_COMMAND  # that writes these files; {} stands for the folder
    # Python that transcribes a file, its channels averaged. {folder} and {audio} are paths; {sample_rate}, in Hz, and
    # {hop_length}, in samples, are those of the features.
    usage: ClassVar[str]

    @abstractmethod
    def check(self, spec: ModelSpec, features: Features) -> None:
        """Check that the runtime can run a checkpoint, whose features its library computes with `features`.

        Raises ValueError naming what the runtime cannot compute, CheckError where a graph of the features is wrong.
        """

    def configs(self, spec: ModelSpec, window: Mapping[str, int], device: str) -> Mapping[str, bytes]:
        """The files that the runtime reads beside graphs and vocabulary, by name. window: of ExportOptions.window."""
        return {}

    def encoder_metadata(self, spec: ModelSpec) -> Mapping[str, str]:
        """What the metadata of the encoder's ONNX model must hold."""
        return {}

    def vocabulary_texts(self, proto: ModelProto) -> Mapping[str, str]:
        """The content of `vocabulary`, by file; called where the export writes these files."""
        return {self.vocabulary[0]: tokens_text(proto)}

    def browser_usage(self) -> str:
        """Markdown for the model card: how the folder runs in a browser; empty where it does not."""
        return ""

    @property
    def package(self) -> str:
        """The runtime's own package."""
        return self.packages[0]

    @property
    def encoder(self) -> Graph:
        return self.graphs[0]

    @property
    def exports_vocabulary(self) -> bool:
        """Whether the vocabulary is written with the graphs, not by export_tokenizer.py."""
        return self.vocabulary_command == EXPORT_COMMAND

    @property
    def measures_speech(self) -> bool:
        """Whether common/run can run the folder, as calibration and evaluation need."""
        return GENAI_CONFIG in self.config_files

    @property
    def graph_files(self) -> tuple[str, ...]:
        """The names of the files of its graphs; some data files may not exist."""
        return tuple(file for graph in self.graphs for file in graph.files)

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.graph_files, *self.config_files, *self.vocabulary)

    def former_graphs(self, folder: Path) -> set[str]:
        """What a former run may have written to `folder` for graphs, and the next one need not write again."""
        listed = (name for name in read_manifest(folder).get(FILES, {}) if name.endswith((".onnx", ".onnx.data")))
        return {*listed, *(graph.data_file for graph in self.graphs)}

    def vocabulary_size(self, folder: Path) -> int:
        """V, blank included, of the model in `folder`."""
        return (folder / self.vocabulary[0]).read_bytes().count(b"\n")

    def write(
        self,
        folder: Path,
        exported: Path,
        spec: ModelSpec,
        window: Mapping[str, int],
        device: str,
        vocabulary: Mapping[str, str],
    ) -> None:
        """Write into `folder` what the runtime reads, except for a vocabulary that export_tokenizer.py writes.

        exported: the folder of the exported graphs. vocabulary: as vocabulary_texts returns it. Raises CheckError where
        a view does not compute what its source does.
        """
        from common.layouts.views import check_view, write_view  # needs onnx_ir, which readers of a folder do not

        folder.mkdir(exist_ok=True)
        for graph in self.graphs:
            if isinstance(graph, View):
                metadata = self.encoder_metadata(spec) if graph is self.encoder else {}
                write_view(graph, exported, folder, metadata)
                check_view(graph, exported, folder, spec.vocab_size)
        self.write_configs(folder, spec, window, device)
        for name, text in vocabulary.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")

    def write_configs(self, folder: Path, spec: ModelSpec, window: Mapping[str, int], device: str) -> None:
        """Write what the runtime reads beside graphs and vocabulary into `folder`."""
        for name, content in self.configs(spec, window, device).items():
            (folder / name).write_bytes(content)

    def check_one_checkpoint(self, folder: Path) -> None:
        """Raise ValueError where parts of `folder` come from different checkpoints, FileNotFoundError where one is
        missing. The message names the command that repairs the folder."""
        graphs = source_in(folder, "export")
        tokenizer = source_in(folder, "tokenizer")
        if graphs and tokenizer and graphs["sha256"] != tokenizer["sha256"]:
            raise ValueError(
                f"the graphs in {folder} are from {name_in(graphs)}, its tokenizer is from {name_in(tokenizer)}; run: "
                f"{tokenizer_command(folder)}"
            )
        self.check_sizes(folder, MAPPED(folder, self.graphs[-1]).session.get_outputs()[0].shape[-1])

    def check_sizes(self, folder: Path, width: int) -> None:
        """Raise ValueError where the vocabulary in `folder` cannot be that of a last graph with `width` logits."""
        tokens = self.vocabulary_size(folder)
        if not 0 < width - tokens <= MAX_DURATIONS:
            raise ValueError(
                f"{self.graphs[-1].file} in {folder} has {width} logits, durations included, which do not fit the "
                f"{tokens} tokens in {self.vocabulary[0]}; export the folder again"
            )

    def kept_by_export(self, folder: Path, source: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What remains in `folder` when the checkpoint `source` is exported into it: a manifest; the files to remove.

        The former graphs, under all their names, and the report of an optimization are removed. A tokenizer that the
        export does not write is kept if the manifest says that it is of the same checkpoint; one of unknown origin (an
        older manifest, or none) is removed, since exporting the tokenizer is the next step.
        """
        manifest = dict(read_manifest(folder))
        removed = {*REPORT_FILES, *self.former_graphs(folder)}
        manifest.pop("optimize", None)
        tokenizer = source_in(folder, "tokenizer")
        if not self.exports_vocabulary and (tokenizer is None or tokenizer["sha256"] != source["sha256"]):
            manifest.pop("tokenizer", None)
            removed |= set(self.vocabulary)
        files = manifest.get(FILES, {})
        manifest[FILES] = {name: entry for name, entry in files.items() if name not in removed}
        return manifest, tuple(sorted(name for name in removed if (folder / name).is_file()))


def check_same_checkpoint(folder: Path, exported: Path) -> None:
    """Raise ValueError where `folder` was optimized from graphs of another checkpoint than `exported` has now."""
    optimized = source_in(folder, "export")
    source = source_in(exported, "export")
    if optimized and source and optimized["sha256"] != source["sha256"]:
        command = Command(f"{OPTIMIZE_COMMAND} --output_dir {{}}").format(exported, folder)
        raise ValueError(
            f"{folder} was optimized from graphs of {name_in(optimized)}, but {exported} now has graphs of "
            f"{name_in(source)}; run: {command}"
        )


def check_name_for_graphs(folder: Path, model_name: str) -> None:
    """Raise ValueError where a tokenizer of `model_name` on Hugging Face cannot belong to the graphs in `folder`.

    The name in the manifest decides, so that this shows before a download that may take an hour. A path is not checked.
    """
    graphs = source_in(folder, "export")
    name = hub_name(model_name)
    if graphs and name is not None and graphs.get("name") != name:
        raise ValueError(
            f"the graphs in {folder} are from {name_in(graphs)}, not from {model_name}; run: "
            f"{tokenizer_command(folder)}"
        )


def source_in(folder: Path, section: str) -> dict[str, Any] | None:
    """The record of the checkpoint in a section of the manifest of `folder`, or None where there is none."""
    source: dict[str, Any] = read_manifest(folder).get(section, {}).get("source") or {}
    return source if "sha256" in source else None


def name_in(source: Mapping[str, Any]) -> str:
    """The name of a recorded checkpoint, for messages."""
    return f"{source.get('name') or source.get('file')} (SHA-256 {source['sha256'][:8]}…)"


def tokenizer_command(folder: Path) -> str:
    """The command that exports the tokenizer of the graphs in `folder`."""
    graphs = source_in(folder, "export") or {}
    path = read_location(folder, CHECKPOINT)
    name = graphs.get("name") or (str(path.resolve()) if path else "CHECKPOINT_OF_THE_GRAPHS")
    command = Command(f"{TOKENIZER_COMMAND} --model_name {{}}").format(folder, name)
    for flag, key in (("--revision", "revision"), ("--checkpoint_format", "format")):
        if "name" in graphs and graphs.get(key) not in (None, nemo.NAME):
            command += Command(" {} {}").format(flag, graphs[key])
    return command
