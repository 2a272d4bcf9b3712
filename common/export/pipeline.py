"""The steps of an export: NeMo's model → float32 graphs → verified → float16 graphs → verified.

torch and NeMo are imported inside the functions, so that usage errors are reported at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint.spec import ModelSpec
from common.cli import Stages, size_text
from common.contract import GRAPHS, Graph
from common.export.parity import CASES, LONG_CASE_MAX_PARAMETERS, Case, check_graph

FP32 = "fp32"
FP16 = "fp16"
PRECISIONS = (FP32, FP16)

MIN_OPSET = 17  # the first with LayerNormalization
MAX_OPSET = 21  # the newest that the wheels of onnxruntime-genai were built for

# Peak memory and disk as multiples of the weights' size in float32, measured at 0.6B. Memory holds the weights (in NeMo
# or in the ONNX Runtime session), activations, and NeMo's code; disk the unpacked checkpoint and the exported weights.
MEMORY_FACTOR = 1.3
MEMORY_OF_NEMO = 1e9  # bytes
MEMORY_OF_LONG_CASE = 2.8e9  # bytes; a clip past 400 s, on which small encoders are verified; measured with 4 heads
FLOAT32_BYTES = 4
DISK_FACTOR = 2.0
FLOAT16_DISK_FACTOR = 0.5  # in addition: the float16 weights beside the float32 ones

AUDIO_SUFFIXES = (".flac", ".wav")

References = Mapping[Graph, Sequence[Case]]  # empty where nothing is to be verified


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The flags of export_parakeet_to_onnx.py that decide what is exported."""

    runtime: str  # as the manifest records it; which layouts it stands for is the script's concern
    opset_version: int = MIN_OPSET
    precision: str = FP32
    device: str = "cpu"
    # Chunks of 60 s with this context encode each second of a long clip 1.2 times, and clips up to 60 s have the full
    # context that they have in NeMo.
    chunk_seconds: float = 60
    left_context_seconds: float = 10
    right_context_seconds: float = 2
    skip_verify: bool = False
    single_file: bool = False  # the encoder's weights are in encoder.onnx
    scripts: str | None = None  # writing systems that the text may be in, separated by commas; None: any

    def __post_init__(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        if not MIN_OPSET <= self.opset_version <= MAX_OPSET:
            raise ValueError(f"--opset_version must be {MIN_OPSET} to {MAX_OPSET}, not {self.opset_version}")
        if self.chunk_seconds == 0:
            raise ValueError("--chunk_seconds must be more than 0")

    def record(self) -> dict[str, Any]:
        """The flags as the manifest records them."""
        return asdict(self)

    @property
    def is_float16(self) -> bool:
        return self.precision == FP16

    @property
    def stages(self) -> int:
        """How many stages the export of the graphs prints."""
        conversion = 1 + len(GRAPHS) if self.is_float16 else 0
        return 2 + len(GRAPHS) + conversion

    def window(self, spec: ModelSpec) -> dict[str, int]:
        """How a clip is cut for the encoder, in samples, under the names that genai_config.json has for them.

        Raises ValueError unless each length is a whole number of encoder frames: the runtime divides by integers, and
        a remainder would shift every later seam.
        """
        lengths = {
            "chunk": self.chunk_seconds,
            "left_context": self.left_context_seconds,
            "right_context": self.right_context_seconds,
        }
        samples = {}
        for name, seconds in lengths.items():
            exact = seconds * spec.sample_rate
            frame = spec.frame_samples
            if exact < (frame if name == "chunk" else 0) or abs(exact / frame - round(exact / frame)) > 1e-6:
                raise ValueError(
                    f"--{name}_seconds must be a whole number of encoder frames of {frame / spec.sample_rate:g} s; the "
                    f"one nearest to {seconds:g} is {max(round(exact / frame), 1) * frame / spec.sample_rate:g}"
                )
            samples[f"{name}_samples"] = round(exact)
        return samples

    def memory_bytes(self, weight_bytes: int) -> float:
        """Peak memory of exporting a checkpoint whose weights have that size in float32."""
        long_case = MEMORY_OF_LONG_CASE if self._verifies_long_case(weight_bytes) else 0
        return MEMORY_FACTOR * weight_bytes + MEMORY_OF_NEMO + long_case

    def memory_note(self, weight_bytes: int) -> str:
        """What takes most of the memory where the checkpoint does not; otherwise nothing."""
        if not self._verifies_long_case(weight_bytes):
            return ""
        return (
            f"{size_text(MEMORY_OF_LONG_CASE)} of the memory are for a clip of seven minutes, on which small encoders "
            "are verified too; --skip_verify leaves all verification out"
        )

    def _verifies_long_case(self, weight_bytes: int) -> bool:
        return not self.skip_verify and weight_bytes <= LONG_CASE_MAX_PARAMETERS * FLOAT32_BYTES

    def disk_bytes(self, weight_bytes: int, folders: int) -> float:
        """Disk needed, scratch space included, to export a checkpoint whose weights have that size in float32."""
        factor = DISK_FACTOR + (FLOAT16_DISK_FACTOR if self.is_float16 else 0)
        if self.single_file:  # otherwise the folders share a data file
            factor += (folders - 1) * (FLOAT16_DISK_FACTOR if self.is_float16 else 1)
        return factor * weight_bytes


def model_summary(model: Any, spec: ModelSpec) -> list[str]:
    """The size of a loaded model, for printing."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{parameters / 1e6:.1f} M parameters",
        f"encoder of {spec.encoder_layers} layers, {spec.encoder_dim} wide",
        f"{spec.num_mels} mel bins, {spec.vocab_size} tokens, durations of {list(spec.durations)} frames",
    ]


def export_graphs(model: Any, folder: Path, options: ExportOptions) -> References:
    """Write the three graphs of NeMo's `model` into `folder`, in float32, and compute references to verify them with.

    Raises ValueError where the model has a part that cannot be exported.
    """
    from common.export.wrappers import WRAPPERS, Encoder, export_graph

    references = {}
    for graph in GRAPHS:
        module = getattr(model, graph.name)
        wrapper = WRAPPERS[graph](module)
        if options.is_float16 and isinstance(wrapper, Encoder):  # for a GPU, on which every operator costs time
            wrapper.blocks = 1
        single_file = options.single_file and not options.is_float16  # which is made of these graphs
        export_graph(wrapper, graph, folder, options.opset_version, single_file=single_file)
        if not options.skip_verify:
            references[graph] = CASES[graph](module, wrapper.example_inputs)
    return references


def graph_sizes(folder: Path) -> list[str]:
    """Each graph's file and its size with its weights, for printing."""
    return [f"{graph.file} {size_text(graph.bytes_in(folder))}" for graph in GRAPHS]


def verify_graphs(folder: Path, references: References, stages: Stages) -> dict[str, Any]:
    """Run the float32 graphs in ONNX Runtime and compare them with NeMo. Graph's file → record for the manifest.

    Raises CheckError for a graph that differs by more than the tolerance.
    """
    records = {}
    for graph in GRAPHS:
        stages.begin(f"verify {graph.file}")
        if graph not in references:
            stages.end("not verified")
            continue
        parity = check_graph(folder, graph, references[graph])
        records[graph.file] = parity.record()
        stages.end(str(parity))
    return records


def find_clips(folder: Path) -> list[Path]:
    """The audio files in `folder` and below. Raises FileNotFoundError if there are none."""
    clips = sorted(path for path in folder.rglob("*") if path.suffix in AUDIO_SUFFIXES)
    if not clips:
        raise FileNotFoundError(
            f"--precision fp16 measures on the audio in {folder}, which has none; restore that folder"
        )
    return clips


def convert_to_float16(
    source: Path,
    target: Path,
    references: References,
    speech: Sequence[np.ndarray],
    stages: Stages,
    *,
    single_file: bool,
) -> dict[str, Any]:
    """Convert the graphs of the float32 folder `source` into `target` and verify them; return the manifest's record.

    source: holds genai_config.json as well. speech: features [M, T] on which the values inside the graphs are measured.
    single_file: the encoder holds its weights, as the other graphs do.
    Each graph is verified as ONNX Runtime runs it on the CPU, and as a GPU that rounds each result to float16 would.
    Raises CheckError as verify_graphs does.
    """
    from common.export.float16 import LARGEST_FLOAT16, LIMIT, EmulatedGraph, convert, measure_ranges

    stages.begin(f"values inside the model on {len(speech)} clips of speech")
    ranges = measure_ranges(source, speech)
    largest = max(max(values.values()) for values in ranges.values())
    stages.end(
        f"the largest is {largest:.0f}",
        f"float16 holds up to {LARGEST_FLOAT16:.0f}; operators with values from {LIMIT:.0f} on stay float32",
    )
    parity: dict[str, Any] = {}
    float16: dict[str, Any] = {}
    for graph in GRAPHS:
        stages.begin(f"{graph.file} in float16")
        float16[graph.file], converted = convert(source, target, graph, ranges[graph.name], single_file=single_file)
        kept = len(float16[graph.file]["kept_float32"]) + len(float16[graph.file]["kept_exact"])
        fields = [f"{kept} of {kept + converted} operators stay float32", size_text(graph.bytes_in(target))]
        if graph in references:
            parity[graph.file] = check_graph(target, graph, references[graph], float16=True).record()
            rounded = check_graph(target, graph, references[graph], EmulatedGraph, float16=True)
            float16[graph.file]["rounded_parity"] = rounded.record()
            fields.append(f"rounded as on a GPU: {rounded}")
        else:
            fields.append("not verified")
        stages.end(*fields)
    return {"parity": parity, "float16": float16}
