"""A model folder as one runtime reads it: its graphs, the files beside them, and the Python that runs it.

Each runtime is a module of this package with an instance of `Layout`; the choices of `--runtime`, the checks, the model
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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint import nemo
from common.checkpoint.spec import ModelSpec
from common.cli import EXPORT_COMMAND, OPTIMIZE_COMMAND, TOKENIZER_COMMAND, Command
from common.contract import GENAI_CONFIG, GRAPHS, JOINT, Graph, View
from common.folder import CHECKPOINT, FILES, link, read_json, read_location, read_manifest
from common.run.config import RuntimeConfig
from common.run.ort import MAPPED

# To GenAI, 0 means "force a step after every token"; the largest int means "no limit" to GenAI and to onnx-asr.
NO_SYMBOL_LIMIT = 2**31 - 1
# The most durations that a TDT may have (published ones have 5); with more, the vocabulary is of another model.
MAX_DURATIONS = 32
REPORT_FILES = ("optimization_report.json", "optimization_report.html")
SECOND_NAME = "{name}.{method}.onnx"  # of a graph that is quantized by {method}, where `is_view`

Features = Callable[[np.ndarray], np.ndarray]  # samples [N] → the features of the checkpoint's library, valid: [M, T]
# The numbers of a checkpoint, its tokenizer, its library's features, ExportOptions.window and --device → the content of
# files, by name. Raises ValueError naming what the runtime cannot compute of the checkpoint, CheckError where a graph
# of the features is wrong.
MakeFiles = Callable[[ModelSpec, ModelProto, Features, Mapping[str, int], str], dict[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One runtime's model folder."""

    runtime: str  # the value of --runtime, and the name of the subfolder where a folder holds several
    packages: tuple[str, ...]  # on PyPI, the runtime first: what `usage` needs and pip does not bring along
    cuda_package: str = ""  # instead of the first of these on CUDA, where that is another
    graphs: tuple[Graph, ...]  # the encoder, then those that run once a token, the last named as in no other layout
    config_files: tuple[str, ...] = ()
    optional_files: tuple[str, ...] = ()  # that folders of some checkpoints have
    vocabulary: tuple[str, ...]  # the first file has a line for each token
    # Python that transcribes a file, its channels averaged. {folder} and {audio} are paths; {sample_rate}, in Hz, and
    # {hop_length}, in samples, belong to the features.
    usage: str
    browser_page: Path | None = None  # HTML that runs the folder in a browser, where one can
    make_files: MakeFiles  # what the export writes beside the graphs
    metadata: Callable[[ModelSpec], dict[str, str]] = lambda spec: {}  # of the encoder's ONNX model

    @property
    def is_view(self) -> bool:
        """Whether the graphs are views of the exported ones, under the names under which others publish them.

        The export then writes the vocabulary with the graphs. A quantized graph has a second name, SECOND_NAME, and a
        quantized encoder holds its weights, since many clients do not load weights beside a graph. Only folders that
        are no views can be run by common/run, as calibration and evaluation need.
        """
        return self.graphs != GRAPHS

    @property
    def encoder(self) -> Graph:
        return self.graphs[0]

    @property
    def graph_files(self) -> tuple[str, ...]:
        """The names of the files of its graphs; some data files may not exist."""
        return tuple(file for graph in self.graphs for file in graph.files)

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.graph_files, *self.config_files, *self.vocabulary)

    def write(self, folder: Path, exported: Path, spec: ModelSpec, files: Mapping[str, bytes]) -> None:
        """Write what the runtime reads into `folder`, except for a vocabulary that export_tokenizer.py writes.

        exported: the folder of the exported graphs. files: as make_files returns them. Raises CheckError where a view
        does not compute what its source does.
        """
        from common.layouts.views import check_view, write_view  # needs onnx_ir, which readers of a folder do not

        folder.mkdir(exist_ok=True)
        for graph in self.graphs:
            if isinstance(graph, View):
                write_view(graph, exported, folder, self.metadata(spec) if graph is self.encoder else {})
                check_view(graph, exported, folder, spec.vocab_size)
            else:
                for path in filter(Path.is_file, (exported / name for name in graph.files)):
                    link(path, folder / path.name)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    def vocabulary_size(self, folder: Path) -> int:
        """V, blank included, of the model in `folder`."""
        return (folder / self.vocabulary[0]).read_bytes().count(b"\n")

    def check_one_checkpoint(self, folder: Path) -> None:
        """Raise ValueError where parts of `folder` come from different checkpoints, FileNotFoundError where one is
        missing. The message names the command that repairs the folder."""
        if source := source_in(read_manifest(folder), "tokenizer"):
            check_tokenizer_of_graphs(folder, source)
        width = MAPPED(folder, self.graphs[-1]).session.get_outputs()[0].shape[-1]
        if self.is_view:
            tokens = self.vocabulary_size(folder)
            if not 0 < width - tokens <= MAX_DURATIONS:
                raise ValueError(
                    f"{self.graphs[-1].file} in {folder} has {width} logits, durations included, which do not fit the "
                    f"{tokens} tokens in {self.vocabulary[0]}; export the folder again"
                )
            return
        config = RuntimeConfig.read(folder)
        tokenizer = read_json(folder / "tokenizer.json", TOKENIZER_COMMAND.format(folder))
        sizes = {
            GENAI_CONFIG: config.blank_id + 1,
            JOINT.file: width - len(config.durations),
            "tokenizer.json": len(tokenizer.get("model", {}).get("vocab", ())),
        }
        if (folder / "vocab.txt").is_file():  # a copied folder may lack it
            sizes["vocab.txt"] = self.vocabulary_size(folder)
        if len(set(sizes.values())) > 1:
            graphs_agree = sizes[GENAI_CONFIG] == sizes[JOINT.file]
            raise ValueError(
                f"the files in {folder} have different numbers of tokens, blank included "
                f"({', '.join(f'{name} {size}' for name, size in sizes.items())}): they are of different checkpoints; "
                f"run: {tokenizer_command(folder) if graphs_agree else EXPORT_COMMAND.format(folder)}"
            )

    def former_graphs(self, manifest: Mapping[str, Any]) -> set[str]:
        """What a former run may have written for graphs into the folder of `manifest`, and the next one need not write
        again."""
        listed = (name for name in manifest.get(FILES, {}) if name.endswith((".onnx", ".onnx.data")))
        return {*listed, *(graph.data_file for graph in self.graphs)}

    def kept_by_export(
        self, manifest: Mapping[str, Any], source: Mapping[str, Any]
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """What remains of a folder with `manifest` when the checkpoint `source` is exported into it: a manifest; the
        files to remove.

        The former graphs, under all their names, and the report of an optimization are removed. A tokenizer that the
        export does not write is kept if the manifest says that it is of the same checkpoint; one of unknown origin (an
        older manifest, or none) is removed, since exporting the tokenizer is the next step.
        """
        dropped = {"optimize"}
        removed = {*REPORT_FILES, *self.former_graphs(manifest)}
        tokenizer = source_in(manifest, "tokenizer")
        if not self.is_view and (tokenizer is None or tokenizer["sha256"] != source["sha256"]):
            dropped.add("tokenizer")
            removed |= set(self.vocabulary)
        files = {name: entry for name, entry in manifest.get(FILES, {}).items() if name not in removed}
        kept = {section: content for section, content in manifest.items() if section not in dropped}
        return {**kept, FILES: files}, frozenset(removed)


def check_same_checkpoint(folder: Path, exported: Path) -> None:
    """Raise ValueError where `folder` was optimized from graphs of another checkpoint than `exported` has now."""
    optimized, source = (source_in(read_manifest(each), "export") for each in (folder, exported))
    if optimized and source and optimized["sha256"] != source["sha256"]:
        command = Command(f"{OPTIMIZE_COMMAND} --output_dir {{}}").format(exported, folder)
        raise ValueError(
            f"{folder} was optimized from graphs of {name_in(optimized)}, but {exported} now has graphs of "
            f"{name_in(source)}; run: {command}"
        )


def check_tokenizer_of_graphs(folder: Path, source: Mapping[str, Any]) -> None:
    """Raise ValueError where the graphs in `folder` are of another checkpoint than `source`, a tokenizer's.

    A source with a `name` alone is compared by it, so that this shows before a download that may take an hour.
    """
    graphs = source_in(read_manifest(folder), "export")
    key = "sha256" if "sha256" in source else "name"
    if graphs and graphs.get(key) != source[key]:
        raise ValueError(
            f"the graphs in {folder} are from {name_in(graphs)}, the tokenizer is from {name_in(source)}; run: "
            f"{tokenizer_command(folder)}"
        )


def source_in(manifest: Mapping[str, Any], section: str) -> dict[str, Any] | None:
    """The record of the checkpoint in a section of a manifest, or None where there is none."""
    source: dict[str, Any] = manifest.get(section, {}).get("source") or {}
    return source if "sha256" in source else None


def name_in(source: Mapping[str, Any]) -> str:
    """The name of a recorded checkpoint, for messages."""
    digest = f" (SHA-256 {source['sha256'][:8]}…)" if "sha256" in source else ""
    return f"{source.get('name') or source.get('file')}{digest}"


def tokenizer_command(folder: Path) -> str:
    """The command that exports the tokenizer of the graphs in `folder`."""
    graphs = source_in(read_manifest(folder), "export") or {}
    path = read_location(folder, CHECKPOINT)
    name = graphs.get("name") or (str(path.resolve()) if path else "CHECKPOINT_OF_THE_GRAPHS")
    command = Command(f"{TOKENIZER_COMMAND} --model_name {{}}").format(folder, name)
    for flag, key in (("--revision", "revision"), ("--checkpoint_format", "format")):
        if "name" in graphs and graphs.get(key) not in (None, nemo.NAME):
            command += Command(" {} {}").format(flag, graphs[key])
    return command
