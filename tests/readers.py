"""An exported tokenizer in the programs that read it, for tests to compare with SentencePiece."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
from onnx import TensorProto, helper, numpy_helper
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from common.checkpoint.tokenizer import Piece, parse_model, tokenizer_config, tokenizer_json
from common.folder import write_json


class Readers:
    """One exported tokenizer as SentencePiece, `tokenizers` and ORT GenAI (its tokenizer, its processor) read it.

    The model alone decides what SentencePiece is asked for, not the code that writes the exported files.
    """

    def __init__(self, model: bytes, folder: Path):
        self.proto = parse_model(model)
        self.sentencepiece = SentencePieceProcessor(model_proto=model)
        write_json(folder / "tokenizer.json", tokenizer_json(self.proto))
        write_json(folder / "tokenizer_config.json", tokenizer_config(self.proto))
        write_stub_model(folder, vocab_size=len(self.proto.pieces) + 1)
        self.hugging_face = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.genai_model = og.Model(str(folder))
        self.genai = og.Tokenizer(self.genai_model)
        self.processor = self.genai_model.create_multimodal_processor()
        self.blank = len(self.proto.pieces)
        self.no_text = {self.blank, self.sentencepiece.unk_id(), *map(self.id, self.marks)}

    @property
    def marks(self) -> list[str]:
        """User-defined pieces in brackets."""
        names = [piece.piece for piece in self.proto.pieces if piece.type == Piece.USER_DEFINED]
        return [name for name in names if (bare := name.lstrip("▁"))[1:-1] and bare[0] + bare[-1] in ("<>", "[]")]

    def decode(self, ids: list[int]) -> str:
        """SentencePiece's text for these ids without marks, the unknown piece and the blank; all readers show it."""
        expected = self.sentencepiece.decode([index for index in ids if index not in self.no_text])
        assert self.shown(ids) == expected, ids
        return expected

    def shown(self, ids: list[int]) -> str:
        """The text that the readers of the exported files show."""
        text = self.hugging_face.decode(ids)
        assert self.genai.decode(np.array(ids, np.int32)) == text, ids
        assert self.processor.decode(np.array(ids, np.int32)) == text, ids
        return text

    def id(self, piece: str) -> int:
        index = self.sentencepiece.piece_to_id(piece)
        assert self.sentencepiece.id_to_piece(index) == piece
        return index


def write_stub_model(folder: Path, vocab_size: int) -> None:
    """Write the least that og.Model loads as parakeet_tdt: three graphs of constants and a config."""
    f32, i64, width = TensorProto.FLOAT, TensorProto.INT64, 4
    state = [1, 1, width]
    graphs = {
        "encoder": (
            {"audio_signal": (f32, [1, 8, "T"]), "length": (i64, [1])},
            {"outputs": (f32, [1, width, 1]), "encoded_lengths": (i64, [1])},
        ),
        "decoder": (
            {"targets": (i64, [1, 1]), "target_length": (i64, [1]), "h_in": (f32, state), "c_in": (f32, state)},
            {"outputs": (f32, [1, width, 1]), "lengths": (i64, [1]), "h_out": (f32, state), "c_out": (f32, state)},
        ),
        "joiner": (
            {"encoder_output": (f32, state), "decoder_output": (f32, state)},
            {"logits": (f32, [1, 1, 1, vocab_size + 2])},
        ),
    }
    roles = {
        "encoder": (("audio_features", "input_lengths"), ("encoder_outputs", "output_lengths")),
        "decoder": (
            ("targets", "targets_length", "lstm_hidden_state", "lstm_cell_state"),
            ("outputs", "outputs_length", "lstm_hidden_state", "lstm_cell_state"),
        ),
        "joiner": (("encoder_outputs", "decoder_outputs"), ("logits",)),
    }
    model = {"type": "parakeet_tdt", "vocab_size": vocab_size, "context_length": 100, "tdt_durations": [0, 1]}
    model |= {"blank_id": vocab_size - 1, "decoder_start_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1}
    model |= {"sample_rate": 16000, "num_mels": 8, "fft_size": 512, "hop_length": 160, "win_length": 400}
    model |= {"preemph": 0.97, "log_eps": 5.96e-8, "norm_eps": 1e-5, "subsampling_factor": 8}
    model |= {"chunk_samples": 12800, "left_context_samples": 0, "right_context_samples": 0, "max_symbols_per_step": 10}
    for name, (inputs, outputs) in graphs.items():
        write_constants(folder / f"{name}.onnx", inputs, outputs)
        model[name] = {"filename": f"{name}.onnx"}
        if name != "joiner":
            model[name] |= {"hidden_size": width, "num_hidden_layers": 1}
        model[name] |= {side: dict(zip(roles[name][index], graphs[name][index], strict=True))
                        for index, side in enumerate(("inputs", "outputs"))}  # fmt: skip
    write_json(folder / "genai_config.json", {"model": model, "search": {"max_length": 100}})


def write_constants(path: Path, inputs: dict, outputs: dict) -> None:
    """An ONNX graph that ignores its inputs and returns zeros. Both map a name to (element type, shape)."""
    values = {name: np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind)) for name, (kind, shape) in outputs.items()}
    nodes = [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values[name])) for name in values]
    sides = [[helper.make_tensor_value_info(name, *info) for name, info in side.items()] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, path.stem, *sides)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
