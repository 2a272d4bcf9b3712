"""The steps of an export: NeMo's model → float32 graphs → verified → float16 graphs → verified.

torch and NeMo are imported inside the functions, so that usage errors are reported at once.
"""

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint import Checkpoint
from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import Piece, special_ids
from common.cli import Stages, size_text
from common.contract import GENAI_CONFIG, GRAPHS
from common.export.float16 import convert_graphs
from common.export.parity import LONG_CASE_MAX_PARAMETERS, References, make_cases, verify_graphs
from common.folder import write_json
from common.layouts.genai import genai_config
from common.layouts.layout import Layout
from common.onnx_io import MINIMUM_RUNTIME, minimum_runtime
from common.run.config import RuntimeConfig
from common.run.reference import features_of

FP32 = "fp32"
FP16 = "fp16"
PRECISIONS = (FP32, FP16)

# From the first opset with LayerNormalization to the newest that the wheels of onnxruntime-genai were built for.
OPSETS = range(17, 22)

# Peak memory and disk as multiples of the weights' size in float32, measured at 0.6B. Memory holds the weights (in NeMo
# or in the ONNX Runtime session), activations, and NeMo's code; disk the unpacked checkpoint and the exported weights.
MEMORY_FACTOR = 1.3
MEMORY_OF_NEMO = 1e9  # bytes
MEMORY_OF_LONG_CASE = 2.8e9  # bytes; a clip past 400 s, on which small encoders are verified; measured with 4 heads
DISK_FACTOR = 2.0
FLOAT16_DISK_FACTOR = 0.5  # in addition: the float16 weights beside the float32 ones

SUPPRESSED = "suppressed_tokens"  # in the manifest: how many tokens --scripts suppresses
BIAS = -1e4  # of such tokens in the joint: logits are at most hundreds, and float16 can hold this number
# ISO 15924 codes of characters that belong to several scripts or to none: digits, accents
SHARED = ("Zyyy", "Zinh", "Zzzz")
LETTERS = ("L", "M")  # of Unicode's general categories: letters, and the marks that some scripts write vowels with

SPEECH = Path(__file__).resolve().parents[2] / "samples"  # 40 s, on which --precision fp16 measures values
AUDIO_SUFFIXES = (".flac", ".wav")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The flags of export_parakeet_to_onnx.py that decide what is exported."""

    runtime: str  # as the manifest records it; which layouts it stands for is the script's concern
    opset_version: int = OPSETS[0]
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
        """Raise ValueError, before a checkpoint is downloaded, for a chunk of no length or a GPU that is not there."""
        if self.chunk_seconds == 0:
            raise ValueError("--chunk_seconds must be more than 0")
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ValueError("--device cuda needs a GPU that torch can use, and there is none; use --device cpu")

    @property
    def is_float16(self) -> bool:
        return self.precision == FP16

    @property
    def stages(self) -> int:
        """How many stages the export of the graphs prints."""
        return 2 + len(GRAPHS) + (1 + len(GRAPHS) if self.is_float16 else 0)

    def window(self, spec: ModelSpec) -> dict[str, int]:
        """How a clip is cut for the encoder, in samples, under the names that genai_config.json has for them.

        Raises ValueError unless each length is a whole number of encoder frames: the runtime divides by integers, and
        a remainder would shift every later seam.
        """
        frame_samples = spec.hop_length * spec.subsampling_factor
        frame = frame_samples / spec.sample_rate  # seconds
        samples = {}
        for name, least in (("chunk", 1), ("left_context", 0), ("right_context", 0)):
            seconds = getattr(self, f"{name}_seconds")
            frames = round(seconds / frame)
            if frames < least or abs(seconds / frame - frames) > 1e-6:
                raise ValueError(
                    f"--{name}_seconds must be a whole number of encoder frames of {frame:g} s; the one nearest to "
                    f"{seconds:g} is {max(frames, 1) * frame:g}"
                )
            samples[f"{name}_samples"] = frames * frame_samples
        return samples

    def needs(self, weight_bytes: int, folders: int) -> tuple[float, float]:
        """Bytes of peak memory, and of disk with scratch space, to export a checkpoint into several folders.

        weight_bytes: the size of its weights in float32.
        """
        memory = MEMORY_FACTOR * weight_bytes + MEMORY_OF_NEMO
        if not self.skip_verify and weight_bytes <= 4 * LONG_CASE_MAX_PARAMETERS:
            memory += MEMORY_OF_LONG_CASE
        disk = DISK_FACTOR + (FLOAT16_DISK_FACTOR if self.is_float16 else 0)
        if self.single_file:  # otherwise the folders share a data file
            disk += (folders - 1) * (FLOAT16_DISK_FACTOR if self.is_float16 else 1)
        return memory, disk * weight_bytes


@dataclass(frozen=True)
class Exported:
    """A checkpoint whose graphs are written and verified."""

    spec: ModelSpec
    graphs: Path  # the folder of the graphs
    files: dict[str, dict[str, bytes]]  # by subfolder: what its layout has beside the graphs, name → content
    measured: dict[str, Any]  # and what the graphs need, for the manifest


def export_checkpoint(
    checkpoint: Checkpoint, layouts: Mapping[str, Layout], options: ExportOptions, scratch: Path, stages: Stages
) -> Exported:
    """Export a checkpoint into a folder of `scratch` and verify it; float16 graphs are made of others.

    layouts: by the subfolder that each will have. Raises ValueError where the checkpoint has a part that cannot be
    exported or that a runtime cannot compute, CheckError where a graph differs from NeMo.
    """
    graphs = scratch / "graphs"
    float32 = scratch / "float32" if options.is_float16 else graphs
    for folder in {graphs, float32}:
        folder.mkdir()
    clips = sorted(path for path in SPEECH.rglob("*") if path.suffix in AUDIO_SUFFIXES) if options.is_float16 else []
    if options.is_float16 and not clips:
        raise FileNotFoundError(f"--precision fp16 measures on the audio in {SPEECH}, which has none; restore it")
    suppressed = suppressed_ids(checkpoint.tokenizer, options.scripts)

    stages.begin(f"checkpoint {checkpoint.path.name}")
    model = checkpoint.load_model(options.device, scratch)
    suppress(model.joint, suppressed)
    spec = ModelSpec.of(model)
    window = options.window(spec)
    files = {
        name: layout.make_files(spec, checkpoint.tokenizer, partial(features_of, model), window, options.device)
        for name, layout in layouts.items()
    }
    stages.end(
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters",
        f"encoder of {spec.encoder_layers} layers, {spec.encoder_dim} wide",
        f"{spec.num_mels} mel bins, {spec.vocab_size} tokens, durations of {list(spec.durations)} frames",
    )
    references = export_graphs(model, float32, options, stages)
    speech = []
    if clips:  # which are read and transcribed by GenAI's configuration
        write_json(float32 / GENAI_CONFIG, genai_config(spec, window))
        config = RuntimeConfig.read(float32)
        speech = [features_of(model, config.read_audio(clip)) for clip in clips]
    del model
    gc.collect()  # NeMo's modules refer to each other; the model is half of the memory in use

    measured: dict[str, Any] = {"parity": verify_graphs(float32, references, stages)}
    if options.is_float16:
        converted = convert_graphs(float32, graphs, references, speech, stages, single_file=options.single_file)
        measured = {**converted, "float32_parity": measured["parity"]}
    if options.scripts:
        measured[SUPPRESSED] = len(suppressed)
    measured[MINIMUM_RUNTIME] = minimum_runtime(graphs / graph.file for graph in GRAPHS)
    return Exported(spec, graphs, files, measured)


def export_graphs(model: Any, folder: Path, options: ExportOptions, stages: Stages) -> References:
    """Write the three graphs of NeMo's `model` into `folder`, in float32, and compute references to verify them with.

    Raises ValueError where the model has a part that cannot be exported.
    """
    from common.export.wrappers import WRAPPERS, Encoder, export_graph

    stages.begin("export")
    references = {}
    for graph in GRAPHS:
        module = getattr(model, graph.name)
        wrapper = WRAPPERS[graph](module)
        if options.is_float16 and isinstance(wrapper, Encoder):  # for a GPU, on which every operator costs time
            wrapper.blocks = 1
        single_file = options.single_file and not options.is_float16  # which is made of these graphs
        export_graph(wrapper, graph, folder, options.opset_version, single_file=single_file)
        if not options.skip_verify:
            references[graph] = make_cases(graph, module, wrapper.example_inputs)
    stages.end(*(f"{graph.file} {size_text(graph.bytes_in(folder))}" for graph in GRAPHS))
    return references


def suppressed_ids(tokenizer: ModelProto, scripts: str | None) -> list[int]:
    """Ids of the tokens with letters of other scripts than `scripts`, names separated by commas; none if it is None.

    A multilingual checkpoint without a language input sometimes writes one language in the script (writing system) of
    another; a bias that no logit outweighs costs nothing when the model runs, and it works in every runtime. Marks,
    bytes, the unknown piece and the blank are never suppressed. Raises ValueError for a script that the vocabulary has
    no letter of, listing those that it has.
    """
    if scripts is None:
        return []
    from fontTools import unicodedata

    hidden = set(special_ids(tokenizer))
    scripts_of_token: dict[int, set[str]] = {}
    for index, piece in enumerate(tokenizer.pieces):
        if index not in hidden and piece.type != Piece.BYTE:
            letters = [one for one in piece.piece if unicodedata.category(one)[0] in LETTERS]
            codes = {unicodedata.script(one) for one in letters}.difference(SHARED)
            scripts_of_token[index] = {unicodedata.script_name(code).lower() for code in codes}
    known = sorted(set().union(*scripts_of_token.values()))
    allowed = {name.strip().lower() for name in scripts.split(",")}
    if unknown := sorted(allowed.difference(known)):
        raise ValueError(
            f"--scripts must be among {', '.join(known)}, of which the checkpoint's vocabulary has letters, not "
            f"{', '.join(unknown) or 'empty'}"
        )
    return [index for index, names in scripts_of_token.items() if not names <= allowed]


def suppress(joint: Any, ids: Iterable[int]) -> None:
    """Add BIAS to the logits of the tokens `ids` in NeMo's `joint`. Raises ValueError where the joint has no bias."""
    import torch

    last = joint.joint_net[-1]
    if last.bias is None:
        raise ValueError("--scripts needs a joint with a bias, which this checkpoint lacks; leave --scripts out")
    with torch.no_grad():
        last.bias[list(ids)] += BIAS
