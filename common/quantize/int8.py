"""Products of 8-bit integers out of ONNX Runtime's stock operators: a scale for each token, a scale for each column.

    x [B, S, K] → codes uint8, one scale a row → MatMulIntegerToFloat by int8 W [K, N], one scale a column → · row scale

A row is divided by its own scale, so its error depends neither on the other rows nor on how long the clip is; operators
with one scale per tensor (DynamicQuantizeMatMul) lose 1.2 dB on Gaussian rows of equal size, and more with every clip
that has one loud frame. A row of zeros has the scale TINY: its codes are the zero point and its products 0, not NaN.

Rows are quantized once, however many products they go into. A constant factor that follows a product is taken into the
column scales. All in all the row scales cost 12 % of the products' time (1080 GFLOP/s for 1230 without them, where
float32 has 310; 1.32, 2 cores with AVX-512 VNNI); dividing by them before DynamicQuantizeMatMul costs the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from common.contract import MICROSOFT
from common.quantize.blocks import compensate, relative_error

WEIGHT_BITS, REDUCED_BITS = 8, 7
CODES = 255  # largest uint8
BLOCK = 128  # rows whose feedback is one product; nothing else depends on it
TINY = np.float32(1e-30)  # a row scale that can still be divided by and multiplied with
# The code of 0, from what is known of a row's range: codes below it are for negative numbers, and a range that is used
# up is a finer scale. SiLU is never under -0.28: at 32, a row whose maximum is 3 has 4.9 dB less error than at 128, and
# one whose maximum is under 1 has more. At the output 32 to 64 are within 0.3 dB on speech, 2.2 dB or more before 128.
MIDDLE_ZERO, SILU_ZERO, RELU_ZERO = 128, 32, 0
# A product whose other factor has rows of one size, sinusoids here, needs no row scales: one for all is as exact, and
# saves a pass over the result.
EVEN_ROWS_ROLES = (".attention.position.weight",)
# What rounding takes from these inputs is multiplied as well, 255 times finer: 65 % of the error of the output comes
# from this eighth of its products (speech through the tiny checkpoint: 36.2 dB without, 39.2 dB with it; if all
# products had it, for twice the time, 43.4 dB). Columns that were fitted to speech do without: they are as exact.
TWO_TERM_ROLES = (".convolution.expand.weight", ".convolution.project.weight")


def quantize_columns(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """W [K, N] → codes [K, N] int8 and scales [N]: W ≈ codes · scales, and a column of zeros is 0 · 0.

    With 7 bits no sum of two products uint8 · int8 leaves int16, where AVX2 without VNNI adds them: 2 · 255 · 63 is
    32130, while 2 · 255 · 127 = 64770 is cut to 32767.
    """
    top = np.float32(2 ** (bits - 1) - 1)
    scales = np.max(np.abs(weight), axis=0) / top
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.rint(weight * inverse).astype(np.int8), scales


@dataclass(frozen=True)
class Columns:
    """A weight [K, N] in 8 bits, and what it lost."""

    codes: np.ndarray  # [K, N] int8
    scales: np.ndarray  # [N]
    error: float  # Σ (W - Ŵ)² / Σ W²


def compensated_columns(weight: np.ndarray, bits: int, feedback: np.ndarray, factors: np.ndarray | float) -> Columns:
    """The weight times factors of its rows [K, 1], rounded with the feedback of `common.quantize.error_feedback`.

    Feedback may lead to a code of -2^(bits-1), one beyond the plain ones: 2 · 255 · 64 = 32640 is in int16 as well.
    """
    scaled = weight * factors
    _, scales = quantize_columns(scaled, bits)
    codes, _, _, errors = compensate(scaled, bits, BLOCK, lambda rows, bits: (scales, None), feedback)
    codes = codes.reshape(-1, weight.shape[1])[: len(weight)].astype(np.int16) - 2 ** (bits - 1)
    return Columns(codes.astype(np.int8), scales, relative_error(weight, weight - errors / factors))


def quantize_products(
    model: ir.Model,
    products: dict[str, list[ir.Node]],
    bits: int,
    progress: Callable[[Iterator, int], Iterable] = lambda items, total: items,
    fitted: Mapping[str, Columns] | None = None,
) -> dict[str, float]:
    """Put integer products in the place of MatMuls (weight name → nodes, in graph order), in place; the relative error
    of each weight. `fitted` are weights that are quantized already."""
    rewriter, errors = _Rewriter(model, () if fitted else TWO_TERM_ROLES), {}

    def pack(name: str) -> Columns:
        if fitted:
            return fitted[name]
        tensor = model.graph.initializers[name].const_value
        try:
            return _columns(tensor.numpy(), bits)  # nothing here may hold on to the mapping
        finally:
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # its mapping of the data file

    with ThreadPoolExecutor(cpu_count()) as pool:  # NumPy lets go of Python's lock
        packed = progress(pool.map(pack, products), len(products))
        for (name, nodes), columns in zip(products.items(), packed, strict=True):
            errors[name] = columns.error
            for node in nodes:
                rewriter.replace(node, name, columns.codes, columns.scales)
            if not model.graph.initializers[name].uses():
                del model.graph.initializers[name]
    RemoveUnusedNodesPass()(model)  # factors taken into scales, of which onnxruntime warns one by one
    return errors


def _columns(weight: np.ndarray, bits: int) -> Columns:
    codes, scales = quantize_columns(weight, bits)
    return Columns(codes, scales, relative_error(weight, codes * scales))


def quantize_lstms(model: ir.Model, bits: int) -> dict[str, float]:
    """Put a DynamicQuantizeLSTM in the place of each LSTM, in place: a scale for each gate of each unit; the relative
    error of each weight.

    Its activations, one token here, have one scale; a layer reads a quarter of the bytes (0.07 ms for 0.42 ms).
    """
    rewriter, errors = _Rewriter(model), {}
    for node in list(model.graph):
        if (node.op_type, node.domain) != ("LSTM", ""):
            continue
        x, w, r, *others = (*node.inputs, *[None] * 8)[:8]  # others: bias, lengths, h, c, peepholes
        w_codes, *w_scales = _lstm_parameters(rewriter, w, bits, errors)
        r_codes, *r_scales = _lstm_parameters(rewriter, r, bits, errors)
        inputs = [x, w_codes, r_codes, *others, *w_scales, *r_scales]
        new = ir.Node(MICROSOFT, "DynamicQuantizeLSTM", inputs, node.attributes.values(), num_outputs=3, name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)
        for matrix in (w, r):
            if not matrix.uses():
                del model.graph.initializers[matrix.name]
    return errors


def _lstm_parameters(rewriter: "_Rewriter", matrix: ir.Value, bits: int, errors: dict[str, float]) -> list[ir.Value]:
    """[directions, gates, width] → codes [directions, width, gates], scales and zero points [directions, gates]"""
    weight = matrix.const_value.numpy().transpose(0, 2, 1)
    codes, scales = (np.stack(part) for part in zip(*(quantize_columns(w, bits) for w in weight), strict=True))
    errors[matrix.name] = relative_error(weight, codes * scales[:, None])
    parts = {"codes": codes, "scales": scales, "zero_points": np.zeros(scales.shape, np.int8)}
    return [rewriter.constant(f"{matrix.name}.{part}", array) for part, array in parts.items()]


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

    def __init__(self, model: ir.Model, two_term_roles: tuple[str, ...] = ()):
        self.graph, self.opset = model.graph, model.graph.opset_imports[""]
        self.two_term_roles = two_term_roles
        model.graph.opset_imports.setdefault(MICROSOFT, 1)
        self._constants: dict[str, ir.Value] = {}
        self._rows: dict[ir.Value, _Rows] = {}
        self._tensors: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """The initializer of that name, made on first use."""
        if name not in self._constants:
            tensor = ir.tensor(np.asarray(array), name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]

    def replace(self, node: ir.Node, name: str, codes: np.ndarray, scales: np.ndarray) -> None:
        """Put (quantized x) · codes · scales in the place of `node`, x times the weight called `name`, and of the
        constant factor that follows it."""
        x, old, factor = node.inputs[0], [node], _constant_factor(node)
        columns = self.constant(f"{name}.scales", scales)
        if factor is not None:
            old.append(factor[0])
            columns = self.constant(f"{name}.scales.{node.outputs[0].name}", scales * factor[1])
        weight = self.constant(f"{name}.codes", codes)
        tape = Tape()

        def multiply(x_codes: ir.Value, x_scale: ir.Value, zero: ir.Value) -> ir.Value:
            inputs = [x_codes, weight, x_scale, columns, zero]
            return tape.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT)

        if name.endswith(EVEN_ROWS_ROLES):
            y = multiply(*self._one_scale(x, node))
        else:
            rows = self._row_scales(x, len(codes), node)
            shaped = tape.op("Reshape", [rows.codes, rows.shape])
            y = multiply(shaped, self._number("one", 1), self._zero_point(rows.zero))
            if name.endswith(self.two_term_roles):
                shaped = tape.op("Reshape", [self._rest(rows, tape), rows.shape])
                rest = multiply(shaped, self._number("step", 1 / CODES), self._zero_point(MIDDLE_ZERO))
                y = tape.op("Add", [y, rest])
            y = tape.op("Mul", [y, rows.scales_of_x])
        ir.convenience.replace_nodes_and_values(self.graph, old[-1], old[::-1], tape.nodes, old[-1].outputs, [y])

    def _one_scale(self, x: ir.Value, node: ir.Node) -> tuple[ir.Value, ...]:
        """x as codes of its shape, with one scale and one zero point."""
        if x not in self._tensors:
            new = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3)
            self.graph.insert_before(node, new)
            self._tensors[x] = tuple(new.outputs)
        return self._tensors[x]

    def _row_scales(self, x: ir.Value, width: int, node: ir.Node) -> _Rows:
        if x not in self._rows:
            tape, zero = Tape(), _zero_code(x)
            bounds = [self.constant("int8.tiny", TINY), self._bound(tape, "ReduceMax", x, 1 / (CODES - zero))]
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
        """What rounding took from x, at most half a scale: codes [R, K] of a scale 255 times finer."""
        back = tape.op("DequantizeLinear", [x.codes, x.scales, x.zeros], {"axis": 0})
        scales = tape.op("Mul", [x.scales, self._number("step", 1 / CODES)])
        inputs = [tape.op("Sub", [x.rows, back]), scales, _filled(tape, x.scales, MIDDLE_ZERO)]
        return tape.op("QuantizeLinear", inputs, {"axis": 0})

    def _bound(self, tape: Tape, extreme: str, x: ir.Value, per_code: float) -> ir.Value:
        """The scale [..., 1] for which the rows' largest, or smallest, elements are just within reach."""
        if self.opset < 18:  # where the axes became an input
            found = tape.op(extreme, [x], {"axes": [-1], "keepdims": 1})
        else:
            found = tape.op(extreme, [x, self.constant("int8.last_axis", np.array([-1]))], {"keepdims": 1})
        return tape.op("Mul", [found, self._number(f"per_code_{per_code:.4f}", per_code)])

    def _number(self, name: str, number: float) -> ir.Value:
        return self.constant(f"int8.{name}", np.array([number], np.float32))

    def _zero_point(self, code: int) -> ir.Value:
        return self.constant(f"int8.zero_point_{code}", np.array(code, np.uint8))


def _filled(tape: Tape, like: ir.Value, code: int) -> ir.Value:
    """A vector of one uint8: QuantizeLinear wants as many zero points as scales."""
    fill = {"value": ir.tensor(np.array([code], np.uint8))}
    return tape.op("ConstantOfShape", [tape.op("Shape", [like])], fill)


def _constant_factor(node: ir.Node) -> tuple[ir.Node, np.float32] | None:
    """The node that alone uses the product and takes it times a number, and the number."""
    uses = node.outputs[0].uses()
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    user = next(iter(uses)).node
    if (user.op_type, user.domain) != ("Mul", ""):
        return None
    tensors = [ir.convenience.get_const_tensor(value) for value in user.inputs if value is not node.outputs[0]]
    if len(tensors) != 1 or tensors[0] is None or len(tensors[0].shape) != 0:
        return None
    return user, tensors[0].numpy().astype(np.float32)


def _zero_code(x: ir.Value) -> int:
    """What the node that makes x says of its range."""
    node = x.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        node = node.inputs[0].producer()
    if node is not None and node.op_type == "Relu":
        return RELU_ZERO
    return SILU_ZERO if node is not None and _is_silu(node) else MIDDLE_ZERO


def _is_silu(node: ir.Node) -> bool:
    """x · sigmoid(x)"""
    if node.op_type != "Mul":
        return False
    producers = [value.producer() for value in node.inputs]
    return any(
        producer is not None and producer.op_type == "Sigmoid" and producer.inputs[0] is other
        for producer, other in zip(producers, reversed(node.inputs), strict=True)
    )
