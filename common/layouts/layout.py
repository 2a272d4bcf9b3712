"""A model folder as one runtime reads it: its graphs, the files beside them, and the Python that runs it.

Each layout is a module of this package that calls `register` once; the choices of `--runtime`, the checks, the model
card and the tests follow from the registry. `docs/architecture.md` shows how to add a layout.

The greedy loops of the runtimes, from their sources, and where they differ from NeMo's (common/run/decode.py):
    genai        durations by value; a blank of duration 0 takes the best other one; the limit of genai_config.json
    onnx-asr     durations by index; otherwise NeMo's rule, with the limit that config.json gives (src/onnx_asr/asr.py)
    sherpa-onnx  durations by index; otherwise NeMo's rule, with a limit of 5 that nothing changes
                 (sherpa-onnx/csrc/offline-transducer-greedy-search-nemo-decoder.cc)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import tokens_text
from common.cli import CheckError
from common.contract import Graph, View
from common.folder import MANIFEST, read_manifest, write_json
from common.run.ort import open_session

# The largest difference allowed from the library's features; float32 and another order of sums make it 3e-4.
FEATURES_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Window:
    """How a clip is cut for the encoder: `chunk` samples are decoded, with `left` and `right` samples of context."""

    chunk: int
    left: int
    right: int

    @classmethod
    def of_seconds(cls, spec: ModelSpec, chunk: float, left: float, right: float) -> "Window":
        """The window of these lengths in seconds.

        Raises ValueError unless each is a whole number of encoder frames: the runtime divides by integers, and a
        remainder would shift every later seam.
        """
        samples = {}
        for name, seconds in (("chunk", chunk), ("left_context", left), ("right_context", right)):
            exact = seconds * spec.sample_rate
            frame = spec.frame_samples
            if exact < (frame if name == "chunk" else 0) or abs(exact / frame - round(exact / frame)) > 1e-6:
                raise ValueError(
                    f"expected --{name}_seconds as a whole number of encoder frames of {frame / spec.sample_rate:g} s, "
                    f"got {seconds:g}; the nearest is {max(round(exact / frame), 1) * frame / spec.sample_rate:g}"
                )
            samples[name] = round(exact)
        return cls(samples["chunk"], samples["left_context"], samples["right_context"])


def _nothing(spec: ModelSpec) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One runtime's model folder."""

    runtime: str  # the value of --runtime, and the name of the subfolder where a folder holds several
    packages: tuple[str, ...]  # on PyPI, the runtime first: what `usage` needs and pip does not bring along
    cuda_package: str = ""  # on PyPI, where running on CUDA needs another package
    graphs: tuple[Graph, ...]  # the encoder, then those that run once a token
    config_files: tuple[str, ...]
    vocabulary: tuple[str, ...]  # the first file has a line for each token
    vocabulary_command: str  # the command that writes these files; {} stands for the folder
    # A function for the text of each of these files, called by the export; none where a script of its own writes them.
    vocabulary_texts: tuple[Callable[[ModelProto], str], ...] = (tokens_text,)
    usage: str  # Python that transcribes a file; {folder} and {audio} stand for the paths
    page: Path | None = None  # HTML that transcribes in a browser, put beside the files of the folder
    page_packages: tuple[str, ...] = ()  # on npm: what `page` imports
    check: Callable[[ModelSpec], None]  # raises ValueError naming what the runtime cannot compute of a checkpoint
    configs: Callable[[ModelSpec, Window, str], dict[str, dict[str, Any]]]  # spec, window, device → file name → content
    encoder_metadata: Callable[[ModelSpec], dict[str, str]] = _nothing  # what the encoder's ONNX metadata must hold
    feature_graphs: Callable[[ModelSpec], dict[str, bytes]] = _nothing  # file name → an ONNX model of the features
    feature_files: tuple[str, ...] = ()  # the names that these may have
    named_after_method: bool = False  # whether the runtime finds a quantized graph as NAME.METHOD.onnx
    measures_speech: bool = False  # whether common/run can load it, as calibration and evaluation need

    @property
    def package(self) -> str:
        """The runtime's own package."""
        return self.packages[0]

    @property
    def encoder(self) -> Graph:
        return self.graphs[0]

    @property
    def token_graphs(self) -> tuple[Graph, ...]:
        return self.graphs[1:]

    @property
    def marker(self) -> str:
        """The file by which a folder of this layout is recognized: no other layout has one of that name."""
        return self.graphs[-1].file

    @property
    def graph_files(self) -> tuple[str, ...]:
        return tuple(file for graph in self.graphs for file in graph.files)

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.graph_files, *self.config_files, *self.vocabulary)

    def files_in(self, folder: Path) -> tuple[str, ...]:
        """The files of a model folder, with those that not every checkpoint has."""
        return (*self.files, *(name for name in self.feature_files if (folder / name).is_file()))

    def vocabulary_size(self, folder: Path) -> int:
        """V, blank included, of the model in `folder`."""
        return (folder / self.vocabulary[0]).read_bytes().count(b"\n")

    def usage_of(self, folder: str, audio: str = "audio.wav") -> str:
        """Python that transcribes the file `audio`, its channels averaged, with the model in `folder`."""
        return self.usage.format(folder=folder, audio=audio)


LAYOUTS: dict[str, Layout] = {}  # by runtime, in the order in which folders are written


def register(layout: Layout) -> Layout:
    """Add a layout to the registry. Raises ValueError where another has its name or its marker file."""
    for other in LAYOUTS.values():
        if layout.runtime == other.runtime or layout.marker == other.marker:
            raise ValueError(f"layout {layout.runtime} has the name or the last graph file of {other.runtime}")
    LAYOUTS[layout.runtime] = layout
    return layout


def layout_of(folder: Path) -> Layout:
    """The layout of one model folder; the first registered one, GenAI's, for a folder without graphs."""
    return next(
        (layout for layout in LAYOUTS.values() if (folder / layout.marker).is_file()), next(iter(LAYOUTS.values()))
    )


def layouts_in(folder: Path) -> dict[str, Layout]:
    """Subfolder → layout, for a folder exported for several runtimes; "" → layout for a model folder."""
    found = {name: layout for name, layout in LAYOUTS.items() if (folder / name / layout.encoder.file).is_file()}
    return found or {"": layout_of(folder)}


def check_same_layouts(folder: Path, planned: Mapping[str, Layout]) -> None:
    """Raise ValueError where `folder` is for one runtime and would become one for another or for several, or the other
    way round, since a reader would confuse them. Also where a manifest to be kept belongs to another project."""
    existing = layouts_in(folder)
    is_model_folder = "" not in existing or (folder / MANIFEST).is_file()
    if is_model_folder and existing.get("") is not planned.get(""):
        new, old = (" and ".join(layout.runtime for layout in each.values()) for each in (planned, existing))
        raise ValueError(
            f"expected a folder for {new}, got {folder}, which is one for {old}; give another --output_dir"
        )
    for name in planned:
        read_manifest(folder / name)  # where it is another project's, this raises before the work instead of after


def write_views(layout: Layout, source: Path, target: Path, spec: ModelSpec) -> None:
    """Write into `target` the graphs of `layout` that are views of those in the folder `source`, and check each.

    Raises CheckError where a view does not compute what its source does.
    """
    from common.layouts.adapt import check_view, write_view  # needs onnx_ir, which readers of a folder do not

    for graph in layout.graphs:
        if isinstance(graph, View):
            metadata = layout.encoder_metadata(spec) if graph is layout.encoder else {}
            write_view(graph, source, target, metadata)
            check_view(graph, source, target, spec.vocab_size)


def check_feature_graphs(layout: Layout, spec: ModelSpec, features: Callable[[np.ndarray], np.ndarray]) -> None:
    """Compare the graph of the features, where the runtime reads one, with the features of the checkpoint's library.

    features: samples [N] → [M, T], valid frames only. Raises CheckError for differences beyond FEATURES_TOLERANCE.
    """
    for name, model in layout.feature_graphs(spec).items():
        session = open_session(model)
        samples = np.random.default_rng(0).normal(0, 0.1, 2 * spec.sample_rate).astype(np.float32)
        samples[: spec.sample_rate // 2] *= 1e-3  # quiet, where the guard of the logarithm matters
        inputs = {"waveforms": samples[None], "waveforms_lens": np.array([len(samples)])}
        made, lengths = session.run(["features", "features_lens"], inputs)
        expected, actual = features(samples), made[0, :, : lengths[0]]
        error = float(np.max(np.abs(actual - expected))) if actual.shape == expected.shape else np.inf
        if not error <= FEATURES_TOLERANCE:
            raise CheckError(
                f"expected {name} within {FEATURES_TOLERANCE:.0e} of the checkpoint's own features, of shape "
                f"{expected.shape}, got shape {actual.shape} and a difference of {error:.1e}; please report it"
            )


def write_configs(layout: Layout, target: Path, spec: ModelSpec, window: Window, device: str) -> None:
    """Write the runtime's configuration files into `target`, and the graph of the features where it reads one."""
    for name, content in layout.configs(spec, window, device).items():
        write_json(target / name, content)
    for name, model in layout.feature_graphs(spec).items():
        (target / name).write_bytes(model)
