"""Calibration: speech is run through the float32 encoder, and every weight matrix is fitted to what it multiplies.

The graph is cut before each product with a constant matrix. Each segment passes its values to the next, and all of the
speech goes through the segments once. The inputs of each product are therefore known, so a method can round the weight
such that later rows make up for the errors of earlier ones on inputs like these (rounding.py), in two ways:

- Every weight by itself, in two widths. From its product on, part of the speech goes to the end of the graph a second
  time, with the rounded weight. How far the output then moves is called the damage of the weight; a size budget is
  spent on the weights where more bits remove most of it.
- Every weight after those before it. The speech goes through the graph twice, side by side, with the exact weights and
  with the rounded ones, and each weight is fitted to make up for the difference so far.

Weights stay in the data file, and a pass holds the values at one cut, so it needs memory for the speech and the codes.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common as passes

from common.cli import progress
from common.contract import ENCODER
from common.onnx_io import data_bytes, load
from common.quantize import rewrite
from common.quantize.methods import FittingMethod, Format, OptimizeOptions, Plan, Sensitivity
from common.quantize.rounding import TERNARY_BITS, InputMoments, Packed, power_of
from common.run.audio import Clip
from common.run.genai import GenAI
from common.run.ort import open_session

# Length of all pieces of speech that run together in one batch. Damage is measured on one batch only, which ranks the
# weights as all of the speech does (rank correlation 0.99 on the tiny checkpoint).
BATCH_SECONDS = 20
# More speech changes the codes little; less covers too few sounds.
MAX_SECONDS, MIN_SECONDS = 300, 10
# In a sequence: the share of the difference on a residual stream that a product which is added to the stream makes up
# for. In 4 bits a share of 0 gives 25.8 dB, 0.5 26.6 dB, 0.7 and 1 26.7 dB (201 s of speech, the tiny checkpoint).
RESIDUAL_SHARE = 0.5
# There are hundreds of sessions, of which one runs at a time: the others must not spin, and must not keep memory.
NO_SPINNING = {"session.intra_op.allow_spinning": "0"}
Values = Mapping[str, np.ndarray]  # values of a graph, by name


def read_speech(folder: Path, clips: list[Clip]) -> tuple[list[np.ndarray], float]:
    """Features of the clips in batches [B, M, T], computed by GenAI's processor in `folder`, and the seconds of speech:
    at most MAX_SECONDS, of clips chosen at random.

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
    return speech_batches(features, frame_rate), seconds


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


def calibrate(
    method: FittingMethod, path: Path, batches: Sequence[np.ndarray], options: OptimizeOptions
) -> rewrite.Calibrated:
    """Fit the weights of the float32 encoder at `path` to speech, features [B, M, T] of each batch, as the method does.
    A size budget, or as many bytes as the plan without calibration needs, goes where it helps most.

    Raises ValueError for a budget that is exceeded even with the fewest bits for every weight.
    """
    model = load(path)
    plan = rewrite.plan_encoder(model, method, options)
    low, high = method.widths(options)
    encoder = CutEncoder(path, rewrite.scalable(plan))
    sensitivity: Sensitivity = {}
    if not method.fits_in_sequence or options.size_budget_mb is not None:
        sizes = SizeModel(model, path.stat().st_size, method)
        budget = sizes.total(plan) if options.size_budget_mb is None else options.size_budget_mb * 1e6
        spend(sizes, {}, plan, low, high, budget)  # raises ValueError before the long work begins
        widths, sensitivity, factors = fit_widths(encoder, batches, method, (low, high))
        plan = spend(sizes, sensitivity, plan, low, high, budget)
    if not method.fits_in_sequence:
        weights = {name: widths[name][form.bits] for name, form in plan.items()}
        return rewrite.Calibrated(plan, weights, factors, sensitivity)
    weights = {}

    def visit(product: Product) -> np.ndarray:
        form = plan[product.name]
        if form.bits != TERNARY_BITS:
            weights[product.name], became = product.fit(method, form)[0]
            return became
        packed = weights[product.name] = method.pack(product.weight, form)  # as without calibration
        return np.asarray(packed.codes * packed.scales)

    factors = visit_products(encoder, batches, visit, "fitting")
    return rewrite.Calibrated(plan, weights, factors, sensitivity)


def fit_widths(
    encoder: "CutEncoder", batches: Sequence[np.ndarray], method: FittingMethod, forms: tuple[Format, Format]
) -> tuple[dict[str, dict[int, Packed]], Sensitivity, dict[str, np.ndarray]]:
    """Fit each scalable weight by itself, in two formats. Returns them by name and bits, unless the method fits in
    sequence; the damage of each, Σ (y - ŷ)² / Σ y² of the encoder's output y; and the row factors.

    Only the damage of the first format is measured. For the other it is scaled by the ratio of the errors in the
    product: small errors go through the rest of the graph alike.
    """
    widths: dict[str, dict[int, Packed]] = {}
    sensitivity: dict[str, dict[int, float]] = {}
    output = encoder.output(0, _inputs(batches[len(batches) // 2]), {})

    def visit(product: Product) -> None:
        if product.name not in encoder.scalable:
            return
        fitted = dict(zip([form.bits for form in forms], product.fit(method, *forms), strict=True))
        noise = {bits: power_of(product.x @ (product.weight - became)) for bits, (_, became) in fitted.items()}
        low = forms[0].bits
        moved = encoder.output(product.place, product.values, {product.name: fitted[low][1]})
        damage = power_of(moved - output) / power_of(output)
        sensitivity[product.name] = {bits: damage * left / max(noise[low], 1e-30) for bits, left in noise.items()}
        if not method.fits_in_sequence:
            widths[product.name] = {bits: packed for bits, (packed, _) in fitted.items()}

    return widths, sensitivity, visit_products(encoder, batches, visit, "calibrating")


@dataclass(frozen=True)
class Product:
    """A product with a weight [K, N], and what is known of it on speech."""

    name: str  # of the weight
    place: int  # of the segment that begins with it
    weight: np.ndarray
    factors: np.ndarray  # [K, 1], of its rows; ones where its input channels are not scaled
    moments: np.ndarray  # [K, K], second moments Σ xᵀx of its inputs divided by the factors
    missing: np.ndarray | None  # [K, N], xᵀ times what the product lacks because of earlier weights; None for nothing
    values: Values  # where its segment begins, on part of the speech, with exact weights
    x: np.ndarray  # [R, K], its inputs among them

    def fit(self, method: FittingMethod, *forms: Format) -> list[tuple[Packed, np.ndarray]]:
        """The weight in each format, fitted to these inputs, and what it becomes by that."""
        inputs = InputMoments(self.moments, strongest_first=method.fits_in_sequence)
        with ThreadPoolExecutor(len(forms)) as pool:
            return list(pool.map(lambda form: method.fit(self.weight, form, inputs, self.factors, self.missing), forms))


def visit_products(
    encoder: "CutEncoder", batches: Sequence[np.ndarray], visit: Callable[[Product], np.ndarray | None], task: str
) -> dict[str, np.ndarray]:
    """Call `visit` with each product of a quantizable weight, in graph order. batches: features [B, M, T].

    If `visit` returns a weight [K, N], the speech goes on with it as well as with the exact weights, side by side: the
    moments of later products are of the inputs after it, and `missing` is what they have to make up for. Returns the
    row factors [K, 1] of the weights whose input channels are scaled, by name.
    """
    exact: list[Values] = [_inputs(batch) for batch in batches]
    rounded = exact
    factors: dict[str, np.ndarray] = {}
    segments = progress(encoder.segments, total=len(encoder.segments), task=task, unit="segment")
    for place, segment in enumerate(segments):
        became = None
        if name := segment.weight:
            x = _all_rows(rounded, segment.x)
            moments = np.asarray(x.T @ x)
            if name in encoder.rows:
                factors[name] = rewrite.row_factors(np.diag(moments), encoder.rows[name])
            divisors = factors.get(name, np.ones((len(moments), 1), np.float32))
            moments /= divisors * divisors.T  # in place, since it takes 67 MB for 4096 inputs
            weight, values = encoder.weights[name], exact[len(exact) // 2]  # clips of middling length
            missing, change = None, _all_rows(exact, segment.x) - x
            if change.any() and segment.residual:
                stream_name, factor = segment.residual
                stream = _all_rows(exact, stream_name) - _all_rows(rounded, stream_name)
                missing = np.asarray(x.T @ (change @ weight + np.float32(RESIDUAL_SHARE / factor) * stream))
            elif change.any():  # not for the first product, and for products with positions
                missing = np.asarray(np.linalg.multi_dot([x.T, change, weight]))  # in the order of fewer operations
            product = Product(name, place, weight, divisors, moments, missing, values, _rows(values[segment.x]))
            became = visit(product)
        changed = {} if became is None else {segment.weight: became}
        alike = rounded is exact and became is None
        exact = [segment(values, encoder.weights) for values in exact]
        rounded = exact if alike else [segment(values, {**encoder.weights, **changed}) for values in rounded]
    return factors


@dataclass(frozen=True)
class Segment:
    """Part of the graph. It begins with the first product with `weight`; the first segment has no weight."""

    weight: str
    x: str  # the other factor
    residual: tuple[str, float] | None  # the value to which a multiple of the product is added directly; the multiple
    takes: list[str]
    gives: list[str]
    later: set[str]  # values that are still used after it
    session: ort.InferenceSession

    def __call__(self, values: Values, weights: Values) -> Values:
        """The values at the end of the segment, from the values at its beginning."""
        feeds = {name: weights[name] if name in weights else values[name] for name in self.takes}
        made = dict(zip(self.gives, self.session.run(self.gives, feeds), strict=True))
        return {name: value for name, value in {**values, **made}.items() if name in self.later}


class CutEncoder:
    """A float32 encoder, cut before the first product with each of its quantizable weights."""

    def __init__(self, path: Path, scalable: Collection[str]) -> None:
        """Read the graph at `path`. scalable: weights whose input channels may be scaled; the others are ternary."""
        model = load(path)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.ShapeInferencePass()(model)  # a segment's inputs need types
        graph, weights = model.graph, rewrite.quantizable(model)
        for name, value in graph.initializers.items():
            if name not in weights and isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)
        nodes = list(graph)
        firsts = {weight.products[0]: name for name, weight in weights.items()}
        cuts = [0, *(i for i, node in enumerate(nodes) if node in firsts), len(nodes)]
        last_use = {value: i for i, node in enumerate(nodes) for value in node.inputs if value is not None}
        last_use |= dict.fromkeys(graph.outputs, len(nodes))
        self.segments, known = [], dict.fromkeys(graph.inputs)
        for begin, end in pairwise(cuts):
            weight = firsts.get(nodes[begin], "")
            x = _names(nodes[begin].inputs[:1])[0] if weight else ""
            residual = _residual(nodes[begin], known) if weight else None
            used = dict.fromkeys(value for node in nodes[begin:end] for value in node.inputs if value is not None)
            made = dict.fromkeys(value for node in nodes[begin:end] for value in node.outputs)
            takes = _names(value for value in used if value in known or value.name in weights)
            known |= made
            later = _names(value for value in known if last_use.get(value, 0) >= end)
            gives = _names(value for value in made if last_use.get(value, 0) >= end)
            part = ir.convenience.extract(graph, takes, gives)
            for name in set(takes) & set(part.initializers):
                del part.initializers[name]  # a weight, which is fed as an input
            proto = ir.to_proto(ir.Model(part, ir_version=model.ir_version)).SerializeToString()
            options = ort.SessionOptions()
            options.enable_cpu_mem_arena = False
            session = open_session(proto, entries=NO_SPINNING, options=options)
            self.segments.append(Segment(weight, x, residual, takes, gives, set(later), session))
        self.scalable = scalable
        self.rows = rewrite.row_powers(model, scalable)  # before the weights are mapped: it unmaps what it has read
        self.weights: Values = {name: weight.tensor.numpy() for name, weight in weights.items()}

    def output(self, place: int, values: Values, changed: Values) -> np.ndarray:
        """The encoder's output, from the values where a segment begins, with some weights changed."""
        for segment in self.segments[place:]:
            values = segment(values, {**self.weights, **changed})
        return values[ENCODER.output_names[0]]


def _residual(product: ir.Node, known: Collection[ir.Value]) -> tuple[str, float] | None:
    """The known value to which the product is added, perhaps times a number and with a bias, and that number."""
    y, factor = product.outputs[0], 1.0
    while len(y.uses()) == 1:
        node = next(iter(y.uses())).node
        if multiplication := rewrite.constant_factor(y):
            factor *= float(multiplication[1])
        else:
            other = next((value for value in node.inputs if value is not None and value is not y), None)
            if node.op_type != "Add" or other is None:
                return None
            if other in known:
                return _names([other])[0], factor
            if ir.convenience.get_const_tensor(other) is None:
                return None
        y = node.outputs[0]
    return None


def _names(values: Iterable[ir.Value | None]) -> list[str]:
    """The names of values of a graph that was read from a file, where each has one."""
    return [value.name for value in values if value is not None and value.name is not None]


def _inputs(batch: np.ndarray) -> dict[str, np.ndarray]:
    lengths = np.full(len(batch), batch.shape[2], np.int64)
    return dict(zip(ENCODER.input_names, (batch, lengths), strict=True))


def _rows(x: np.ndarray) -> np.ndarray:
    """[..., K] → [R, K]"""
    return x.reshape(-1, x.shape[-1])


def _all_rows(batches: Sequence[Values], name: str) -> np.ndarray:
    """The rows [R, K] of a value in all batches. One product with all rows takes half the time of one product for each
    batch, since their results of up to 134 MB would have to be added."""
    return np.concatenate([_rows(values[name]) for values in batches])


class SizeModel:
    """Predicts the bytes of an encoder's files for any plan, without carrying it out."""

    def __init__(self, model: ir.Model, graph_bytes: int, method: FittingMethod) -> None:
        """graph_bytes: of the exported graph file, without its data. method: knows what a weight takes in each form."""
        self.graph_bytes, self.method = graph_bytes, method
        self.weights = rewrite.quantizable(model)
        tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
        self.exported = {name: tensor.nbytes for name, tensor in tensors.items() if tensor is not None}

    def total(self, plan: Plan) -> int:
        """Bytes of graph and data once `plan` has been carried out; the files may be up to a per cent smaller."""
        others = (size for name, size in self.exported.items() if name not in plan)
        packed = (size for name, form in plan.items() for size in self.bytes_of(name, form))
        return self.graph_bytes + self.method.node_bytes * len(plan) + data_bytes((*others, *packed))

    def bytes_of(self, name: str, form: Format) -> tuple[int, ...]:
        """Bytes of each tensor of one weight."""
        return self.method.stored_bytes(self.weights[name].shape, form)


def spend(sizes: SizeModel, damage: Sensitivity, plan: Plan, low: Format, high: Format, budget: float) -> Plan:
    """The plan with the format `low`, but for weights that have fewer bits already, and `high` where that removes most
    damage per byte, as long as everything fits into `budget` bytes. damage: of the weights that may have either.

    Raises ValueError if that takes more than `budget` bytes with `low` everywhere.
    """
    plan = {name: form if form.bits < low.bits else low for name, form in plan.items()}
    smallest = sizes.total(plan)
    if not smallest <= budget:
        or_block = " or --block_size" if low.block else ""
        raise ValueError(
            f"--size_budget_mb {budget / 1e6:g} is too small: {low.bits} bits for every weight take "
            f"{math.ceil(smallest / 1e4) / 100} MB; give a larger --size_budget_mb{or_block}"
        )
    extra = {name: sum(sizes.bytes_of(name, high)) - sum(sizes.bytes_of(name, low)) for name in damage}
    gain = {name: (damage[name][low.bits] - damage[name][high.bits]) / extra[name] for name in damage}
    for name in sorted(damage, key=gain.__getitem__, reverse=True):
        richer = {**plan, name: high}
        if sizes.total(richer) <= budget:
            plan = richer
    return plan
