"""Graphs with float16 weights and compute, float32 inputs and outputs, and float32 where float16 could overflow.

What overflows on a GPU may not on a CPU, where ONNX Runtime multiplies in float32 and drops roundings in between. So
the largest values are measured on speech, in the float32 graph, and operators that come near the limit stay as they
are. What a device makes of the rest is computed as well: `Emulated` rounds the result of each operator to float16.

onnxruntime.transformers.float16 is not used: between two operators that it leaves in float32 it passes the value
through float16, it cuts off weights, and it wants all of them in memory. Here they are read and written one by one.
"""

from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from common.contract import Graph
from common.export.ranges import Largest
from common.folder.onnx_files import load, save_model
from common.run.ort import ERRORS_AND_WORSE, OrtGraph

# An operator stays float32 if a value that goes in, comes out or is summed up inside it was larger. A quarter of
# float16's 65504: speech that was not measured may be louder inside. Masked attention scores, -10000, remain below.
LIMIT = 2.0**14
# Their inner sums have no declared precision, as LayerNormalization's have (stash_type, float32), and may be squares.
SUMS = ("InstanceNormalization", "GroupNormalization", "ReduceMean", "ReduceSum", "ReduceL2")
PERIODIC = ("Sin", "Cos")  # large angles in, small numbers out
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass
class Conversion:
    """What became of one graph: operators left in float32 with their largest value, and those of the rest by type."""

    overflowing: dict[str, float] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)  # integer arithmetic, and sums of unknown precision
    converted: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict:
        """For the manifest."""
        overflowing, converted = (
            {name: float(f"{value:.4g}") for name, value in values.items()}
            for values in (self.overflowing, self.converted)
        )
        return {"limit": LIMIT, "kept_float32": overflowing, "kept_exact": self.exact, "max_abs": converted}


class Emulated(OrtGraph):
    """A float16 graph as a GPU computes it: sums in float32, the result of each operator rounded to float16."""

    def __init__(self, folder: Path, graph: Graph):
        model = typed(folder / graph.file)
        casts = _Casts(model, weights=False)
        for node in list(model.graph):
            if node.op_type != "Cast" and any(value.dtype == ir.DataType.FLOAT16 for value in _floats(node)):
                for index, value in enumerate(node.inputs):
                    if value is not None and value.dtype == ir.DataType.FLOAT16:
                        node.replace_input_with(index, casts.of(value, ir.DataType.FLOAT))
                for value in node.outputs:
                    if value.dtype == ir.DataType.FLOAT16:
                        users = list(value.uses())
                        value.dtype = ir.DataType.FLOAT
                        rounded = casts.of(value, ir.DataType.FLOAT16)
                        for user, index in users:
                            user.replace_input_with(index, rounded)
        model.graph.sort()
        self.graph, self.session = graph, session_of(model, folder)


def convert(source: Path, target: Path, graph: Graph, largest: Largest) -> Conversion:
    """Write `graph` of the float32 folder `source` into `target`, in float16 where its `largest` values allow that."""
    model = typed(source / graph.file)
    exact = _exact(model)
    done, casts = Conversion(), _Casts(model, weights=True)
    for node in list(model.graph):
        floats = [value for value in _floats(node) if value.dtype == ir.DataType.FLOAT]
        if not floats:
            continue
        dtype = ir.DataType.FLOAT
        if node in exact:
            done.exact.append(node.name)
        elif not largest[node.name] < LIMIT:  # NaN is not, either
            done.overflowing[node.name] = largest[node.name]
        else:
            dtype = ir.DataType.FLOAT16
            done.converted[node.op_type] = max(done.converted.get(node.op_type, 0.0), largest[node.name])
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in FLOATS and value.dtype != dtype:
                node.replace_input_with(index, casts.of(value, dtype))
        for value in node.outputs:
            value.dtype = dtype if value.dtype == ir.DataType.FLOAT else value.dtype
        if node.op_type == "Cast" and node.outputs[0].dtype in FLOATS:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
    for index, value in enumerate(model.graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            name, value.name = value.name, f"{value.name}.float16"
            output = casts.of(value, ir.DataType.FLOAT)
            output.name, output.shape = name, value.shape
            model.graph.outputs[index] = output
    model.graph.sort()
    _forget_types(model)
    for graph_pass in (passes.RemoveUnusedNodesPass(), passes.RemoveUnusedOpsetsPass()):
        model = graph_pass(model).model
    save_model(model, target / graph.file)
    return done


class _Casts:
    """A value of a graph in another float type: one Cast node however often it is asked for, appended; sort afterwards.

    With `weights` an initializer becomes one more initializer, which is converted when it is written.
    """

    def __init__(self, model: ir.Model, *, weights: bool):
        self.graph, self.weights, self.made = model.graph, weights, {}

    def of(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        key = value, dtype
        if key not in self.made:
            name = f"{value.name}.{dtype.name.lower()}"
            make = self._weight if self.weights and value.is_initializer() else self._node
            self.made[key] = make(value, dtype, name)
        return self.made[key]

    def _node(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], name=f"{name}.Cast")
        output = node.outputs[0]
        output.name, output.type = name, ir.TensorType(dtype)
        self.graph.append(node)
        return output

    def _weight(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        tensor = value.const_value

        def converted() -> ir.Tensor:
            try:
                return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)
            finally:
                release(tensor)

        lazy = ir.LazyTensor(converted, dtype, tensor.shape, name=name)
        made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=lazy)
        self.graph.register_initializer(made)
        return made


def typed(path: Path) -> ir.Model:
    """The model at `path`, constants as initializers and the type of every value known."""
    model = passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(load(path)).model
    model = passes.ShapeInferencePass()(model).model
    unknown = next((node for node in model.graph if any(value.dtype is None for value in node.outputs)), None)
    if unknown is not None:
        raise ValueError(f"{path}: ONNX does not know the type that {unknown.op_type} {unknown.name} gives")
    return model


def _forget_types(model: ir.Model) -> None:
    """Of the values inside the graph, as export.py leaves them; a runtime infers them."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None


def _floats(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype in FLOATS]


def _exact(model: ir.Model) -> set[ir.Node]:
    """Operators that stay float32 whatever their values are: SUMS, and those that count in floats.

    Float16 has no odd integer beyond 2048, and the positions of a clip of three minutes go further. So a Cast of
    integers stays, and what is computed from its result and constants alone, up to the sine or cosine.
    """
    found = {node for node in model.graph if node.op_type in SUMS}
    for node in filter(_floats, model.graph):
        values = [value for value in node.inputs if value is not None and value.dtype in FLOATS]
        sources = [value.producer() for value in values if not value.is_initializer()]
        if sources:
            counts = all(source in found and source.op_type not in PERIODIC for source in sources)
        elif node.op_type == "Cast":
            counts = node.inputs[0].dtype.is_integer()
        else:
            counts = not values  # a source of floats, whose type is in an attribute
        if counts:
            found.add(node)
    return found


def release(tensor: ir.TensorProtocol) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # its mapping of the data file


def session_of(model: ir.Model, folder: Path, *, fold: bool = False):
    """`model`, whose weights lie in `folder`, as it is: no cast is dropped, no weight repacked. With `fold`, for small
    graphs of float32, what depends on weights alone is computed once."""
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_AND_WORSE
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if fold else levels.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # that of the file
    options.enable_cpu_mem_arena = fold
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    content = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
