"""The ONNX contract, declared once: each graph's file, tensors, axes, and the names that each runtime has for them.

Axes, in docstrings and at line ends throughout:
    B batch · M mel bins · T mel frames (10 ms) · S encoder frames (80 ms) · D encoder width · H prediction width ·
    L LSTM layers · U target positions · V tokens including blank · K durations.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# The largest |ONNX - NeMo| in encoder outputs and logits that float32 arithmetic in another order of operations can
# explain. The values are of size 1 to 100; measured: 2e-5 on the tiny checkpoint, 5e-6 on a random model of 24 layers.
PARITY_TOLERANCE = 1e-3
# For float16 graphs, relative to the largest value: each operator's result is rounded by up to 5e-4 of its size, and
# the roundings of all layers add up; measured on the tiny checkpoint: 6e-4 to 2e-3.
FLOAT16_TOLERANCE = 2e-2
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
DYNAMIC_AXES = {"B": "batch", "T": "time", "S": "frames", "U": "targets"}


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph."""

    name: str  # in ONNX
    axes: tuple[str | int, ...]  # an int is a fixed size
    genai_key: str = ""  # in genai_config.json
    dtype: str = "float32"
    of: str = ""  # in a View: the name of the part's tensor, where it differs

    @property
    def source(self) -> str:
        """The name of the tensor in the graph that a View is made from."""
        return self.of or self.name


@dataclass(frozen=True)
class Graph:
    """One ONNX file, beside which the weights of an encoder may be in a data file; other graphs always hold theirs."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    genai_section: str = ""

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"

    @property
    def data_file(self) -> str:
        return f"{self.file}.data"

    @property
    def files(self) -> tuple[str, str]:
        """The names of its files; there may be no second one."""
        return self.file, self.data_file

    def bytes_in(self, folder: Path) -> int:
        """The size of the graph and its weights in `folder`."""
        return sum((folder / name).stat().st_size for name in self.files if (folder / name).is_file())

    @property
    def input_names(self) -> list[str]:
        return [tensor.name for tensor in self.inputs]

    @property
    def output_names(self) -> list[str]:
        return [tensor.name for tensor in self.outputs]

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Tensor name → axis index → symbolic name, for the axes whose size a caller chooses.

        This is the form that torch.onnx.export expects.
        """
        return {
            tensor.name: {i: DYNAMIC_AXES[axis] for i, axis in enumerate(tensor.axes) if axis in DYNAMIC_AXES}
            for tensor in (*self.inputs, *self.outputs)
        }


@dataclass(frozen=True)
class View(Graph):
    """One graph as another runtime expects it, or several in one file.

    Each tensor is a tensor of one of the parts, under another name, with its axes in another order, or of another type.
    An input of a part that is an output of an earlier part is connected to it.
    """

    parts: tuple[Graph, ...] = ()

    def part(self, source: str) -> Tensor:
        """The declaration of the input or output called `source` of one of the parts."""
        return next(tensor for part in self.parts for tensor in (*part.inputs, *part.outputs) if tensor.name == source)


ENCODER = Graph(
    "encoder",
    (
        Tensor("audio_signal", ("B", "M", "T"), "audio_features"),
        Tensor("length", ("B",), "input_lengths", "int64"),
    ),
    (
        Tensor("outputs", ("B", "D", "S"), "encoder_outputs"),
        Tensor("encoded_lengths", ("B",), "output_lengths", "int64"),
    ),
    "encoder",
)
# GenAI feeds one token at a time (U = 1) and asks for the length back.
DECODER = Graph(
    "decoder",
    (
        Tensor("targets", ("B", "U"), "targets", "int64"),
        Tensor("target_length_orig", ("B",), "targets_length", "int64"),
        Tensor("h_in", ("L", "B", "H"), "lstm_hidden_state"),
        Tensor("c_in", ("L", "B", "H"), "lstm_cell_state"),
    ),
    (
        Tensor("decoder_output", ("B", "H", "U"), "outputs"),
        Tensor("target_length", ("B",), "outputs_length", "int64"),
        Tensor("h_out", ("L", "B", "H"), "lstm_hidden_state"),
        Tensor("c_out", ("L", "B", "H"), "lstm_cell_state"),
    ),
    "decoder",
)
JOINT = Graph(
    "joint",
    (
        Tensor("encoder_output", ("B", "S", "D"), "encoder_outputs"),
        Tensor("decoder_output", ("B", "U", "H"), "decoder_outputs"),
    ),
    # The first V logits are tokens, blank the last of them; the K after them are durations.
    (Tensor("joint_output", ("B", "S", "U", "V+K"), "logits"),),
    "joiner",
)
GRAPHS = (ENCODER, DECODER, JOINT)
GENAI_CONFIG = "genai_config.json"
AUDIO_PROCESSOR_CONFIG = "audio_processor_config.json"


class Role(StrEnum):
    """What a weight matrix of the encoder is for. The value names its module in common/export/wrappers.py, so in the
    graph it is called `subsampling.out.weight`, `layers.3.attention.query.weight`, … or `projection.weight`."""

    SUBSAMPLING_OUT = "subsampling.out"
    FEED_FORWARD1_EXPAND = "feed_forward1.expand"
    FEED_FORWARD1_PROJECT = "feed_forward1.project"
    ATTENTION_QUERY = "attention.query"
    ATTENTION_KEY = "attention.key"
    ATTENTION_VALUE = "attention.value"
    ATTENTION_POSITION_SINE = "attention.position_sine"
    ATTENTION_POSITION_COSINE = "attention.position_cosine"
    ATTENTION_OUT = "attention.out"
    CONVOLUTION_EXPAND = "convolution.expand"
    CONVOLUTION_PROJECT = "convolution.project"
    FEED_FORWARD2_EXPAND = "feed_forward2.expand"
    FEED_FORWARD2_PROJECT = "feed_forward2.project"
    PROJECTION = "projection"


# A checkpoint may lack these: subsampling by stacked frames has another matrix, and few encoders end in a projection.
ROLES_OUTSIDE_LAYERS = (Role.SUBSAMPLING_OUT, Role.PROJECTION)


@dataclass(frozen=True)
class EncoderWeight:
    """Role of a weight matrix, and the layer it belongs to; None outside the layers."""

    role: Role
    layer: int | None = None


def encoder_weight(name: str) -> EncoderWeight:
    """Role and layer of the weight matrix called `name` in the encoder's graph. Raises ValueError for other names."""
    match = re.fullmatch(r"(?:layers\.(?P<layer>\d+)\.)?(?P<role>.+)\.weight", name)
    if match and match["role"] in tuple(Role) and (match["role"] in ROLES_OUTSIDE_LAYERS) == (match["layer"] is None):
        return EncoderWeight(Role(match["role"]), None if match["layer"] is None else int(match["layer"]))
    raise ValueError(
        f"the encoder weight {name} has no role in common/contract.py, as layers.0.attention.query.weight has; export "
        "the checkpoint again with this version"
    )
