"""Does the ONNX graph compute what NeMo's module computes? Measured on the valid frames only, against a tolerance.

The reference is NeMo's own module, not the wrapper that was exported, so a mistake in the wrapper shows as well.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.console import CheckError
from common.graphs import DECODER, ENCODER, JOINT, PARITY_TOLERANCE
from common.runtime import OrtGraph

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
    """The largest difference seen, absolute and relative to the largest value of the reference."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    cases: int = 0

    def add(self, name: str, found: np.ndarray, wanted: torch.Tensor) -> None:
        """Take in one comparison; a NaN on either side counts as infinitely wrong. Raises ParityError beyond the
        tolerance."""
        wanted = wanted.detach().cpu().numpy()
        if found.shape != wanted.shape:
            raise ParityError(f"wanted an output of shape {wanted.shape}, the graph gave {found.shape}")
        error = float(np.max(np.abs(found - wanted), initial=0.0))
        error = error if np.isfinite(error) else float("inf")
        self.max_abs = max(self.max_abs, error)
        self.max_rel = max(self.max_rel, error / max(float(np.max(np.abs(wanted), initial=0.0)), 1e-30))
        self.cases += 1
        if self.max_abs > PARITY_TOLERANCE:
            raise ParityError(
                f"{name} is max|Δ| {self.max_abs:.1e}, relative {self.max_rel:.1e} from NeMo; tolerance "
                f"{PARITY_TOLERANCE:.0e}: the export is wrong"
            )

    def __str__(self) -> str:
        return f"max|Δ| {self.max_abs:.0e} ≤ {PARITY_TOLERANCE:.0e}  relative {self.max_rel:.0e}  {self.cases} cases"


def check_encoder(folder: Path, encoder, example_inputs) -> Parity:
    """Compare valid frames and lengths with NeMo's encoder over `ENCODER_CASES`; small models also past 400 s."""
    graph, parity = OrtGraph(folder, ENCODER, mapped=True), Parity()
    cases = list(ENCODER_CASES)
    if sum(parameter.numel() for parameter in encoder.parameters()) <= LONG_CASE_MAX_PARAMETERS:
        cases.append((1, LONG_CASE_FRAMES * encoder.subsampling_factor))
    for batch, frames in cases:
        features, lengths = example_inputs(batch, frames)
        found, found_lengths = graph(features.numpy(), lengths.numpy())
        with torch.inference_mode():
            wanted, wanted_lengths = encoder(audio_signal=_like(features, encoder), length=_like(lengths, encoder))
        if found_lengths.tolist() != wanted_lengths.tolist():
            raise ParityError(f"encoded_lengths are {found_lengths.tolist()}, NeMo's {wanted_lengths.tolist()}")
        for row, valid in enumerate(found_lengths):
            parity.add(ENCODER.file, found[row, :, :valid], wanted[row, :, :valid])
    return parity


def check_decoder(folder: Path, decoder, example_inputs) -> Parity:
    """Compare outputs and states with NeMo's prediction network over a chain of tokens that starts with blank."""
    graph, parity = OrtGraph(folder, DECODER, mapped=True), Parity()
    batch = 2
    tokens, lengths, h, c = example_inputs(batch, DECODER_STEPS)
    found_state = (h.numpy(), c.numpy())
    wanted_state = tuple(_like(state, decoder) for state in (h, c))
    for step in range(DECODER_STEPS):
        targets = torch.full_like(tokens[:, :1], decoder.blank_idx) if step == 0 else tokens[:, step : step + 1]
        found, _, *found_state = graph(targets.numpy(), np.ones_like(lengths.numpy()), *found_state)
        known = None if step == 0 else _like(targets, decoder)  # NeMo's own start: no token, a zero vector
        with torch.inference_mode():
            wanted, wanted_state = decoder.predict(known, state=wanted_state, add_sos=False)
        parity.add(DECODER.file, found, wanted.transpose(1, 2))
        for found_part, wanted_part in zip(found_state, wanted_state, strict=True):
            parity.add(DECODER.file, found_part, wanted_part)
    return parity


def check_joint(folder: Path, joint, example_inputs) -> Parity:
    """Compare raw logits with NeMo's joint over several S and U."""
    graph, parity = OrtGraph(folder, JOINT, mapped=True), Parity()
    for batch, frames, targets in JOINT_CASES:
        encoded, predicted = example_inputs(batch, frames, targets)
        found = graph(encoded.numpy(), predicted.numpy())[0]
        with torch.inference_mode():
            hidden = joint.project_encoder(_like(encoded, joint))[:, :, None]
            hidden = hidden + joint.project_prednet(_like(predicted, joint))[:, None]
            wanted = joint.joint_net(hidden)
        parity.add(JOINT.file, found, wanted)
    return parity


def _like(tensor: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    return tensor.to(next(module.parameters()).device)
