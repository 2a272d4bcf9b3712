"""Products of 8-bit integers out of ONNX Runtime's stock operators: a scale for each token, a scale for each column.

    x [B, S, K] → codes uint8, one scale a row → MatMulIntegerToFloat by int8 W [K, N], one scale a column → · row scale

A row is divided by its own scale, so its error depends neither on the other rows nor on the length of the clip, which
takes 12 % of the products' time. A row of zeros has the scale TINY: its codes are the zero point, its products 0, not
NaN. Rows are quantized once, however many products they go into, and a constant factor that follows a product is merged
into the column scales.

W may be stored in 4 bits, as an INT4 tensor that a Cast turns into int8. If W is ternary in groups, its int8 codes are
−c, 0 and c in each group of a column, and stored as an INT2 tensor and one int8 multiplier c for each group:

    INT2 [K/g, g, N] → Cast → · c [K/g, 1, N] → Reshape → int8 W [K, N]

ONNX Runtime computes both once, when a session is created, so that the same products run (4 bits in 1.23 or newer,
2 bits in 1.24 or newer; older versions have no such Cast).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from common.contract import MICROSOFT, EncoderWeight, Role, encoder_weight
from common.quantize import rounding
from common.quantize.methods import FittingMethod, Format, OptimizeOptions, Plan, Replace, Weight
from common.quantize.rewrite import constant_factor
from common.quantize.rounding import HIGH_BITS, LOW_BITS, TERNARY_BITS, TINY, InputMoments, Packed

CODES = 255  # largest uint8
# The code that stands for 0, chosen by what is known about the range of a row: the fewer codes are wasted below it, the
# finer is the scale. SiLU is never below -0.28; codes of 32 to 64 give 2.2 dB more than 128 on speech.
MIDDLE_ZERO, SILU_ZERO, RELU_ZERO = 128, 32, 0
# Rows of sines and cosines need no scales of their own, since all reach from -1 to 1: one scale for all rows is as
# exact for the sums of their products, and saves a pass over the result.
EVEN_ROWS_ROLES = (Role.ATTENTION_POSITION_SINE, Role.ATTENTION_POSITION_COSINE)
# For these products, what rounding takes from the input is multiplied too, with a scale 255 times finer (a second
# term): speech through the tiny checkpoint gives 36.2 dB without, 39.2 dB with it. Columns that were fitted to speech
# are as exact without, and columns in 4 bits have a far larger error of their own.
TWO_TERM_ROLES = (Role.CONVOLUTION_EXPAND, Role.CONVOLUTION_PROJECT)
INT4_OPSET, INT4_IR_VERSION = 21, 10  # the first with 4-bit integers
INT2_OPSET, INT2_IR_VERSION = 25, 13  # the first with 2-bit integers


@dataclass(frozen=True, kw_only=True)
class IntegerMethod(FittingMethod):
    """4 or 8 bits for every weight, or what a size budget gives each. Weights that are ternary in groups have 2 bits in
    the file."""

    weight_bits: tuple[int, ...] = (TERNARY_BITS, LOW_BITS, HIGH_BITS)
    has_range: bool = True
    calibrates: bool = True
    fits_in_sequence: bool = True
    fused_on_cpu: bool = False  # SkipLayerNormalization takes a larger share of the time of this faster encoder
    node_bytes: int = 1600  # including the nodes that quantize its input; 1503 were measured

    def plan(self, weights: Mapping[str, EncoderWeight], options: OptimizeOptions) -> Plan:
        low, high = self.widths(options)
        return dict.fromkeys(weights, low if options.weight_bits == LOW_BITS else high)

    def ternary_format(self, group: int, options: OptimizeOptions) -> Format | None:
        return Format(TERNARY_BITS, group, options.full_range)

    def pack(self, weight: np.ndarray, form: Format) -> Packed:
        if form.bits == TERNARY_BITS:
            return rounding.ternary_columns(weight, form.block, full_range=form.full_range)
        return rounding.quantize_columns(weight, form.bits, full_range=form.full_range)

    def replace(self, model: ir.Model, options: OptimizeOptions) -> Replace:
        return _Rewriter(model).replace

    def widths(self, options: OptimizeOptions) -> tuple[Format, Format]:
        return Format(LOW_BITS), Format(HIGH_BITS, full_range=options.full_range)

    def stored_bytes(self, shape: tuple[int, ...], form: Format) -> tuple[int, ...]:
        K, N = shape
        codes = rounding.ceil_div(K * N * form.bits, 8)
        return (codes, K // form.block * N, 4 * N) if form.bits == TERNARY_BITS else (codes, 4 * N)

    def fit(
        self, weight: np.ndarray, form: Format, inputs: InputMoments, factors: np.ndarray, missing: np.ndarray | None
    ) -> tuple[Packed, np.ndarray]:
        return rounding.fit_columns(weight, form.bits, inputs, factors, missing, full_range=form.full_range)

    def runs_as(self, bits: Collection[int]) -> str:
        products = "products of 8-bit integers"
        if TERNARY_BITS in bits:
            stored, since = "ternary weights, 2 bits in the file", "1.24"
            stored += ", and others in 4" if LOW_BITS in bits else ""
        elif LOW_BITS in bits:
            stored, since = "4 bits in the file", "1.23"
        else:
            return products
        return f"{stored}, {products} when it runs: ONNX Runtime {since} or newer unpacks them once"


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
        self._tensors: dict[ir.Value, Sequence[ir.Value]] = {}

    def constant(self, name: str, content: object, dtype: type | None = None) -> ir.Value:
        return _shared_initializer(self.graph, ir.tensor(np.asarray(content, dtype), name=name))

    def replace(self, weight: Weight, columns: Packed, form: Format) -> None:
        """Replace the nodes that multiply by a weight. Raises ValueError for one without a role."""
        for node in weight.products:
            self._replace(node, weight.name, columns, form)

    def _replace(self, node: ir.Node, name: str, columns: Packed, form: Format) -> None:
        """Replace `node`, which multiplies x by the weight, and the constant factor that follows it, by
        (quantized x) · codes · scales."""
        role = encoder_weight(name).role
        x, old, factor = node.inputs[0], [node], constant_factor(node.outputs[0])
        assert x is not None, "a product has two factors"
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

        if role in EVEN_ROWS_ROLES:  # codes in the shape of x, with one scale and one zero point for all of them
            if x not in self._tensors:
                new = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3)
                self.graph.insert_before(node, new)
                self._tensors[x] = new.outputs
            y = multiply(*self._tensors[x])
        else:
            rows = self._row_scales(x, len(columns.codes), node)
            shaped = tape.op("Reshape", [rows.codes, rows.shape])
            y = multiply(shaped, self._number("one", 1), self._zero_point(rows.zero))
            if role in TWO_TERM_ROLES and not columns.fitted and form.bits != LOW_BITS:
                step = self._number("step", 1 / CODES)
                back = tape.op("DequantizeLinear", [rows.codes, rows.scales, rows.zeros], {"axis": 0})
                finer = tape.op("Mul", [rows.scales, step])
                rest = [tape.op("Sub", [rows.rows, back]), finer, _filled(tape, rows.scales, MIDDLE_ZERO)]
                shaped = tape.op("Reshape", [tape.op("QuantizeLinear", rest, {"axis": 0}), rows.shape])
                y = tape.op("Add", [y, multiply(shaped, step, self._zero_point(MIDDLE_ZERO))])
            y = tape.op("Mul", [y, rows.scales_of_x])
        ir.convenience.replace_nodes_and_values(self.graph, old[-1], old[::-1], tape.nodes, old[-1].outputs, [y])

    def _codes(self, name: str, codes: np.ndarray, form: Format, tape: Tape) -> ir.Value:
        """The codes of the weight in int8, as the product needs them."""
        if form.bits == LOW_BITS:
            lift_opset(self.model, INT4_OPSET, INT4_IR_VERSION)
            return self._unpacked(name, codes, ir.DataType.INT4, tape)
        if form.bits == TERNARY_BITS:
            lift_opset(self.model, INT2_OPSET, INT2_IR_VERSION)
            signs, sizes = rounding.signs_and_sizes(codes, form.block)
            multipliers = self.constant(f"{name}.scales.groups", sizes[:, None])
            groups = tape.op("Mul", [self._unpacked(name, signs, ir.DataType.INT2, tape), multipliers])
            K, N = codes.shape
            return tape.op("Reshape", [groups, self.constant(f"int8.shape_{K}_{N}", [K, N])])
        return self.constant(f"{name}.codes", codes)

    def _unpacked(self, name: str, codes: np.ndarray, dtype: ir.DataType, tape: Tape) -> ir.Value:
        """These codes in int8, from a tensor of fewer bits in the file."""
        stored = _shared_initializer(self.graph, packed_tensor(f"{name}.codes", codes, dtype))
        return tape.op("Cast", [stored], {"to": ir.DataType.INT8}, name=f"{name}.unpacked")

    def _row_scales(self, x: ir.Value, width: int, node: ir.Node) -> _Rows:
        """x with a scale for each row, with which codes just reach the largest and the smallest element of the row."""
        if x not in self._rows:
            tape, zero = Tape(), _zero_code(x)
            per_codes = {"ReduceMax": 1 / (CODES - zero)} | ({"ReduceMin": -1 / zero} if zero else {})
            bounds = [self.constant("int8.tiny", TINY)]
            for extreme, per_code in per_codes.items():
                if self.graph.opset_imports[""] < 18:  # where the axes became an input
                    extremes = tape.op(extreme, [x], {"axes": [-1], "keepdims": 1})
                else:
                    extremes = tape.op(extreme, [x, self.constant("int8.last_axis", [-1])], {"keepdims": 1})
                bounds.append(tape.op("Mul", [extremes, self._number(f"per_code_{per_code:.4f}", per_code)]))
            scales_of_x = tape.op("Max", bounds)
            scales = tape.op("Reshape", [scales_of_x, self.constant("int8.flat", [-1])])
            rows = tape.op("Reshape", [x, self.constant(f"int8.rows_of_{width}", [-1, width])])
            zeros = _filled(tape, scales, zero)
            codes = tape.op("QuantizeLinear", [rows, scales, zeros], {"axis": 0})
            self._rows[x] = _Rows(rows, codes, scales, zeros, zero, tape.op("Shape", [x]), scales_of_x)
            self.graph.insert_before(node, tape.nodes)
        return self._rows[x]

    def _number(self, name: str, number: float) -> ir.Value:
        return self.constant(f"int8.{name}", [number], np.float32)

    def _zero_point(self, code: int) -> ir.Value:
        return self.constant(f"int8.zero_point_{code}", code, np.uint8)


def _shared_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer with the tensor's name, which is made of the tensor on first use."""
    existing = graph.initializers.get(str(tensor.name))
    return Tape(graph).initializer(tensor) if existing is None else existing


def _filled(tape: Tape, like: ir.Value, code: int) -> ir.Value:
    """A vector as long as `like` that repeats one uint8: QuantizeLinear needs as many zero points as scales."""
    fill = {"value": ir.tensor(np.array([code], np.uint8))}
    return tape.op("ConstantOfShape", [tape.op("Shape", [like])], fill)


def _zero_code(x: ir.Value) -> int:
    """The code that stands for 0 in x, chosen by the node that computes x, which tells the range of its values."""
    node = x.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        node = next(iter(node.predecessors()), None)
    if node is None:
        return MIDDLE_ZERO
    if node.op_type == "Relu":
        return RELU_ZERO
    gates = [gate for gate in node.predecessors() if gate.op_type == "Sigmoid"]
    is_silu = node.op_type == "Mul" and any(gate.inputs[0] in node.inputs for gate in gates)
    return SILU_ZERO if is_silu else MIDDLE_ZERO


def packed_tensor(name: str, codes: np.ndarray, dtype: ir.DataType) -> ir.TensorProtocol:
    """Whole numbers of any shape as a tensor of INT4 (−8 … 7) or INT2 (−2 … 1): two or four a byte, the first one in
    the lowest bits (onnx.proto)."""
    bits = int(8 * dtype.itemsize)
    parts = codes.astype(np.int8).view(np.uint8).reshape(1, -1, 1) & (2**bits - 1)
    return ir.PackedTensor(rounding.pack_bits(parts, bits).reshape(-1), dtype, shape=codes.shape, name=name)


def lift_opset(model: ir.Model, opset: int, ir_version: int) -> None:
    """Raise the opset of ONNX's own operators from 17 or later, and the version of the format, in place, if they are
    lower. Of the operators that the export uses, only two kinds are written in another way in newer opsets; for others
    newer versions accept more types, or have attributes whose defaults keep the meaning (onnx's changelog, up to 25).

    The converters of onnx and onnxscript need the weights in memory, and onnxscript's begins at opset 18.
    """
    model.ir_version = max(model.ir_version, ir_version)
    imports = model.graph.opset_imports
    if imports[""] >= opset:
        return
    for node in model.graph:
        if node.op_type.startswith("Reduce") and (axes := node.attributes.pop("axes", None)):  # an input since 18
            numbers = axes.as_ints()
            node.resize_inputs(2)
            tensor = ir.tensor(np.array(numbers), name="axes_" + "_".join(map(str, numbers)))
            node.replace_input_with(1, _shared_initializer(model.graph, tensor))
        elif node.op_type == "Split" and len(node.inputs) == 1 and "num_outputs" not in node.attributes:
            # Into equal parts: since 18 their number does not follow from the outputs.
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    imports[""] = opset
