"""Products of 8-bit integers out of ONNX Runtime's stock operators: a scale for each token, a scale for each column.

    x [B, S, K] → codes uint8, one scale a row → MatMulIntegerToFloat by int8 W [K, N], one scale a column → · row scale

A row is divided by its own scale, so its error depends neither on the other rows nor on the length of the clip.
Operators with one scale per tensor (DynamicQuantizeMatMul) lose 1.2 dB on Gaussian rows of equal size, and more on
every clip with a loud frame. A row of zeros has the scale TINY: its codes are the zero point, its products 0, not NaN.

Rows are quantized once, however many products they go into. A constant factor that follows a product is merged into the
column scales. In total the row scales cost 12 % of the products' time (1080 GFLOP/s, 1230 without them, 310 in float32;
ONNX Runtime 1.32, 2 cores with AVX-512 VNNI). Dividing by them before DynamicQuantizeMatMul costs the same.

W may be stored in 4 bits, as an INT4 tensor that a Cast turns into int8. ONNX Runtime computes a Cast of a constant
once, when a session is created, so the same products run (1.23 or newer; older versions have no such Cast).

The int8 codes of a W that is ternary in groups (ternary.py) are −c, 0 and c in each group of a column, so they are
stored as an INT2 tensor and one int8 multiplier c for each group, without loss:

    INT2 [K/g, g, N] → Cast → · c [K/g, 1, N] → Reshape → int8 W [K, N]

This too is computed once, when a session is created (ONNX Runtime 1.24 or newer; 1.23 does not load such a graph).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import defs
from onnx_ir.tape import Tape

from common.contract import MICROSOFT, EncoderWeight, Role, encoder_weight
from common.onnx_io import add_initializer, input_of, load, shared_initializer
from common.quantize.calibration import Product, SizeModel, smallest_plan, spend, visit_products
from common.quantize.columns import HIGH_BITS, LOW_BITS, column_bytes, fit_columns, quantize_columns, ternary_columns
from common.quantize.methods import (
    TERNARY_BITS,
    Calibrated,
    Format,
    OptimizeOptions,
    Plan,
    QuantMethod,
    Replace,
    Sensitivity,
)
from common.quantize.rewrite import constant_factor, plan_encoder, scalable
from common.quantize.rounding import TINY, InputMoments, Packed, ceil_div
from common.quantize.ternary import signs_and_sizes

CODES = 255  # largest uint8
# The code that stands for 0, chosen by what is known about the range of a row: codes below it stand for negative
# numbers, and the fewer codes are wasted, the finer is the scale. SiLU is never below -0.28: with code 32, a row whose
# maximum is 3 has 4.9 dB less error than with 128, but a row whose maximum is below 1 has more. At the encoder's
# output, on speech, the codes 32 to 64 are within 0.3 dB of each other, and 2.2 dB or more better than 128.
MIDDLE_ZERO, SILU_ZERO, RELU_ZERO = 128, 32, 0
# Rows of sines and cosines need no scales of their own, since all reach from -1 to 1: one scale for all rows is as
# exact for the sums of their products, and saves a pass over the result.
EVEN_ROWS_ROLES = (Role.ATTENTION_POSITION_SINE, Role.ATTENTION_POSITION_COSINE)
# For these products, what rounding takes from the input is multiplied too, with a scale 255 times finer (a second
# term). 65 % of the error of the output comes from this eighth of the products: speech through the tiny checkpoint
# gives 36.2 dB without the second term, 39.2 dB with it, and 43.4 dB if all products have it, which takes twice the
# time. Columns that were fitted to speech need no second term: they are as exact without it. Nor do columns in 4 bits,
# whose own error is far larger than that of their inputs: 19.60 dB with it, 19.57 dB without.
TWO_TERM_ROLES = (Role.CONVOLUTION_EXPAND, Role.CONVOLUTION_PROJECT)
# Operators whose newer versions only accept more types, or have new attributes whose defaults keep the old meaning
# (onnx's changelog, opsets 18 to 25).
SAME_MEANING = (
    "Cast", "Constant", "ConstantOfShape", "Conv", "Cos", "DequantizeLinear", "Equal", "Flatten", "Identity",
    "InstanceNormalization", "Pad", "QuantizeLinear", "Reshape", "Shape", "Sin", "Size", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
AXES_BECAME_INPUT = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd")  # in opset 18
INT4_OPSET, INT4_IR_VERSION = 21, 10  # the first with 4-bit integers
INT2_OPSET, INT2_IR_VERSION = 25, 13  # the first with 2-bit integers


@dataclass(frozen=True, kw_only=True)
class IntegerMethod(QuantMethod):
    """4 or 8 bits for every weight, or what a size budget gives each. Weights that are ternary in groups have 2 bits in
    the file."""

    weight_bits: tuple[int, ...] = (TERNARY_BITS, 4, 8)
    has_range: bool = True
    calibrates: bool = True
    fused_on_cpu: bool = False  # SkipLayerNormalization takes a larger share of the time of this faster encoder
    node_bytes: int = 1600  # including the nodes that quantize its input; 1503 were measured

    def plan(self, weights: Mapping[str, EncoderWeight], options: OptimizeOptions) -> Plan:
        return dict.fromkeys(weights, Format(LOW_BITS) if options.narrow else _wide(options))

    def ternary_format(self, group: int, options: OptimizeOptions) -> Format | None:
        return Format(TERNARY_BITS, group, options.full_range)

    def pack(self, weight: np.ndarray, form: Format) -> Packed:
        if form.bits == TERNARY_BITS:
            return ternary_columns(weight, _group_of(form), full_range=form.full_range)
        return quantize_columns(weight, form.bits, full_range=form.full_range)

    def replace(self, model: ir.Model, options: OptimizeOptions) -> Replace:
        rewriter = _Rewriter(model)

        def put(nodes: Sequence[ir.Node], name: str, columns: Packed, form: Format) -> None:
            for node in nodes:
                rewriter.replace(node, name, columns, form)

        return put

    def stored_bytes(self, shape: tuple[int, ...], form: Format) -> tuple[int, ...]:
        if form.bits == TERNARY_BITS:
            (K, N), group = shape, _group_of(form)
            return ceil_div(K * N * TERNARY_BITS, 8), K // group * N, 4 * N
        return column_bytes(shape, form.bits)

    def calibrate(self, encoder: Path, batches: Sequence[np.ndarray], options: OptimizeOptions) -> Calibrated:
        """Fit the columns of each weight to its inputs after the weights before it were quantized. With a size budget,
        the damage of 4 bits is measured first, and 8 bits go where they remove most of it. Ternary weights stay as they
        are. Raises ValueError for a budget that is exceeded even with 4 bits for every weight."""
        plan = plan_encoder(load(encoder), self, options)
        sensitivity: Sensitivity | None = None
        if options.size_budget_mb is not None:
            low, high = Format(LOW_BITS), _wide(options)
            sizes, budget = SizeModel(load(encoder), encoder.stat().st_size, self), options.size_budget_mb * 1e6
            smallest_plan(sizes, plan, low, budget)  # raises ValueError before the long work begins
            sensitivity = _measure(encoder, batches, (low, high), plan)
            plan = spend(sizes, sensitivity, plan, low, high, budget)
        weights: dict[str, Packed] = {}

        def visit(product: Product) -> np.ndarray:
            form = plan[product.name]
            if form.bits == TERNARY_BITS:
                packed = weights[product.name] = self.pack(product.weight, form)
                return np.asarray(packed.codes * packed.scales)
            inputs = InputMoments.strongest_first(product.moments)
            packed, became = fit_columns(
                product.weight, form.bits, inputs, product.factors, product.missing, full_range=form.full_range
            )
            weights[product.name] = packed
            return became

        factors = visit_products(encoder, batches, visit, scaled=scalable(plan), measures=False)
        return Calibrated(plan, weights, factors, sensitivity)

    def uncalibrated_advice(self, options: OptimizeOptions) -> str | None:
        if options.weight_bits != LOW_BITS:
            return None
        return (
            "without calibration 4 bits lose more: 19.3 dB on speech through a small checkpoint, 26.7 dB with it; add "
            "--calibration_manifest FILE, a few minutes of speech"
        )

    def runs_as(self, bits: Collection[int]) -> str:
        products = "products of 8-bit integers"
        if TERNARY_BITS in bits:
            others = ", and others in 4" if LOW_BITS in bits else ""
            return (
                f"ternary weights, 2 bits in the file{others}, {products} when it runs: ONNX Runtime 1.24 or newer "
                "unpacks them once"
            )
        if LOW_BITS in bits:
            return f"4 bits in the file, {products} when it runs: ONNX Runtime 1.23 or newer unpacks them once"
        return products


def _measure(encoder: Path, batches: Sequence[np.ndarray], forms: Iterable[Format], plan: Plan) -> Sensitivity:
    """The damage of each weight of the plan that is not ternary, by itself, in each of these formats."""
    sensitivity: dict[str, Mapping[int, float]] = {}

    def visit(product: Product) -> None:
        if plan[product.name].bits == TERNARY_BITS:
            return
        inputs = InputMoments.strongest_first(product.moments)
        became = {
            form.bits: fit_columns(product.weight, form.bits, inputs, product.factors, full_range=form.full_range)[1]
            for form in forms
        }
        sensitivity[product.name] = product.damages(became)

    visit_products(encoder, batches, visit, scaled=scalable(plan), measures=True)
    return sensitivity


def _wide(options: OptimizeOptions) -> Format:
    """The format of a weight with 8 bits in the file."""
    return Format(HIGH_BITS, full_range=options.full_range)


def _group_of(form: Format) -> int:
    """The rows that share a multiplier, of a ternary weight."""
    assert form.block is not None, "the format of a ternary weight has a group"
    return form.block


INT8 = IntegerMethod(
    name="int8",
    help="8 bits and integer products; the fastest and the most exact, 1.6 times as large as rtn, and with "
    "--weight_bits 4 the smallest; ternary weights have 2 bits in the file without further loss; its graph is not "
    "fused for a CPU, where that would make it slower",
)


@dataclass(frozen=True)
class _Rows:
    """An activation x [..., K] with a scale for each row. R is the number of rows."""

    rows: ir.Value  # x as [R, K]
    codes: ir.Value  # [R, K] uint8
    scales: ir.Value  # [R]
    zeros: ir.Value  # [R] uint8, all `zero`
    zero: int
    shape: ir.Value  # of x
    scales_of_x: ir.Value  # [..., 1]


class _Rewriter:
    """Replaces MatMuls one by one; remembers the quantized form of each activation."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        model.graph.opset_imports.setdefault(MICROSOFT, 1)
        self._rows: dict[ir.Value, _Rows] = {}
        self._tensors: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return shared_initializer(self.graph, name, array)

    def replace(self, node: ir.Node, name: str, columns: Packed, form: Format) -> None:
        """Replace `node`, which multiplies x by the weight called `name`, and the constant factor that follows it, by
        (quantized x) · codes · scales. Raises ValueError for a weight without a role, and as `lift_opset` does."""
        role = encoder_weight(name).role
        x, old, factor = input_of(node, 0), [node], constant_factor(node.outputs[0])
        scales = self.constant(f"{name}.scales", columns.scales)
        if factor is not None:
            multiplication, number = factor
            old.append(multiplication)
            scales = self.constant(f"{name}.scales.{node.outputs[0].name}", columns.scales * number)
        tape = Tape()
        weight = self._codes(name, columns.codes, form, tape)

        def multiply(x_codes: ir.Value, x_scale: ir.Value, zero: ir.Value) -> ir.Value:
            inputs = [x_codes, weight, x_scale, scales, zero]
            return tape.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT)

        if role in EVEN_ROWS_ROLES:
            y = multiply(*self._one_scale(x, node))
        else:
            rows = self._row_scales(x, len(columns.codes), node)
            shaped = tape.op("Reshape", [rows.codes, rows.shape])
            y = multiply(shaped, self._number("one", 1), self._zero_point(rows.zero))
            if role in TWO_TERM_ROLES and not columns.fitted and form.bits != LOW_BITS:
                shaped = tape.op("Reshape", [self._rest(rows, tape), rows.shape])
                rest = multiply(shaped, self._number("step", 1 / CODES), self._zero_point(MIDDLE_ZERO))
                y = tape.op("Add", [y, rest])
            y = tape.op("Mul", [y, rows.scales_of_x])
        ir.convenience.replace_nodes_and_values(self.graph, old[-1], old[::-1], tape.nodes, old[-1].outputs, [y])

    def _codes(self, name: str, codes: np.ndarray, form: Format, tape: Tape) -> ir.Value:
        """The codes of the weight in int8, as the product needs them."""
        if form.bits == LOW_BITS:
            lift_opset(self.model, INT4_OPSET, INT4_IR_VERSION)
            return self._unpacked(name, codes, ir.DataType.INT4, tape)
        if form.bits == TERNARY_BITS:
            lift_opset(self.model, INT2_OPSET, INT2_IR_VERSION)
            signs, sizes = signs_and_sizes(codes, _group_of(form))
            multipliers = self.constant(f"{name}.scales.groups", sizes[:, None])
            groups = tape.op("Mul", [self._unpacked(name, signs, ir.DataType.INT2, tape), multipliers])
            K, N = codes.shape
            return tape.op("Reshape", [groups, self.constant(f"int8.shape_{K}_{N}", np.array([K, N]))])
        return self.constant(f"{name}.codes", codes)

    def _unpacked(self, name: str, codes: np.ndarray, dtype: ir.DataType, tape: Tape) -> ir.Value:
        """These codes in int8, from a tensor of fewer bits in the file."""
        stored = self.graph.initializers.get(f"{name}.codes")
        if stored is None:
            stored = add_initializer(self.graph, packed_tensor(f"{name}.codes", codes, dtype))
        return tape.op("Cast", [stored], {"to": ir.DataType.INT8}, name=f"{name}.unpacked")

    def _one_scale(self, x: ir.Value, node: ir.Node) -> tuple[ir.Value, ...]:
        """Codes in the shape of x, with one scale and one zero point for all of them."""
        if x not in self._tensors:
            new = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3)
            self.graph.insert_before(node, new)
            self._tensors[x] = tuple(new.outputs)
        return self._tensors[x]

    def _row_scales(self, x: ir.Value, width: int, node: ir.Node) -> _Rows:
        if x not in self._rows:
            tape, zero = Tape(), _zero_code(x)
            bounds = [
                self.constant("int8.tiny", np.asarray(TINY)),
                self._bound(tape, "ReduceMax", x, 1 / (CODES - zero)),
            ]
            if zero:
                bounds.append(self._bound(tape, "ReduceMin", x, -1 / zero))
            scales_of_x = tape.op("Max", bounds)
            scales = tape.op("Reshape", [scales_of_x, self.constant("int8.flat", np.array([-1]))])
            rows = tape.op("Reshape", [x, self.constant(f"int8.rows_of_{width}", np.array([-1, width]))])
            zeros = _filled(tape, scales, zero)
            codes = tape.op("QuantizeLinear", [rows, scales, zeros], {"axis": 0})
            self._rows[x] = _Rows(rows, codes, scales, zeros, zero, tape.op("Shape", [x]), scales_of_x)
            self.graph.insert_before(node, tape.nodes)
        return self._rows[x]

    def _rest(self, x: _Rows, tape: Tape) -> ir.Value:
        """What rounding took from x, at most half a scale, as codes [R, K] with a scale 255 times finer."""
        back = tape.op("DequantizeLinear", [x.codes, x.scales, x.zeros], {"axis": 0})
        scales = tape.op("Mul", [x.scales, self._number("step", 1 / CODES)])
        inputs = [tape.op("Sub", [x.rows, back]), scales, _filled(tape, x.scales, MIDDLE_ZERO)]
        return tape.op("QuantizeLinear", inputs, {"axis": 0})

    def _bound(self, tape: Tape, extreme: str, x: ir.Value, per_code: float) -> ir.Value:
        """The scale [..., 1] with which codes just reach the largest, or the smallest, element of each row."""
        if self.graph.opset_imports[""] < 18:  # where the axes became an input
            extremes = tape.op(extreme, [x], {"axes": [-1], "keepdims": 1})
        else:
            extremes = tape.op(extreme, [x, self.constant("int8.last_axis", np.array([-1]))], {"keepdims": 1})
        return tape.op("Mul", [extremes, self._number(f"per_code_{per_code:.4f}", per_code)])

    def _number(self, name: str, number: float) -> ir.Value:
        return self.constant(f"int8.{name}", np.array([number], np.float32))

    def _zero_point(self, code: int) -> ir.Value:
        return self.constant(f"int8.zero_point_{code}", np.array(code, np.uint8))


def packed_tensor(name: str, codes: np.ndarray, dtype: ir.DataType) -> ir.TensorProtocol:
    """Whole numbers of any shape as a tensor of INT4 (−8 … 7) or INT2 (−2 … 1): two or four a byte, the first one in
    the lowest bits (onnx.proto)."""
    bits = int(8 * dtype.itemsize)
    per_byte = 8 // bits
    parts = codes.astype(np.int8).view(np.uint8).reshape(-1) & (2**bits - 1)
    packed = np.zeros(ceil_div(parts.size, per_byte), np.uint8)
    for place in range(per_byte):
        part = parts[place::per_byte]
        packed[: part.size] |= part << (bits * place)
    return ir.PackedTensor(packed, dtype, shape=codes.shape, name=name)


def lift_opset(model: ir.Model, opset: int, ir_version: int) -> None:
    """Raise the opset of ONNX's own operators and the version of the format, in place, if they are lower.

    The converters of onnx and onnxscript need the weights in memory, and that of onnxscript begins at opset 18. An
    encoder uses some thirty operators, of which only two are written in another way in newer opsets.

    Raises ValueError for an operator that changed in between in a way not known here.
    """
    imports = model.graph.opset_imports
    model.ir_version = max(model.ir_version, ir_version)
    if imports[""] >= opset:
        return
    for node in model.graph:
        if node.domain == "" and _version(node, imports[""]) != _version(node, opset):
            _lift(model.graph, node, opset)
    imports[""] = opset


def _version(node: ir.Node, opset: int) -> int:
    """The opset that defined the version of the operator that is valid in `opset`."""
    return defs.get_schema(node.op_type, opset, "").since_version


def _lift(graph: ir.Graph, node: ir.Node, opset: int) -> None:
    """Rewrite a node for opset 21 or 25, whether its version is from before opset 18 or later."""
    if node.op_type in AXES_BECAME_INPUT:
        if axes := node.attributes.pop("axes", None):
            numbers = axes.as_ints()
            name = "axes_" + "_".join(map(str, numbers))
            node.resize_inputs(2)
            node.replace_input_with(1, shared_initializer(graph, name, np.array(numbers)))
    elif node.op_type == "Split":  # into equal parts: their number no longer follows from the outputs
        if len(node.inputs) == 1 and "num_outputs" not in node.attributes:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    elif node.op_type not in SAME_MEANING:
        raise ValueError(
            f"weights of 2 or 4 bits need opset {opset}, but {node.op_type} cannot be lifted; export the encoder again "
            f"with --opset_version {INT4_OPSET}"
        )


def _filled(tape: Tape, like: ir.Value, code: int) -> ir.Value:
    """A vector as long as `like` that repeats one uint8: QuantizeLinear needs as many zero points as scales."""
    fill = {"value": ir.tensor(np.array([code], np.uint8))}
    return tape.op("ConstantOfShape", [tape.op("Shape", [like])], fill)


def _zero_code(x: ir.Value) -> int:
    """The code that stands for 0 in x, chosen by the node that computes x, which tells the range of its values."""
    node = x.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        node = input_of(node, 0).producer()
    if node is not None and node.op_type == "Relu":
        return RELU_ZERO
    return SILU_ZERO if node is not None and _is_silu(node) else MIDDLE_ZERO


def _is_silu(node: ir.Node) -> bool:
    """x · sigmoid(x)"""
    if node.op_type != "Mul":
        return False
    one, other = input_of(node, 0), input_of(node, 1)
    return _is_sigmoid_of(one, other) or _is_sigmoid_of(other, one)


def _is_sigmoid_of(y: ir.Value, x: ir.Value) -> bool:
    node = y.producer()
    return node is not None and node.op_type == "Sigmoid" and node.inputs[0] is x
