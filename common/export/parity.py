"""Does the ONNX graph compute what NeMo's module computes? Measured on the valid frames only, against a tolerance.

The reference is NeMo's own module, not the wrapper that was exported, so a mistake in the wrapper shows as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.cli import CheckError
from common.contract import DECODER, ENCODER, FLOAT16_TOLERANCE, JOINT, PARITY_TOLERANCE
from common.run.ort import MAPPED, OpenGraph

# Mel frames: one encoder frame, ragged odd lengths, twenty seconds.
ENCODER_CASES = ((1, 8), (1, 200), (2, 333), (3, 517), (1, 2000))
# Past the 5000 encoder frames (400 s) where NeMo's position table ends; quadratic in memory, so for small models.
LONG_CASE_FRAMES = 5100
LONG_CASE_MAX_PARAMETERS = 20e6
DECODER_STEPS = 12
JOINT_CASES = ((1, 1, 1), (2, 3, 2), (1, 7, 5))  # B, S, U


class ParityError(CheckError):
    """A graph is further from NeMo than the tolerance."""


@dataclass
class Parity:
    """The largest difference seen, absolute and relative to the largest value of the reference.

    A float32 graph is held to PARITY_TOLERANCE, the first of them, a float16 one to FLOAT16_TOLERANCE, the second.
    """

    float16: bool = False
    max_abs: float = 0.0
    max_rel: float = 0.0
    cases: int = 0

    def add(self, name: str, found: np.ndarray, wanted: np.ndarray) -> None:
        """Take in one comparison; a NaN on either side counts as infinitely wrong. Raises ParityError beyond the
        tolerance."""
        if found.shape != wanted.shape:
            raise ParityError(f"wanted an output of shape {wanted.shape}, the graph gave {found.shape}")
        error = float(np.max(np.abs(found - wanted), initial=0.0))
        error = error if np.isfinite(error) else float("inf")
        self.max_abs = max(self.max_abs, error)
        self.max_rel = max(self.max_rel, error / max(float(np.max(np.abs(wanted), initial=0.0)), 1e-30))
        self.cases += 1
        if (self.max_rel > FLOAT16_TOLERANCE) if self.float16 else (self.max_abs > PARITY_TOLERANCE):
            kind, tolerance = ("relative ", FLOAT16_TOLERANCE) if self.float16 else ("", PARITY_TOLERANCE)
            raise ParityError(
                f"{name} is max|Δ| {self.max_abs:.1e}, relative {self.max_rel:.1e} from NeMo; tolerance "
                f"{kind}{tolerance:.0e}: the export is wrong"
            )

    def __str__(self) -> str:
        absolute = "" if self.float16 else f" ≤ {PARITY_TOLERANCE:.0e}"
        relative = f" ≤ {FLOAT16_TOLERANCE:.0e}" if self.float16 else ""
        return f"max|Δ| {self.max_abs:.0e}{absolute}  relative {self.max_rel:.0e}{relative}  {self.cases} cases"

    def record(self) -> dict:
        """For the manifest."""
        return {"max_abs": self.max_abs, "max_rel": self.max_rel, "cases": self.cases}


@dataclass(frozen=True)
class Case:
    """What goes into a graph, and what NeMo's module makes of it. Independent of the module, which can then go."""

    inputs: tuple[np.ndarray, ...]
    wanted: tuple[np.ndarray, ...]


def encoder_cases(encoder, example_inputs) -> list[Case]:
    """NeMo's outputs and lengths over `ENCODER_CASES`; of small models also past 400 s."""
    shapes = list(ENCODER_CASES)
    if sum(parameter.numel() for parameter in encoder.parameters()) <= LONG_CASE_MAX_PARAMETERS:
        shapes.append((1, LONG_CASE_FRAMES * encoder.subsampling_factor))
    cases = []
    for batch, frames in shapes:
        features, lengths = example_inputs(batch, frames)
        with torch.inference_mode():
            wanted = encoder(audio_signal=_like(features, encoder), length=_like(lengths, encoder))
        cases.append(_case((features, lengths), wanted))
    return cases


def decoder_cases(decoder, example_inputs) -> list[Case]:
    """NeMo's prediction network along a chain of tokens that starts with blank: its outputs and states. Of the inputs,
    only the first case's states are used: a graph goes on from its own."""
    batch = 2
    tokens, _, *state = example_inputs(batch, DECODER_STEPS)
    state = tuple(_like(part, decoder) for part in state)
    cases = []
    for step in range(DECODER_STEPS):
        targets = torch.full_like(tokens[:, :1], decoder.blank_idx) if step == 0 else tokens[:, step : step + 1]
        known = None if step == 0 else _like(targets, decoder)  # NeMo's own start: no token, a zero vector
        before = state
        with torch.inference_mode():
            wanted, state = decoder.predict(known, state=before, add_sos=False)
        inputs = (targets, torch.ones(batch, dtype=torch.int64), *before)
        cases.append(_case(inputs, (wanted.transpose(1, 2), *state)))
    return cases


def joint_cases(joint, example_inputs) -> list[Case]:
    """NeMo's raw logits over several S and U."""
    cases = []
    for batch, frames, targets in JOINT_CASES:
        encoded, predicted = example_inputs(batch, frames, targets)
        with torch.inference_mode():
            hidden = joint.project_encoder(_like(encoded, joint))[:, :, None]
            hidden = hidden + joint.project_prednet(_like(predicted, joint))[:, None]
            cases.append(_case((encoded, predicted), (joint.joint_net(hidden),)))
    return cases


def check_encoder(folder: Path, cases: list[Case], open_graph: OpenGraph = MAPPED, float16: bool = False) -> Parity:
    """Compare the valid frames and the lengths."""
    graph, parity = open_graph(folder, ENCODER), Parity(float16)
    for case in cases:
        found, lengths = graph(*case.inputs)
        wanted, wanted_lengths = case.wanted
        if lengths.tolist() != wanted_lengths.tolist():
            raise ParityError(f"encoded_lengths are {lengths.tolist()}, NeMo's {wanted_lengths.tolist()}")
        for row, valid in enumerate(lengths):
            parity.add(ENCODER.file, found[row, :, :valid], wanted[row, :, :valid])
    return parity


def check_decoder(folder: Path, cases: list[Case], open_graph: OpenGraph = MAPPED, float16: bool = False) -> Parity:
    """Compare outputs and states along the chain."""
    graph, parity = open_graph(folder, DECODER), Parity(float16)
    state = cases[0].inputs[2:]
    for case in cases:
        found, _, *state = graph(*case.inputs[:2], *state)
        for one, other in zip((found, *state), case.wanted, strict=True):
            parity.add(DECODER.file, one, other)
    return parity


def check_joint(folder: Path, cases: list[Case], open_graph: OpenGraph = MAPPED, float16: bool = False) -> Parity:
    """Compare raw logits."""
    graph, parity = open_graph(folder, JOINT), Parity(float16)
    for case in cases:
        parity.add(JOINT.file, graph(*case.inputs)[0], *case.wanted)
    return parity


def _case(inputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Case:
    return Case(*(tuple(tensor.cpu().numpy() for tensor in tensors) for tensors in (inputs, wanted)))


def _like(tensor: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    return tensor.to(next(module.parameters()).device)
