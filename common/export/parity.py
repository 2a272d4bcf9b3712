"""Verification of the exported graphs against the checkpoint's library, NeMo or transformers: valid frames only.

The reference is the library's own module, not the wrapper that was exported, so an error in the wrapper shows as well.
torch is imported inside the functions, so that importing this module takes no time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import CheckError
from common.contract import DECODER, ENCODER, FLOAT16_TOLERANCE, JOINT, PARITY_TOLERANCE, Graph
from common.run.ort import MAPPED, OpenGraph

if TYPE_CHECKING:
    import torch

# (B, T) of the encoder's cases: one encoder frame, batches of odd and different lengths, twenty seconds.
ENCODER_CASES = ((1, 8), (1, 200), (2, 333), (3, 517), (1, 2000))
# Past the 5000 encoder frames (400 s) where NeMo's position table ends; quadratic in memory, so for small models only.
LONG_CASE_FRAMES = 5100
LONG_CASE_MAX_PARAMETERS = 20e6
DECODER_STEPS = 12
JOINT_CASES = ((1, 1, 1), (2, 3, 2), (1, 7, 5))  # B, S, U

LENGTHS = ENCODER.output_names[1]

ExampleInputs = Callable[..., tuple["torch.Tensor", ...]]


@dataclass
class Parity:
    """The largest difference of all comparisons so far, absolute and relative to the reference's largest value.

    For float32 graphs the absolute one must not exceed PARITY_TOLERANCE, for float16 graphs the relative one
    FLOAT16_TOLERANCE: see common/contract.py for both.
    """

    library: str = "NeMo"
    float16: bool = False
    max_abs: float = 0.0
    max_rel: float = 0.0
    cases: int = 0

    def add(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        """Record one comparison. Raises CheckError beyond the tolerance; a NaN on either side always exceeds it."""
        if actual.shape != expected.shape:
            raise CheckError(f"{name} has an output of shape {actual.shape}, {self.library} one of {expected.shape}")
        error = float(np.max(np.abs(actual - expected), initial=0.0))
        error = error if np.isfinite(error) else float("inf")
        self.max_abs = max(self.max_abs, error)
        self.max_rel = max(self.max_rel, error / max(float(np.max(np.abs(expected), initial=0.0)), 1e-30))
        self.cases += 1
        if (self.max_rel > FLOAT16_TOLERANCE) if self.float16 else (self.max_abs > PARITY_TOLERANCE):
            kind, tolerance = ("relative", FLOAT16_TOLERANCE) if self.float16 else ("absolute", PARITY_TOLERANCE)
            raise CheckError(
                f"{name} differs from {self.library} by {self.max_abs:.1e} absolute, {self.max_rel:.1e} relative; "
                f"expected at most {tolerance:.0e} {kind}: the export is wrong, please report it"
            )

    def __str__(self) -> str:
        absolute = "" if self.float16 else f" (limit {PARITY_TOLERANCE:.0e})"
        relative = f" (limit {FLOAT16_TOLERANCE:.0e})" if self.float16 else ""
        return (
            f"largest difference from {self.library} {self.max_abs:.0e}{absolute}  "
            f"relative {self.max_rel:.0e}{relative}  {self.cases} comparisons"
        )

    def record(self) -> dict[str, float]:
        """For the manifest."""
        return {"max_abs": self.max_abs, "max_rel": self.max_rel, "cases": self.cases}


@dataclass(frozen=True)
class Case:
    """Inputs of a graph and the outputs of the library's module for them, so that the module can be freed."""

    inputs: tuple[np.ndarray, ...]
    expected: Mapping[str, np.ndarray]  # by the name of the output; the decoder passes its lengths through
    library: str


def encoder_cases(encoder: Any, example_inputs: ExampleInputs) -> list[Case]:
    """NeMo's outputs and lengths for `ENCODER_CASES`; for small models also for a clip of more than 400 s."""
    import torch

    shapes = list(ENCODER_CASES)
    if sum(parameter.numel() for parameter in encoder.parameters()) <= LONG_CASE_MAX_PARAMETERS:
        shapes.append((1, LONG_CASE_FRAMES * encoder.subsampling_factor))
    cases = []
    for batch, frames in shapes:
        features, lengths = example_inputs(batch, frames)
        with torch.inference_mode():
            outputs = encoder(audio_signal=_like(features, encoder), length=_like(lengths, encoder))
        expected = dict(zip(ENCODER.output_names, outputs, strict=True))
        cases.append(_case(encoder, (features, lengths), expected))
    return cases


def decoder_cases(decoder: Any, example_inputs: ExampleInputs) -> list[Case]:
    """The outputs and states of NeMo's prediction network along a chain of tokens that starts with the blank.

    The states among the inputs are used in the first case only: after that, a graph continues from its own states.
    """
    import torch

    batch = 2
    tokens, _, *zeros = example_inputs(batch, DECODER_STEPS)
    state = tuple(_like(part, decoder) for part in zeros)
    cases = []
    for step in range(DECODER_STEPS):
        targets = torch.full_like(tokens[:, :1], decoder.blank_idx) if step == 0 else tokens[:, step : step + 1]
        fed = None if step == 0 else _like(targets, decoder)  # NeMo starts without a token, that is, with a zero vector
        before = state
        with torch.inference_mode():
            output, state = decoder.predict(fed, state=before, add_sos=False)
        inputs = (targets, torch.ones(batch, dtype=torch.int64), *before)
        h, c = state
        cases.append(_case(decoder, inputs, {"decoder_output": output.transpose(1, 2), "h_out": h, "c_out": c}))
    return cases


def joint_cases(joint: Any, example_inputs: ExampleInputs) -> list[Case]:
    """NeMo's raw logits for several S and U."""
    import torch

    cases = []
    for batch, frames, targets in JOINT_CASES:
        encoded, predicted = example_inputs(batch, frames, targets)
        with torch.inference_mode():
            hidden = joint.project_encoder(_like(encoded, joint))[:, :, None]
            hidden = hidden + joint.project_prednet(_like(predicted, joint))[:, None]
            cases.append(_case(joint, (encoded, predicted), {"joint_output": joint.joint_net(hidden)}))
    return cases


# Each module is an attribute of the library's model that has the name of the graph.
CASES: dict[Graph, Callable[[Any, ExampleInputs], list[Case]]] = {
    ENCODER: encoder_cases,
    DECODER: decoder_cases,
    JOINT: joint_cases,
}


def check_graph(
    folder: Path, graph: Graph, cases: Sequence[Case], open_graph: OpenGraph = MAPPED, *, float16: bool = False
) -> Parity:
    """Run `graph` of a folder on the inputs of `cases` and compare its outputs with the library's. Raises CheckError.

    Where the cases have lengths, the graph's must equal them, and the valid frames alone are compared. A graph with
    states continues from its own, so that a wrong state also shows in what follows.
    """
    run = open_graph(folder, graph)
    parity = Parity(library=cases[0].library, float16=float16)
    states: list[np.ndarray] = []
    for case in cases:
        inputs = (*case.inputs[: len(case.inputs) - len(states)], *states)
        outputs = dict(zip(graph.output_names, run(*inputs), strict=True))
        states = [outputs[tensor.name] for tensor in graph.outputs if "L" in tensor.axes]
        lengths = case.expected.get(LENGTHS)
        if lengths is not None and outputs[LENGTHS].tolist() != lengths.tolist():
            raise CheckError(
                f"{LENGTHS} of {graph.file} are {outputs[LENGTHS].tolist()}, in {case.library} {lengths.tolist()}: the "
                "export is wrong, please report it"
            )
        for name, expected in case.expected.items():
            if lengths is None:
                parity.add(graph.file, outputs[name], expected)
            elif name != LENGTHS:
                for row, valid in enumerate(lengths):
                    parity.add(graph.file, outputs[name][row, :, :valid], expected[row, :, :valid])
    return parity


def _case(module: Any, inputs: Sequence["torch.Tensor"], expected: Mapping[str, "torch.Tensor"]) -> Case:
    return Case(
        library=getattr(module, "library", "NeMo"),
        inputs=tuple(tensor.cpu().numpy() for tensor in inputs),
        expected={name: tensor.cpu().numpy() for name, tensor in expected.items()},
    )


def _like(tensor: "torch.Tensor", module: "torch.nn.Module") -> "torch.Tensor":
    """`tensor` on the device of `module`."""
    return tensor.to(next(module.parameters()).device)
