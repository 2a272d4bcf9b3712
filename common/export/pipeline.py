"""The export of a checkpoint: NeMo's model → float32 graphs → verified → float16 graphs → verified.

torch and NeMo are imported inside the functions, so that importing this module takes no time.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.checkpoint.find import format_of
from common.checkpoint.spec import ModelSpec
from common.cli import Stages, size_text
from common.contract import GRAPHS, Graph
from common.export.options import ExportOptions
from common.export.writing import suppress, suppressed_ids
from common.run.config import RuntimeConfig
from common.run.ort import MAPPED
from common.run.reference import features_of

if TYPE_CHECKING:
    from common.export.parity import Case

SUPPRESSED = "suppressed_tokens"  # in the manifest: how many tokens --scripts suppresses
AUDIO_SUFFIXES = (".flac", ".wav")

References = Mapping[Graph, Sequence["Case"]]  # empty where nothing is to be verified
Features = Callable[[np.ndarray], np.ndarray]  # samples [N] → the library's own features [M, T]
Configure = Callable[[ModelSpec, Path, Features], None]


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    options: ExportOptions,
    scratch: Path,
    clips: Sequence[Path],
    configure: Configure,
    stages: Stages,
) -> tuple[ModelSpec, dict[str, Any]]:
    """Write the verified graphs into the folder `target`; return the checkpoint's numbers and the manifest's results.

    scratch: a folder for temporary files. clips: audio on which the float16 conversion measures. configure: is called
    before the export; it raises ValueError for a checkpoint that is not to be exported, and for float16 writes
    genai_config.json into the folder that it is given. Raises ParityError for a graph that differs from NeMo.
    """
    suppressed = suppressed_ids(checkpoint, options.scripts)
    float32 = scratch / "float32" if options.is_float16 else target
    float32.mkdir(exist_ok=True)
    stages.begin(f"checkpoint {checkpoint.name}")
    model = format_of(checkpoint).load_model(checkpoint, options.device, scratch)
    suppress(model.joint, suppressed)
    spec = ModelSpec.of(model)
    configure(spec, float32, partial(features_of, model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stages.end(
        f"{parameters / 1e6:.1f} M parameters",
        f"encoder of {spec.encoder_layers} layers, {spec.encoder_dim} wide",
        f"{spec.num_mels} mel bins, {spec.vocab_size} tokens, durations of {list(spec.durations)} frames",
    )
    stages.begin("export")
    references = export_graphs(model, float32, options)
    speech = speech_features(model, float32, clips) if options.is_float16 else []
    stages.end(*(f"{graph.file} {graph_size(float32, graph)}" for graph in GRAPHS))
    del model
    gc.collect()  # NeMo's modules refer to each other; the model is half of the memory in use
    parity = verify_graphs(float32, references, stages)
    results: dict[str, Any] = {SUPPRESSED: len(suppressed)} if options.scripts else {}
    if not options.is_float16:
        return spec, {"parity": parity, **results}
    converted = convert_to_float16(float32, target, references, speech, stages)
    return spec, {**converted, "float32_parity": parity, **results}


def export_graphs(model: Any, folder: Path, options: ExportOptions) -> References:
    """Write the three graphs of NeMo's `model` into `folder`, in float32, and compute references to verify them with.

    Raises ValueError where the model has a part that cannot be exported.
    """
    from common.export.parity import VERIFICATIONS
    from common.export.trace import export_graph
    from common.export.wrappers import WRAPPERS

    references = {}
    for graph in GRAPHS:
        module = getattr(model, graph.name)
        wrapper = WRAPPERS[graph](module)
        if options.is_float16:
            wrapper.for_float16()
        export_graph(wrapper, graph, folder, options.opset_version)
        if not options.skip_verify:
            references[graph] = VERIFICATIONS[graph].cases(module, wrapper.example_inputs)
    return references


def verify_graphs(folder: Path, references: References, stages: Stages) -> dict[str, Any]:
    """Run the float32 graphs in ONNX Runtime and compare them with NeMo. Graph's file → record for the manifest.

    Raises ParityError for a graph that differs by more than the tolerance.
    """
    from common.export.parity import VERIFICATIONS

    records = {}
    for graph in GRAPHS:
        stages.begin(f"verify {graph.file}")
        if graph not in references:
            stages.end("not verified")
            continue
        parity = VERIFICATIONS[graph].check(folder, references[graph])
        records[graph.file] = parity.record()
        stages.end(str(parity))
    return records


def find_clips(folder: Path) -> list[Path]:
    """The audio files in `folder` and below. Raises FileNotFoundError if there are none."""
    clips = sorted(path for path in folder.rglob("*") if path.suffix in AUDIO_SUFFIXES)
    if not clips:
        raise FileNotFoundError(
            f"expected audio in {folder}, on which the float16 conversion measures, got none; restore that folder"
        )
    return clips


def speech_features(model: Any, folder: Path, clips: Sequence[Path]) -> list[np.ndarray]:
    """The model's own features of `clips`, [M, T] each, read as the configuration in `folder` says."""
    config = RuntimeConfig.read(folder)
    return [features_of(model, config.read_audio(path)) for path in clips]


def convert_to_float16(
    source: Path, target: Path, references: References, speech: Sequence[np.ndarray], stages: Stages
) -> dict[str, Any]:
    """Convert the graphs of the float32 folder `source` into `target` and verify them; return the manifest's record.

    speech: features [M, T] on which the values inside the graphs are measured. Each graph is verified as ONNX Runtime
    runs it on the CPU, and as a GPU that rounds each result to float16 would. Raises ParityError as verify_graphs does.
    """
    from common.export.float16 import LARGEST_FLOAT16, LIMIT, EmulatedGraph, convert
    from common.export.parity import VERIFICATIONS
    from common.export.ranges import measure_ranges

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
        conversion = convert(source, target, graph, ranges[graph.name])
        float16[graph.file] = conversion.record()
        fields = [
            f"{conversion.kept_float32} of {conversion.operators} operators stay float32",
            graph_size(target, graph),
        ]
        if graph in references:
            check = VERIFICATIONS[graph].check
            parity[graph.file] = check(target, references[graph], MAPPED, float16=True).record()
            rounded = check(target, references[graph], EmulatedGraph, float16=True)
            float16[graph.file]["rounded_parity"] = rounded.record()
            fields.append(f"rounded as on a GPU: {rounded}")
        else:
            fields.append("not verified")
        stages.end(*fields)
    return {"parity": parity, "float16": float16}


def graph_size(folder: Path, graph: Graph) -> str:
    """The size of a graph with its weights, for printing."""
    return size_text(sum((folder / name).stat().st_size for name in graph.files))
