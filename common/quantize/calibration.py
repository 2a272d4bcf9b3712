"""Calibration: speech is run through the float32 encoder, and every product with a weight matrix is observed.

The graph is cut before each product with a constant matrix. Each segment passes its values to the next, and all of the
speech goes through the segments once. The inputs of each product are therefore known, so a method can round the weight
such that later rows make up for the errors of earlier ones on inputs like these (rounding.py). Input channels that come
from a normalization are scaled so that they differ less (rewrite.py). A method can use this in two ways:

- It fits every weight by itself. From its product on, part of the speech goes to the end of the graph a second time,
  with the rounded weight. How far the output then moves is called the damage of the weight; a size budget is spent on
  the weights where more bits remove most of it.
- It fits every weight after those before it. The speech goes through the graph twice, side by side, with the exact
  weights and with the rounded ones, and each weight is fitted to make up for the difference so far.

Weights stay in the data file, and a pass holds the values at one cut, so memory is that of the speech and the codes.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common as passes

from common.cli import progress_bar
from common.contract import ENCODER
from common.onnx_io import data_bytes, input_of, load, name_of, shape_of, tensor_of
from common.quantize.methods import Format, Plan, QuantMethod, Sensitivity
from common.quantize.rewrite import constant_factor, quantizable, row_factors, row_powers
from common.quantize.rounding import power_of
from common.run.audio import Clip
from common.run.genai import GenAI
from common.run.ort import open_session

# Length of all pieces of speech that run together in one batch. Damage is measured on one batch only: on the tiny
# checkpoint this ranks the weights as all of the speech does (rank correlation 0.99), and at 0.6B it takes minutes to
# run one batch to the end of the graph from every weight.
BATCH_SECONDS = 20
# More speech changes the codes little; less covers too few sounds.
MAX_SECONDS, MIN_SECONDS = 300, 10
FIT_RUNS = 70  # at 0.6B, quantizing a weight to one width or two takes about as long as this many runs of a segment
# In a sequence: the share of the difference on a residual stream that a product which is added to the stream makes up
# for. In 4 bits a share of 0 gives 25.8 dB, 0.5 26.6 dB, 0.7 and 1 26.7 dB (201 s of speech, the tiny checkpoint).
RESIDUAL_SHARE = 0.5


@dataclass(frozen=True)
class CalibrationSpeech:
    """Features of the clips that calibration uses."""

    batches: list[np.ndarray]  # [B, M, T] each
    clips: int
    seconds: float


def read_speech(folder: Path, clips: list[Clip]) -> CalibrationSpeech:
    """Features of the clips, computed by GenAI's processor in `folder`; of at most MAX_SECONDS, chosen at random.

    Raises ValueError where the clips are too short, and as GenAI and read_audio do.
    """
    genai = GenAI(folder)
    features: list[np.ndarray] = []
    frames = 0
    frame_rate = genai.config.sample_rate / genai.config.hop_length
    for i in np.random.default_rng(0).permutation(len(clips)):
        room = int(MAX_SECONDS * frame_rate) - frames
        if room <= 0:
            break
        features.append(genai.features(genai.config.read_clip(clips[i]))[:, :room])
        frames += features[-1].shape[1]
    seconds = frames / frame_rate
    if seconds < MIN_SECONDS:
        raise ValueError(f"calibration needs at least {MIN_SECONDS} s of speech, not {seconds:.1f} s; add clips")
    return CalibrationSpeech(speech_batches(features, frame_rate), len(features), seconds)


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


@dataclass(frozen=True)
class Product:
    """A product with a weight [K, N], and what is known of it on speech."""

    name: str  # of the weight
    weights: Mapping[str, np.ndarray]  # all exact weights of the encoder
    factors: np.ndarray  # [K, 1], of its rows; ones where its input channels are not scaled
    moments: np.ndarray  # [K, K], second moments Σ xᵀx of its inputs divided by the factors
    missing: np.ndarray | None  # [K, N], xᵀ times what the product lacks because of earlier weights; None for nothing
    x: np.ndarray  # [R, K], its inputs on part of the speech, with exact weights
    output: np.ndarray  # of the encoder on that part, with exact weights
    rest: Callable[[Mapping[str, np.ndarray]], np.ndarray]  # weights → the same output, computed from this product on

    @property
    def weight(self) -> np.ndarray:
        return self.weights[self.name]

    def damages(self, became: Mapping[int, np.ndarray]) -> dict[int, float]:
        """Bits → Σ (y - ŷ)² / Σ y² of the encoder's output y, from bits → what the weight becomes, [K, N].

        Only that of the fewest bits is measured. For other bits it is scaled by the ratio of the errors in the product:
        small errors go through the rest of the graph alike.
        """
        low = min(became)
        noise = {bits: power_of(self.x @ (self.weight - weight)) for bits, weight in became.items()}
        damage = power_of(self.rest({**self.weights, self.name: became[low]}) - self.output) / power_of(self.output)
        return {bits: damage * left / max(noise[low], 1e-30) for bits, left in noise.items()}


def visit_products(
    encoder: Path,
    batches: Sequence[np.ndarray],
    visit: Callable[[Product], np.ndarray | None],
    *,
    scaled: Collection[str],
    measures: bool,
) -> dict[str, np.ndarray]:
    """Call `visit` with each product of a quantizable weight of the float32 graph at `encoder`, in graph order.

    batches: features [B, M, T]. If `visit` returns a weight [K, N], the speech goes on with it as well as with the
    exact weights, side by side: the moments of later products are of the inputs after it, and `missing` is what they
    have to make up for. Returns the row factors [K, 1] of the weights whose input channels are scaled, by name: those
    of `scaled` that follow a normalization.

    measures: whether `visit` calls `damages`, and returns None, rather than a weight. A progress bar and an estimate of
    the time assume so.
    """
    segments, weights, rows = _cut(encoder, scaled)
    exact = rounded = [_inputs(batch) for batch in batches]
    part = len(batches) // 2  # clips of middling length
    start = time.perf_counter()
    output = _run(segments, exact[part], weights)
    run_seconds = (time.perf_counter() - start) / len(segments)
    runs = [
        (1 if measures else 2) * len(batches) + bool(segment.weight) * (FIT_RUNS + measures * (len(segments) - i))
        for i, segment in enumerate(segments)
    ]
    task = "calibrating" if measures else "fitting"
    factors: dict[str, np.ndarray] = {}
    with progress_bar(total=sum(runs), task=task, unit="run") as bar:
        bar.write(f"{task} {len(weights)} weights: about {sum(runs) * run_seconds / 60:.1f} min")
        for i, segment in enumerate(segments):
            became = None
            if name := segment.weight:
                x = _all_rows(rounded, segment.x)
                moments = np.asarray(x.T @ x)
                if name in rows:
                    factors[name] = row_factors(np.diag(moments), rows[name])
                divisors = factors.get(name, np.ones((len(moments), 1), np.float32))
                moments /= divisors * divisors.T  # in place, since it takes 67 MB for 4096 inputs
                became = visit(
                    Product(
                        name=name,
                        weights=weights,
                        factors=divisors,
                        moments=moments,
                        missing=None if rounded is exact else _missing(segment, weights[name], x, exact, rounded),
                        x=_rows(exact[part][segment.x]),
                        output=output,
                        rest=partial(_run, segments[i:], exact[part]),
                    )
                )
            changed = weights if became is None else {**weights, segment.weight: became}
            alike = rounded is exact and became is None
            exact = [segment(values, weights) for values in exact]
            rounded = exact if alike else [segment(values, changed) for values in rounded]
            bar.update(runs[i])
    return factors


def _missing(
    segment: "_Segment",
    weight: np.ndarray,
    x: np.ndarray,
    exact: list[dict[str, np.ndarray]],
    rounded: list[dict[str, np.ndarray]],
) -> np.ndarray | None:
    """xᵀ [K, R] times what is missing [R, N] in the product of the rounded encoder's inputs x and the weight, compared
    to the product in the exact encoder. Where the product is added to a residual stream, RESIDUAL_SHARE of the
    difference between the two streams is missing as well."""
    change = _all_rows(exact, segment.x) - x
    if not change.any():  # so for the first product, and for products with positions
        return None
    if segment.residual:
        name, factor = segment.residual
        stream = _all_rows(exact, name) - _all_rows(rounded, name)
        return np.asarray(x.T @ (change @ weight + np.float32(RESIDUAL_SHARE / factor) * stream))
    return np.asarray(np.linalg.multi_dot([x.T, change, weight]))  # in the order that takes fewer operations


@dataclass(frozen=True)
class _Segment:
    """Part of the graph. It begins with the first product with `weight`; the first segment has no weight."""

    weight: str
    x: str  # the other factor
    residual: tuple[str, float] | None  # the value to which a multiple of the product is added directly; the multiple
    takes: list[str]
    gives: list[str]
    later: set[str]  # values that are still used after it
    session: ort.InferenceSession

    def __call__(self, values: dict[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values at the end of the segment, from the values at its beginning."""
        feeds = {name: weights[name] if name in weights else values[name] for name in self.takes}
        made = dict(zip(self.gives, self.session.run(self.gives, feeds), strict=True))
        return {name: value for name, value in {**values, **made}.items() if name in self.later}


def _cut(path: Path, scaled: Collection[str]) -> tuple[list[_Segment], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The segments of the graph, its quantizable weights (mapped), and the `row_powers` of those of `scaled` that have
    any."""
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
        before = set(known)
        used = dict.fromkeys(value for node in nodes[begin:end] for value in node.inputs if value is not None)
        made = dict.fromkeys(value for node in nodes[begin:end] for value in node.outputs)
        takes = [name_of(value) for value in used if value in known or value.name in products]
        gives = [name_of(value) for value in made if last_use.get(value, 0) >= end]
        known |= made
        later = {name_of(value) for value in known if last_use.get(value, 0) >= end}
        weight = firsts.get(nodes[begin], "")
        x = name_of(input_of(nodes[begin], 0)) if weight else ""
        residual = _residual(nodes[begin], before) if weight else None
        segments.append(_Segment(weight, x, residual, takes, gives, later, _session(model, takes, gives)))
    rows = row_powers(model, scaled)  # before the weights are mapped, since it unmaps what it has read
    weights = {name: tensor_of(graph.initializers[name]).numpy() for name in products}
    return segments, weights, rows


def _residual(product: ir.Node, known: Collection[ir.Value]) -> tuple[str, float] | None:
    """The known value to which the product is added, perhaps times a number and with a bias, and that number."""
    y, factor = product.outputs[0], 1.0
    while len(y.uses()) == 1:
        node = next(iter(y.uses())).node
        if multiplication := constant_factor(y):
            factor *= float(multiplication[1])
        else:
            other = next((value for value in node.inputs if value is not None and value is not y), None)
            if node.op_type != "Add" or other is None:
                return None
            if other in known:
                return name_of(other), factor
            if ir.convenience.get_const_tensor(other) is None:
                return None
        y = node.outputs[0]
    return None


def _session(model: ir.Model, takes: list[str], gives: list[str]) -> ort.InferenceSession:
    graph = ir.convenience.extract(model.graph, takes, gives)
    for name in set(takes) & set(graph.initializers):
        del graph.initializers[name]  # a weight, which is fed as an input
    options = ort.SessionOptions()
    # There are hundreds of sessions, of which one runs at a time: the others must not spin, and must not keep memory.
    options.enable_cpu_mem_arena = False
    proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
    no_spinning = {"session.intra_op.allow_spinning": "0"}
    return open_session(proto.SerializeToString(), entries=no_spinning, options=options)


def _inputs(batch: np.ndarray) -> dict[str, np.ndarray]:
    lengths = np.full(len(batch), batch.shape[2], np.int64)
    return dict(zip(ENCODER.input_names, (batch, lengths), strict=True))


def _run(segments: list[_Segment], values: dict[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The encoder's output, from the values at the beginning of the first segment."""
    for segment in segments:
        values = segment(values, weights)
    return values[ENCODER.output_names[0]]


def _rows(x: np.ndarray) -> np.ndarray:
    """[..., K] → [R, K]"""
    return x.reshape(-1, x.shape[-1])


def _all_rows(batches: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """The rows [R, K] of a value in all batches. One product with all rows takes half the time of one product for each
    batch, since their results of up to 134 MB would have to be added."""
    return np.concatenate([_rows(values[name]) for values in batches])


@dataclass(frozen=True)
class SizeModel:
    """Predicts the bytes of an encoder's files for any plan, without carrying it out."""

    model: ir.Model
    graph_bytes: int  # of the exported graph file, without its data
    method: QuantMethod  # which says what a weight takes in each format

    def total(self, plan: Plan) -> int:
        """Bytes of graph and data once `plan` has been carried out; the files may be up to a per cent smaller."""
        initializers = self.model.graph.initializers
        others = (tensor_of(value).nbytes for name, value in initializers.items() if name not in plan)
        packed = (size for name, form in plan.items() for size in self.bytes_of(name, form))
        return self.graph_bytes + self.method.node_bytes * len(plan) + data_bytes((*others, *packed))

    def bytes_of(self, name: str, form: Format) -> tuple[int, ...]:
        """Bytes of each tensor of one weight."""
        return self.method.stored_bytes(shape_of(self.model.graph.initializers[name]), form)


def smallest_plan(sizes: SizeModel, plan: Plan, low: Format, budget: float) -> Plan:
    """The weights of `plan` in the format `low`, but for those that have fewer bits already. Raises ValueError if that
    takes more than `budget` bytes."""
    plan = {name: form if form.bits < low.bits else low for name, form in plan.items()}
    smallest = sizes.total(plan)
    if not smallest <= budget:
        or_block = "" if low.block is None else " or --block_size"
        raise ValueError(
            f"--size_budget_mb {budget / 1e6:g} is too small: {low.bits} bits for every weight take "
            f"{math.ceil(smallest / 1e4) / 100} MB; give a larger --size_budget_mb{or_block}"
        )
    return plan


def spend(sizes: SizeModel, damage: Sensitivity, plan: Plan, low: Format, high: Format, budget: float) -> Plan:
    """The `smallest_plan`, and `high` where that removes most damage per byte, as long as everything fits into `budget`
    bytes. damage: of the weights that may have either. Raises ValueError as `smallest_plan` does."""
    plan = dict(smallest_plan(sizes, plan, low, budget))
    extra = {name: sum(sizes.bytes_of(name, high)) - sum(sizes.bytes_of(name, low)) for name in damage}
    gain = {name: (damage[name][low.bits] - damage[name][high.bits]) / extra[name] for name in damage}
    for name in sorted(damage, key=gain.__getitem__, reverse=True):
        richer = {**plan, name: high}
        if sizes.total(richer) <= budget:
            plan = richer
    return plan
