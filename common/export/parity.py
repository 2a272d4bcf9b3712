"""Verification of the exported graphs against the checkpoint's library, NeMo or transformers: valid frames only.

The reference is the library's own module, not the wrapper that was exported, so an error in the wrapper shows as well.
torch is imported inside the functions, so that importing this module takes no time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.cli import CheckError, Stages
from common.contract import DECODER, ENCODER, FLOAT16_TOLERANCE, GRAPHS, JOINT, PARITY_TOLERANCE, Graph
from common.run.ort import MAPPED, OpenGraph

if TYPE_CHECKING:
    import torch

    Tensors = tuple[torch.Tensor, ...]
    ExampleInputs = Callable[..., Tensors]

# (B, T) of the encoder's cases: one encoder frame, batches of odd and different lengths, twenty seconds.
ENCODER_CASES = ((1, 8), (1, 200), (2, 333), (3, 517), (1, 2000))
# Past the 5000 encoder frames (400 s) where NeMo's position table ends; quadratic in memory, so for small models only.
LONG_CASE_FRAMES = 5100
LONG_CASE_MAX_PARAMETERS = 20e6
DECODER_STEPS = 12
JOINT_CASES = ((1, 1, 1), (2, 3, 2), (1, 7, 5))  # B, S, U


class Case(NamedTuple):
    """Inputs of a graph and the outputs of the library's module for them, so that the module can be freed."""

    inputs: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    library: str


References = Mapping[Graph, Sequence[Case]]  # empty where nothing is to be verified


def encoder_cases(encoder: Any, example_inputs: "ExampleInputs") -> "Iterator[tuple[Tensors, Tensors]]":
    """Inputs and outputs of NeMo's encoder for `ENCODER_CASES`; for small models also for a clip of more than 400 s."""
    shapes = list(ENCODER_CASES)
    if sum(parameter.numel() for parameter in encoder.parameters()) <= LONG_CASE_MAX_PARAMETERS:
        shapes.append((1, LONG_CASE_FRAMES * encoder.subsampling_factor))
    for batch, frames in shapes:
        features, lengths = example_inputs(batch, frames)
        yield (features, lengths), encoder(audio_signal=features, length=lengths)


def decoder_cases(decoder: Any, example_inputs: "ExampleInputs") -> "Iterator[tuple[Tensors, Tensors]]":
    """Inputs and outputs of NeMo's prediction network along a chain of tokens that starts with the blank."""
    tokens, _, *state = example_inputs(2, DECODER_STEPS)
    tokens[:, 0] = decoder.blank_idx
    ones = tokens[:, 0] * 0 + 1
    for step in range(DECODER_STEPS):
        targets = tokens[:, step : step + 1]
        # NeMo starts without a token, that is, with a zero vector.
        output, new_state = decoder.predict(targets if step else None, state=tuple(state), add_sos=False)
        yield (targets, ones, *state), (output.transpose(1, 2), ones, *new_state)
        state = new_state


def joint_cases(joint: Any, example_inputs: "ExampleInputs") -> "Iterator[tuple[Tensors, Tensors]]":
    """Inputs and NeMo's raw logits for several S and U."""
    for sizes in JOINT_CASES:
        encoded, predicted = example_inputs(*sizes)
        hidden = joint.project_encoder(encoded)[:, :, None] + joint.project_prednet(predicted)[:, None]
        yield (encoded, predicted), (joint.joint_net(hidden),)


CASES = {ENCODER: encoder_cases, DECODER: decoder_cases, JOINT: joint_cases}


def make_cases(graph: Graph, module: Any, example_inputs: "ExampleInputs") -> list[Case]:
    """What the library computes with `module`, from which `graph` is exported, for inputs of several sizes."""
    import torch

    device = next(module.parameters()).device
    library = getattr(module, "library", "NeMo")

    def on_device(*sizes: int) -> "Tensors":
        return tuple(tensor.to(device) for tensor in example_inputs(*sizes))

    def arrays(tensors: "Tensors") -> tuple[np.ndarray, ...]:
        return tuple(tensor.cpu().numpy() for tensor in tensors)

    with torch.inference_mode():
        cases = CASES[graph](module, on_device)
        return [Case(arrays(inputs), arrays(outputs), library) for inputs, outputs in cases]


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
        records[graph.file], text = check_graph(folder, graph, references[graph])
        stages.end(text)
    return records


def check_graph(
    folder: Path, graph: Graph, cases: Sequence[Case], open_graph: OpenGraph = MAPPED, *, float16: bool = False
) -> tuple[dict[str, float], str]:
    """Run `graph` of a folder on the inputs of `cases` and compare its outputs with the library's.

    Lengths must be equal, and only the valid frames of a clip are compared. A graph with states continues from its own,
    so that a wrong state also shows in what follows. Returns the largest difference of all comparisons, absolute and
    relative to the reference's largest value, for the manifest; and the same in words. Raises CheckError where the
    absolute one of a float32 graph exceeds PARITY_TOLERANCE, or the relative one of a float16 graph FLOAT16_TOLERANCE
    (common/contract.py has the reasons for both).
    """
    run = open_graph(folder, graph)
    errors: list[tuple[float, float]] = []
    states: list[np.ndarray] = []
    for case in cases:
        outputs = run(*case.inputs[: len(case.inputs) - len(states)], *states)
        states = [output for output, tensor in zip(outputs, graph.outputs, strict=True) if "L" in tensor.axes]
        lengths = case.expected[1] if graph is ENCODER else None
        for output, expected in zip(outputs, case.expected, strict=True):
            errors += _differences(output, expected, lengths)
    max_abs, max_rel = (max(each) for each in zip(*errors, strict=True))
    library = cases[0].library
    limit = FLOAT16_TOLERANCE if float16 else PARITY_TOLERANCE
    kind, error = ("relative", max_rel) if float16 else ("absolute", max_abs)
    if error > limit:
        raise CheckError(
            f"{graph.file} differs from {library} by {max_abs:.1e} absolute, {max_rel:.1e} relative, more than "
            f"{limit:.0e} {kind}: the export is wrong, please report it"
        )
    found = f"{max_abs:.0e} absolute, {max_rel:.0e} relative (limit {limit:.0e} {kind})"
    text = f"largest difference from {library} {found}  {len(errors)} comparisons"
    return {"max_abs": max_abs, "max_rel": max_rel, "cases": len(errors)}, text


def _differences(actual: np.ndarray, expected: np.ndarray, lengths: np.ndarray | None) -> Iterator[tuple[float, float]]:
    """The largest absolute and relative difference; of each clip, over its valid frames, where there are lengths.

    They are infinite where shapes or lengths differ, or for a NaN on either side.
    """
    if expected.dtype.kind == "i":
        if not np.array_equal(actual, expected):
            yield np.inf, np.inf
    elif actual.shape != expected.shape:
        yield np.inf, np.inf
    elif lengths is not None:
        for row, other, valid in zip(actual, expected, lengths, strict=True):
            yield from _differences(row[:, :valid], other[:, :valid], None)
    else:
        error = float(np.max(np.abs(actual - expected), initial=0.0))
        error = error if np.isfinite(error) else np.inf
        yield error, error / max(float(np.max(np.abs(expected), initial=0.0)), 1e-30)
