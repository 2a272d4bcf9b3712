"""Graphs with float16 weights and arithmetic, float32 inputs and outputs, and float32 where float16 could overflow.

What overflows on a GPU need not overflow on a CPU, where ONNX Runtime multiplies in float32 and leaves out roundings
in between. So `measure_ranges` measures the largest values on speech, in the float32 graph, and `convert` leaves
operators that come near the limit in float32. What a GPU computes is emulated on the CPU: `EmulatedGraph` rounds the
result of each operator to float16.

onnxruntime.transformers.float16 is not used: between two operators that it leaves in float32 it converts the value to
float16 and back, it clips weights, and it needs all of them in memory. Here weights are read and written one by one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common as passes
from onnx_ir.tape import Tape

from common.cli import Stages, size_text
from common.contract import ENCODER, GRAPHS, Graph
from common.export.parity import References, check_graph
from common.onnx_io import load, save_model
from common.run.ort import OnnxRuntime, OrtGraph, open_session

LARGEST_FLOAT16 = 65504.0
# An operator stays float32 if one of its inputs, outputs or inner sums was as large as this or larger. It is a quarter
# of the largest float16, since other speech may have larger values. Masked attention scores, -10000, are below it.
LIMIT = 2.0**14
# Operators whose inner sums, perhaps of squares, have no declared precision; LayerNormalization declares it
# (stash_type, float32).
SUMS = ("InstanceNormalization", "GroupNormalization", "ReduceMean", "ReduceSum", "ReduceL2")
PERIODIC = ("Sin", "Cos")  # large angles in, small numbers out

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

Ranges = Mapping[str, float]  # operator's name → its largest magnitude


def load_typed(path: Path) -> ir.Model:
    """The model at `path`, with constants as initializers and the type of every value inferred."""
    model = passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(load(path)).model
    return passes.ShapeInferencePass()(model).model


def float_values(node: ir.Node) -> list[ir.Value]:
    """The inputs and outputs of `node` that are float32 or float16."""
    return [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype in FLOATS]


def exact_session(model: ir.Model, folder: Path) -> ort.InferenceSession:
    """An ONNX Runtime session of `model`, whose weights are in `folder`, that changes nothing in the graph.

    No cast is dropped, no weight is repacked, and the magnitudes of weights, which take gigabytes, are computed when
    they are needed.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # the order of the file
    options.enable_cpu_mem_arena = False
    proto = ir.to_proto(model)
    for entry in (entry for tensor in proto.graph.initializer for entry in tensor.external_data):
        if entry.key == "location":  # an absolute path, which ONNX Runtime does not accept
            entry.value = Path(entry.value).name
    entries = {
        "session.disable_prepacking": "1",
        "session.model_external_initializers_file_folder_path": str(folder),
    }
    return open_session(proto.SerializeToString(), entries=entries, options=options)


class RangeRecorder(OrtGraph):
    """A float32 graph that records, over all its calls, the largest magnitude at each of its operators.

    It has one more scalar output for each float value and each product: the largest magnitude in the value, or of the
    product the sum of the magnitudes of its terms, which no order of summation exceeds, even in float16. Each is
    computed directly after the operator it belongs to. At the end, all values would have to be held until then.
    """

    def __init__(self, folder: Path, graph: Graph) -> None:
        model = load_typed(folder / graph.file)
        self.graph = graph
        self._outputs = model.graph.outputs
        self._probes: dict[ir.Value | ir.Node, str] = {}  # what is measured → the output that measures it
        self._operators: dict[str, list[ir.Value | ir.Node]] = {}  # name → what is measured of it
        self._magnitudes: dict[ir.Value | None, ir.Value] = {}
        self._added: list[ir.Node] = []
        for node in list(model.graph):
            values = [value for value in float_values(node) if value.dtype == ir.DataType.FLOAT]
            for value in values:
                if value not in self._probes:
                    self._probe(value, self._magnitude(value))
            if values and node.op_type in ("MatMul", "Conv"):
                terms = [self._magnitude(value) for value in node.inputs[:2]]
                self._probe(node, self._add(node.op_type, terms, *node.attributes.values()))
            elif node.op_type == "LSTM":
                by_input = self._lstm_product(node.inputs[0], node.inputs[1])
                by_state = self._lstm_product(node.inputs[5], node.inputs[2])  # of the first step
                self._probe(node, self._add("Add", [by_input, by_state]))
            self._operators[str(node.name)] = [*values, *([node] if node in self._probes else [])]
            model.graph.insert_after(node, self._added)
            self._added.clear()
        self._largest = np.zeros(len(self._probes), np.float32)
        self.session = exact_session(model, folder)

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        names = [*self.graph.output_names, *self._probes.values()]
        results: list[np.ndarray] = self.session.run(names, dict(zip(self.graph.input_names, inputs, strict=True)))
        count = len(self.graph.outputs)
        self._largest = np.maximum(self._largest, results[count:])  # a NaN stays
        return results[:count]

    def ranges(self) -> Ranges:
        """The largest magnitude of each operator: among its inputs, its outputs and its inner sums."""
        known = dict(zip(self._probes, self._largest.tolist(), strict=True))
        return {
            name: float(np.max([known[item] for item in items], initial=0.0)) for name, items in self._operators.items()
        }

    def _lstm_product(self, rows: ir.Value | None, weight: ir.Value | None) -> ir.Value:
        """rows [S, B, I], an LSTM's weight [1, 4H, I] → the sums of magnitudes [S, B, 4H]"""
        columns = self._add("Transpose", [self._magnitude(weight)], ir.AttrInt64s("perm", [0, 2, 1]))
        return self._add("MatMul", [self._magnitude(rows), columns])

    def _magnitude(self, value: ir.Value | None) -> ir.Value:
        if value not in self._magnitudes:
            self._magnitudes[value] = self._add("Abs", [value])
        return self._magnitudes[value]

    def _probe(self, item: ir.Value | ir.Node, magnitudes: ir.Value) -> None:
        largest = self._add("ReduceMax", [magnitudes], ir.AttrInt64("keepdims", 0))
        largest.name = self._probes[item] = f"largest {len(self._probes)}"
        largest.shape = ir.Shape([])
        self._outputs.append(largest)

    def _add(self, operator: str, inputs: Sequence[ir.Value | None], *attributes: ir.Attr) -> ir.Value:
        node = ir.Node("", operator, inputs, attributes)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self._added.append(node)
        return node.outputs[0]


def measure_ranges(folder: Path, clips: Sequence[np.ndarray]) -> dict[str, Ranges]:
    """Transcribe `clips`, features [M, T] each, with the float32 folder: graph's name → ranges of its operators."""
    recorders = {graph.name: RangeRecorder(folder, graph) for graph in GRAPHS}
    engine = OnnxRuntime(folder, lambda _, graph: recorders[graph.name])
    for features in clips:
        engine.transcribe(features)
    shortest = min(clips, key=lambda features: features.shape[1])
    frames = shortest.shape[1]
    engine.encoder(np.stack([shortest, shortest]), np.array([frames, frames // 2]))  # with masked frames
    return {name: recorder.ranges() for name, recorder in recorders.items()}


def convert(
    source: Path, target: Path, graph: Graph, ranges: Ranges, *, single_file: bool = False
) -> tuple[dict[str, Any], int]:
    """Write `graph` of the float32 folder `source` into `target`, in float16 where its `ranges` allow that.

    single_file: an encoder holds its weights, as the other graphs do.
    Returns the record for the manifest, and the number of operators that compute in float16.
    """
    model = load_typed(source / graph.file)
    counting = _exact_operators(model)
    exact: list[str] = []  # left in float32: integer arithmetic, sums of unknown precision
    overflowing: dict[str, float] = {}  # left in float32: name → largest value
    largest: dict[str, float] = {}  # in float16: operator's type → largest value
    converted = 0
    casts = _Casts(model, convert_weights=True)
    for node in list(model.graph):
        if all(value.dtype != ir.DataType.FLOAT for value in float_values(node)):
            continue
        name = str(node.name)
        dtype = ir.DataType.FLOAT
        if node in counting:
            exact.append(name)
        elif not ranges[name] < LIMIT:  # written so that NaN is not below it either
            overflowing[name] = ranges[name]
        else:
            dtype = ir.DataType.FLOAT16
            largest[node.op_type] = max(largest.get(node.op_type, 0.0), ranges[name])
            converted += 1
        casts.cast_inputs(node, dtype)
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = dtype
        if node.op_type == "Cast" and node.outputs[0].dtype in FLOATS:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
    for index, value in enumerate(model.graph.outputs):  # back to float32, under their old names
        if value.dtype == ir.DataType.FLOAT16:
            exported_name = value.name
            value.name = f"{exported_name}.float16"
            output = casts.cast(value, ir.DataType.FLOAT)
            output.name = exported_name
            output.shape = value.shape
            model.graph.outputs[index] = output
    model.graph.sort()
    for value in [value for node in model.graph for value in node.outputs if not value.is_graph_output()]:
        value.type = value.shape = None  # as in the exported graph: a runtime infers them
    for graph_pass in (passes.RemoveUnusedNodesPass(), passes.RemoveUnusedOpsetsPass()):
        model = graph_pass(model).model
    save_model(model, target / graph.file, single_file=single_file or graph is not ENCODER)
    record = {
        "limit": LIMIT,
        "kept_float32": {name: float(f"{value:.4g}") for name, value in overflowing.items()},
        "kept_exact": exact,
        "max_abs": {name: float(f"{value:.4g}") for name, value in largest.items()},
    }
    return record, converted


def _exact_operators(model: ir.Model) -> set[ir.Node]:
    """Operators that stay float32 whatever their values are: SUMS, and those that count in floats.

    Float16 has no odd integer beyond 2048, and the positions of a clip of three minutes exceed that. So a Cast of
    integers stays float32, and so does what is computed from its result and constants alone, up to the sine or cosine.
    """
    exact = {node for node in model.graph if node.op_type in SUMS}
    for node in filter(float_values, model.graph):
        values = [value for value in node.inputs if value is not None and value.dtype in FLOATS]
        sources = [value.producer() for value in values if not value.is_initializer()]
        if sources:
            counts = all(
                source is not None and source in exact and source.op_type not in PERIODIC for source in sources
            )
        elif node.op_type == "Cast":
            dtypes = [value.dtype for value in node.inputs if value is not None]
            counts = any(dtype is not None and dtype.is_integer() for dtype in dtypes)
        else:
            counts = not values  # an operator without float inputs, whose output type is an attribute
        if counts:
            exact.add(node)
    return exact


class EmulatedGraph(OrtGraph):
    """A float16 graph as a GPU computes it: sums in float32, the result of each operator rounded to float16."""

    def __init__(self, folder: Path, graph: Graph) -> None:
        model = load_typed(folder / graph.file)
        casts = _Casts(model, convert_weights=False)
        for node in list(model.graph):
            if node.op_type == "Cast" or all(value.dtype != ir.DataType.FLOAT16 for value in float_values(node)):
                continue
            casts.cast_inputs(node, ir.DataType.FLOAT)
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT16:
                    users = list(value.uses())
                    value.dtype = ir.DataType.FLOAT
                    rounded = casts.cast(value, ir.DataType.FLOAT16)
                    for user, index in users:
                        user.replace_input_with(index, rounded)
        model.graph.sort()
        self.graph = graph
        self.session = exact_session(model, folder)


class _Casts:
    """Values of a graph in another float type, by one Cast node each; nodes are appended, so the graph needs sorting.

    With `convert_weights`, an initializer gets a second initializer instead, which is converted when it is written.
    """

    def __init__(self, model: ir.Model, *, convert_weights: bool) -> None:
        self.graph = model.graph
        self.convert_weights = convert_weights
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in the type `dtype`; each call returns the same converted value."""
        key = value, dtype
        if key in self.made:
            return self.made[key]
        name = f"{value.name}.{dtype.name.lower()}"
        tensor = value.const_value
        if self.convert_weights and value.is_initializer() and tensor is not None:

            def converted() -> ir.TensorProtocol:
                array = tensor.numpy().astype(dtype.numpy())
                if isinstance(tensor, ir.ExternalTensor):
                    tensor.release()  # its data file is mapped only meanwhile
                return ir.tensor(array, name=name)

            shape = cast(ir.Shape, tensor.shape)
            result = Tape(self.graph).initializer(ir.LazyTensor(converted, dtype, shape, name=name))
        else:
            node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], name=f"{name}.Cast")
            self.graph.append(node)
            result = node.outputs[0]
            result.name = name
            result.type = ir.TensorType(dtype)
        self.made[key] = result
        return result

    def cast_inputs(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Cast the inputs of `node` that are of the other float type to `dtype`."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in FLOATS and value.dtype != dtype:
                node.replace_input_with(index, self.cast(value, dtype))


def convert_graphs(
    source: Path,
    target: Path,
    references: References,
    speech: Sequence[np.ndarray],
    stages: Stages,
    *,
    single_file: bool,
) -> dict[str, Any]:
    """Convert the graphs of the float32 folder `source` into `target` and verify them; return the manifest's record.

    source: holds genai_config.json as well. speech: features [M, T] on which the values inside the graphs are measured.
    single_file: the encoder holds its weights, as the other graphs do.
    Each graph is verified as ONNX Runtime runs it on the CPU, and as a GPU that rounds each result to float16 would.
    Raises CheckError as verify_graphs does.
    """
    stages.begin(f"values inside the model on {len(speech)} clips of speech")
    ranges = measure_ranges(source, speech)
    largest = max(max(values.values()) for values in ranges.values())
    stages.end(
        f"the largest is {largest:.0f}",
        f"float16 holds up to {LARGEST_FLOAT16:.0f}; operators with values from {LIMIT:.0f} on stay float32",
    )
    parity: dict[str, Any] = {}
    float16: dict[str, Any] = {}
    for graph in GRAPHS:
        stages.begin(f"{graph.file} in float16")
        float16[graph.file], converted = convert(source, target, graph, ranges[graph.name], single_file=single_file)
        kept = len(float16[graph.file]["kept_float32"]) + len(float16[graph.file]["kept_exact"])
        fields = [f"{kept} of {kept + converted} operators stay float32", size_text(graph.bytes_in(target))]
        if graph in references:
            parity[graph.file], _ = check_graph(target, graph, references[graph], float16=True)
            rounded, text = check_graph(target, graph, references[graph], EmulatedGraph, float16=True)
            float16[graph.file]["rounded_parity"] = rounded
            fields.append(f"rounded as on a GPU: {text}")
        else:
            fields.append("not verified")
        stages.end(*fields)
    return {"parity": parity, "float16": float16}
