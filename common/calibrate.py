"""Calibration: on some speech, what quantizing one weight does to the encoder's output, and codes fitted to its inputs.

The float32 graph is cut before each product with a constant matrix, into segments that hand their values on. All of the
speech walks along them once. At each product its inputs are at hand, so the weight is quantized such that later rows
make up for the errors of earlier ones on inputs like these (`error_feedback`), and loud channels of inputs that come
from a normalization are made quieter (common.smooth). From there part of the speech goes to the end of the graph a
second time, with the quantized weight: how far the output moves is the weight's damage.

Weights stay in the data file, and a walk holds the values of one cut: memory is that of the speech and of the codes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common as passes
from tqdm import tqdm

from common.clips import Clip
from common.graphs import ENCODER
from common.int8 import Columns, compensated_columns
from common.optimize import Sensitivity, load, quantizable
from common.quantize import BITS, Packed, error_feedback, k_quant, power_of, quantize_compensated, second_moments
from common.runtime import ERRORS_AND_WORSE, GenAI
from common.smooth import normalized_inputs, row_factors

# Pieces of speech that run at once, together. Damage is measured on one such batch: on the tiny checkpoint it ranks the
# weights as all of the speech does (rank correlation 0.99), and at 0.6B a run from every weight on takes minutes.
BATCH_SECONDS = 20
# More speech changes the codes little; less is no speech to speak of.
MAX_SECONDS, MIN_SECONDS = 300, 10
FIT_RUNS = 120  # quantizing a weight takes about as long as so many runs of a segment, at 0.6B, to one width or two

# How much of the differences in loudness between channels is taken from a product's inputs and given to its weight:
# half, as in SmoothQuant. On the tiny checkpoint's speech that is -0.4 to 0.1 dB where nearly all codes have 4 bits,
# 0.3 to 1.2 dB where many have 8 (a third: 0 to 1.0 dB), and 1.9 dB for int8, whose inputs have one scale a row.
SMOOTHING = 0.5


@dataclass(frozen=True)
class Candidate:
    """One weight at one width: its stored form, and the damage that it does alone, Σ (y - ŷ)² / Σ y² of the encoder's
    output y on speech."""

    packed: Packed
    damage: float


@dataclass(frozen=True)
class Calibration:
    """What was found for each weight, by name and in graph order."""

    weights: dict[str, dict[int, Candidate]]  # by bits
    factors: dict[str, np.ndarray]  # of the rows of those that are smoothed, [K, 1]; for `common.smooth.fold`

    @property
    def damages(self) -> Sensitivity:
        return {name: {bits: one.damage for bits, one in widths.items()} for name, widths in self.weights.items()}


@dataclass(frozen=True)
class Int8Calibration:
    """The same for common.int8, where there is nothing to choose."""

    weights: dict[str, Columns]
    factors: dict[str, np.ndarray]


@dataclass(frozen=True)
class Speech:
    """What is calibrated on."""

    batches: list[np.ndarray]
    clips: int
    seconds: float


def read_speech(folder: Path, clips: list[Clip]) -> Speech:
    """Features of the clips by the processor of GenAI in `folder`; if they are long, of some of them from all over.

    Raises ValueError where they are too short, and as GenAI and read_audio do.
    """
    genai, features, frames = GenAI(folder), [], 0
    frame_rate = genai.config.sample_rate / genai.config.hop_length
    for i in np.random.default_rng(0).permutation(len(clips)):
        wanted = int(MAX_SECONDS * frame_rate) - frames
        if wanted <= 0:
            break
        features.append(genai.features(genai.config.read_clip(clips[i]))[:, :wanted])
        frames += features[-1].shape[1]
    seconds = frames / frame_rate
    if seconds < MIN_SECONDS:
        raise ValueError(f"wanted {MIN_SECONDS} s of speech to calibrate on, found {seconds:.1f} s; add clips")
    return Speech(speech_batches(features, frame_rate), len(features), seconds)


def speech_batches(features: Iterable[np.ndarray], frame_rate: float) -> list[np.ndarray]:
    """Clips [M, T] of `frame_rate` mel frames a second → batches [B, M, T] of about equal size, short clips first.

    Clips are cut at BATCH_SECONDS, and to the shortest of their batch: there is no padding, so every row of every
    product is speech.
    """
    most = int(BATCH_SECONDS * frame_rate)
    pieces = sorted(
        (clip[:, begin : begin + most] for clip in features for begin in range(0, clip.shape[1], most)),
        key=lambda piece: piece.shape[1],
    )
    batches: list[list[np.ndarray]] = []
    for piece in pieces:
        if not batches or (len(batches[-1]) + 1) * piece.shape[1] > most:
            batches.append([])
        batches[-1].append(piece)
    return [np.stack([piece[:, : batch[0].shape[1]] for piece in batch]) for batch in batches]


def calibrate(path: Path, batches: list[np.ndarray], block: int, bar: tqdm) -> Calibration:
    """Both widths of each quantizable weight of the float32 encoder at `path`, on batches [B, M, T].

    The damage of 4 bits is measured; that of 8 is it times the ratio of the errors that the two leave in the product,
    small errors going through the rest of the graph alike. The bar counts runs of a segment.
    """
    found = Calibration({}, {})
    for product in _products(path, batches, bar, measured=True):
        how = {"block": block, "method": k_quant, "feedback": product.feedback, "factors": product.factors}
        with ThreadPoolExecutor(len(BITS)) as pool:
            fits = pool.map(partial(quantize_compensated, product.weight, **how), BITS)
            packed, errors = zip(*fits, strict=True)
        damage, noise = product.damage(errors[0]), [power_of(product.x @ error) for error in errors]
        if product.smoothed:
            found.factors[product.name] = product.factors
        found.weights[product.name] = {
            bits: Candidate(codes, damage * left / max(noise[0], 1e-30))
            for bits, codes, left in zip(BITS, packed, noise, strict=True)
        }
    return found


def calibrate_int8(path: Path, batches: list[np.ndarray], bits: int, bar: tqdm) -> Int8Calibration:
    """Columns of each quantizable weight of the float32 encoder at `path`, on batches [B, M, T]."""
    found = Int8Calibration({}, {})
    for product in _products(path, batches, bar, measured=False):
        if product.smoothed:
            found.factors[product.name] = product.factors
        found.weights[product.name] = compensated_columns(product.weight, bits, product.feedback, product.factors)
    return found


@dataclass(frozen=True)
class _Product:
    """A weight [K, N] that speech has come to."""

    name: str
    weight: np.ndarray
    smoothed: bool
    factors: np.ndarray  # [K, 1], of its rows; ones where it is not smoothed
    feedback: np.ndarray  # [K, K], for the weight times factors
    x: np.ndarray  # [R, K], what part of the speech gives it
    damage: Callable[[np.ndarray], float]  # of the errors [K, N] that are taken from the weight


def _products(path: Path, batches: list[np.ndarray], bar: tqdm, *, measured: bool) -> Iterator[_Product]:
    """Each weight in graph order. The bar and the estimate go by whether its damage will be `measured`."""
    segments, weights, normalized = _cut(path)
    speech = [_inputs(batch) for batch in batches]
    part = len(speech) // 2  # clips of middling length
    start = time.perf_counter()
    wanted = _run(segments, speech[part], weights)
    run_seconds = (time.perf_counter() - start) / len(segments)
    runs = [
        len(speech) + (FIT_RUNS + (len(segments) - i) * measured if segment.weight else 0)
        for i, segment in enumerate(segments)
    ]
    bar.reset(sum(runs))
    bar.write(f"calibrating {len(weights)} weights: about {sum(runs) * run_seconds / 60:.1f} min")
    feedback_of = ""
    for i, segment in enumerate(segments):
        if segment.weight:
            if segment.x != feedback_of:  # queries, keys and values have one input
                moments = second_moments(_rows(values[segment.x]) for values in speech)
                smoothed = segment.weight in normalized
                factors = row_factors(np.diag(moments), SMOOTHING if smoothed else 0.0)
                feedback = error_feedback(moments / (factors * factors.T))
                feedback_of = segment.x

            def damage(error: np.ndarray, later=segments[i:], values=speech[part], name=segment.weight) -> float:
                output = _run(later, values, {**weights, name: weights[name] - error})
                return power_of(output - wanted) / power_of(wanted)

            x = _rows(speech[part][segment.x])
            yield _Product(segment.weight, weights[segment.weight], smoothed, factors, feedback, x, damage)
        speech = [segment(values, weights) for values in speech]
        bar.update(runs[i])


@dataclass(frozen=True)
class _Segment:
    """Part of the graph, which begins with the first product by `weight` (the head of the graph has none)."""

    weight: str
    x: str  # the other factor
    takes: list[str]
    gives: list[str]
    later: set[str]  # what is still wanted after it
    session: ort.InferenceSession

    def __call__(self, values: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values at the end of the segment, of those at its beginning."""
        feeds = {name: weights[name] if name in weights else values[name] for name in self.takes}
        made = dict(zip(self.gives, self.session.run(self.gives, feeds), strict=True))
        return {name: value for name, value in {**values, **made}.items() if name in self.later}


def _cut(path: Path) -> tuple[list[_Segment], dict[str, np.ndarray], set[str]]:
    """The graph in segments, its quantizable weights, mapped, and those that a normalization feeds."""
    model = load(path)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.ShapeInferencePass()(model)  # a segment's inputs need types
    graph, products = model.graph, quantizable(model)
    for name, value in graph.initializers.items():
        if name not in products and isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)
    nodes = list(graph)
    firsts = {uses[0]: name for name, uses in products.items()}
    cuts = [0, *(i for i, node in enumerate(nodes) if node in firsts), len(nodes)]
    last_use = {value: i for i, node in enumerate(nodes) for value in node.inputs if value is not None}
    last_use |= dict.fromkeys(graph.outputs, len(nodes))
    segments, known = [], dict.fromkeys(graph.inputs)
    for begin, end in pairwise(cuts):
        used = dict.fromkeys(value for node in nodes[begin:end] for value in node.inputs if value is not None)
        made = dict.fromkeys(value for node in nodes[begin:end] for value in node.outputs)
        takes = [value for value in used if value in known or value.name in products]
        gives = [value for value in made if last_use.get(value, 0) >= end]
        known |= made
        later = {value.name for value in known if last_use.get(value, 0) >= end}
        weight = firsts.get(nodes[begin], "")
        x = nodes[begin].inputs[0].name if weight else ""
        names = [[value.name for value in values] for values in (takes, gives)]
        segments.append(_Segment(weight, x, *names, later, _session(model, *names)))
    weights = {name: graph.initializers[name].const_value.numpy() for name in products}
    return segments, weights, set(chain.from_iterable(normalized_inputs(model, products).values()))


def _session(model: ir.Model, takes: list[str], gives: list[str]) -> ort.InferenceSession:
    graph = ir.convenience.extract(model.graph, takes, gives)
    for name in set(takes) & set(graph.initializers):
        del graph.initializers[name]  # a weight, which is fed
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_AND_WORSE
    # There are hundreds, of which one is at work: the others neither wait for it busily nor keep memory.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _inputs(batch: np.ndarray) -> dict[str, np.ndarray]:
    lengths = np.full(len(batch), batch.shape[2], np.int64)
    return dict(zip(ENCODER.input_names, (batch, lengths), strict=True))


def _run(segments: list[_Segment], values: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> np.ndarray:
    """The encoder's output for the values at the beginning of the first of the segments."""
    for segment in segments:
        values = segment(values, weights)
    return values[ENCODER.output_names[0]]


def _rows(x: np.ndarray) -> np.ndarray:
    """[..., K] → [R, K]"""
    return x.reshape(-1, x.shape[-1])
