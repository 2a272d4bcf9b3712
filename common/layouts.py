"""How each runtime wants a model folder: its graphs, the files beside them, and the Python that runs it.

The greedy loops, from their sources, and where they part from NeMo's (common/decode.py):
    genai        durations by value; a blank of duration 0 takes the best other one; the limit of genai_config.json
    onnx-asr     durations by index; otherwise NeMo's rule, with the limit that config.json gives (src/onnx_asr/asr.py)
    sherpa-onnx  durations by index; otherwise NeMo's rule, with a limit of 5 that nothing changes
                 (sherpa-onnx/csrc/offline-transducer-greedy-search-nemo-decoder.cc)
"""

from dataclasses import dataclass
from pathlib import Path

from common.configs import (
    AUDIO_PROCESSOR_CONFIG,
    GENAI_CONFIG,
    ONNX_ASR_CONFIG,
    check_fixed_supports,
    check_genai_supports,
    onnx_asr_config,
    sherpa_onnx_metadata,
)
from common.files import MANIFEST, read_manifest, write_json
from common.graphs import GRAPHS, ONNX_ASR_GRAPHS, SHERPA_ONNX_GRAPHS, Graph
from common.model import ModelSpec
from common.runtime import EXPORT_COMMAND
from common.tokenizer import TOKENIZER_FILES


@dataclass(frozen=True)
class Layout:
    """A folder as one runtime reads it. `graphs`: the encoder, then those that run once a token."""

    runtime: str  # as --runtime has it; also the name of the folder, where there are several
    packages: tuple[str, ...]  # on PyPI, what `usage` imports and what that does not bring along; the runtime first
    graphs: tuple[Graph, ...]
    config_files: tuple[str, ...]
    vocabulary: tuple[str, ...]  # the first has a line for each token
    usage: str  # Python; {folder} and {audio} are to be filled in

    @property
    def package(self) -> str:
        return self.packages[0]

    @property
    def encoder(self) -> Graph:
        return self.graphs[0]

    @property
    def token_graphs(self) -> tuple[Graph, ...]:
        return self.graphs[1:]

    @property
    def graph_files(self) -> tuple[str, ...]:
        return tuple(file for graph in self.graphs for file in graph.files)

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.graph_files, *self.config_files, *self.vocabulary)

    def vocabulary_size(self, folder: Path) -> int:
        """V, blank included, of the model in `folder`."""
        return (folder / self.vocabulary[0]).read_bytes().count(b"\n")


GENAI = Layout(
    "genai",
    ("onnxruntime-genai",),
    GRAPHS,
    (GENAI_CONFIG, AUDIO_PROCESSOR_CONFIG),
    ("vocab.txt", *(file for file in TOKENIZER_FILES if file != "vocab.txt")),
    """\
import onnxruntime_genai as og

# GenAI reads WAV, FLAC and MP3 of 16 kHz and more, mono or stereo, of which it takes the average. It does not resample
# upwards, such as telephone audio of 8 kHz, and misreads more than two channels: convert those to 16 kHz mono first.
model = og.Model("{folder}")
processor, tokenizer = model.create_multimodal_processor(), og.Tokenizer(model)
generator = og.Generator(model, og.GeneratorParams(model))
generator.set_inputs(processor("", audios=og.Audios.open("{audio}")))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
""",
)

ONNX_ASR = Layout(
    "onnx-asr",
    ("onnx-asr", "onnxruntime", "soundfile"),
    ONNX_ASR_GRAPHS,
    (ONNX_ASR_CONFIG,),
    ("vocab.txt",),
    """\
import onnx_asr
import soundfile

model = onnx_asr.load_model("nemo-conformer-tdt", "{folder}")
samples, sample_rate = soundfile.read("{audio}", dtype="float32", always_2d=True)
# The average of the channels. onnx-asr resamples from 8, 11.025, 16, 22.05, 24, 32, 44.1 and 48 kHz.
print(model.recognize(samples.mean(axis=1), sample_rate=sample_rate))
""",
)

SHERPA_ONNX = Layout(
    "sherpa-onnx",
    ("sherpa-onnx", "soundfile"),
    SHERPA_ONNX_GRAPHS,
    (),
    ("tokens.txt",),
    """\
import sherpa_onnx
import soundfile

files = {{name: f"{folder}/{{name}}.onnx" for name in ("encoder", "decoder", "joiner")}}
recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
    **files, tokens="{folder}/tokens.txt", model_type="nemo_transducer", num_threads=4
)
stream = recognizer.create_stream()
samples, sample_rate = soundfile.read("{audio}", dtype="float32", always_2d=True)
stream.accept_waveform(sample_rate, samples.mean(axis=1))  # the average of the channels, at any sample rate
recognizer.decode_stream(stream)
print(stream.result.text)
""",
)

# In the order in which they are written: onnx-asr's joined graph is read from files that none shares as yet, since
# onnx_ir refuses those of several names.
LAYOUTS = {layout.runtime: layout for layout in (GENAI, ONNX_ASR, SHERPA_ONNX)}


def usage(runtime: str, folder: str, audio: str = "audio.wav") -> str:
    """Python that transcribes `audio`, its channels averaged, with the model in `folder`."""
    return LAYOUTS[runtime].usage.format(folder=folder, audio=audio)


def layout_of(folder: Path) -> Layout:
    """The layout of one model folder: by its last graph, whose name each runtime has to itself."""
    others = (ONNX_ASR, SHERPA_ONNX)
    return next((layout for layout in others if (folder / layout.graphs[-1].file).is_file()), GENAI)


def layouts_in(folder: Path) -> dict[str, Layout]:
    """Subfolder → layout, for a folder exported for several runtimes; "" → layout for a model folder."""
    found = {name: layout for name, layout in LAYOUTS.items() if (folder / name / layout.encoder.file).is_file()}
    return found or {"": layout_of(folder)}


def genai_folder(folder: Path) -> Path:
    """`folder`, or its subfolder for ONNX Runtime GenAI. Raises ValueError where it is another runtime's."""
    found = layouts_in(folder)
    if "" in found and found[""] is GENAI:
        return folder
    if GENAI.runtime in found:
        return folder / GENAI.runtime
    runtimes = " and ".join(layout.runtime for layout in found.values())
    raise ValueError(
        f"wanted a folder for ONNX Runtime GenAI, found one for {runtimes} in {folder}; "
        f"make one with: {EXPORT_COMMAND.format('./onnx_models')} --runtime genai"
    )


def check_same_shape(folder: Path, wanted: dict[str, Layout]) -> None:
    """Raise ValueError where `folder` is for one runtime and is to become that of another, or of several, or the other
    way round: a reader would take one for the other. Also where a manifest that is to be kept is another's."""
    found = layouts_in(folder)
    if ("" not in found or (folder / MANIFEST).is_file()) and found.get("") is not wanted.get(""):
        runtimes, others = (" and ".join(layout.runtime for layout in each.values()) for each in (wanted, found))
        raise ValueError(f"wanted a folder for {runtimes}, found one for {others} in {folder}; give another")
    for name in wanted:
        read_manifest(folder / name)  # raises where it is none, which later would be after the work


def check_supports(spec: ModelSpec, runtime: str) -> None:
    """Raise ValueError naming what `runtime` cannot compute of this checkpoint."""
    if runtime == GENAI.runtime:
        check_genai_supports(spec)
    else:
        check_fixed_supports(spec, runtime)


def write_layout(layout: Layout, source: Path, target: Path, spec: ModelSpec, tokens: str) -> None:
    """Write the folder `target` for onnx-asr or sherpa-onnx from the graphs in `source`; `tokens`: the vocabulary.

    Raises CheckError where a graph does not compute what its source does.
    """
    from common.views import check_view, write_view  # onnx_ir; readers of a folder need none

    target.mkdir()
    for graph in layout.graphs:
        metadata = sherpa_onnx_metadata(spec) if layout is SHERPA_ONNX and graph is layout.encoder else {}
        write_view(graph, source, target, metadata)
        check_view(graph, source, target, spec.vocab_size)
    if layout is ONNX_ASR:
        write_json(target / ONNX_ASR_CONFIG, onnx_asr_config(spec))
    (target / layout.vocabulary[0]).write_text(tokens, encoding="utf-8", newline="\n")
