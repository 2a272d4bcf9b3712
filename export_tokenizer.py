"""Export a Parakeet-TDT checkpoint's tokenizer for ONNX Runtime GenAI and Hugging Face.

In: a checkpoint, by its Hugging Face name or its path. Only its tokenizer is read, without NeMo and torch.
Out: in --output_dir
    tokenizer.json         a Hugging Face Unigram tokenizer: SentencePiece's pieces and scores, the blank last
    tokenizer_config.json  the class by which ONNX Runtime GenAI chooses its reader
    vocab.txt              one piece a line, in id order, the blank last
    manifest.json, README.md  what the folder holds, extended

    python export_tokenizer.py --model_name nvidia/parakeet-tdt-0.6b-v3 --output_dir ./onnx_models

Unknown and control pieces, user-defined marks (`<|en|>`, `[noise]`) and the blank are special: no transcript shows
them. All other pieces are text, such as the user-defined digits of v3. Before anything is written, every piece is
decoded with SentencePiece and with the new tokenizer.json, alone and among others; a difference is an error (exit
status 1).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Imported first, so that a package that is missing below is reported in one line (common/__init__.py).
from common.cli import OPTIMIZE_COMMAND, TEST_COMMAND, CheckError, Parser, Stages, run

# isort: split

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

from common.checkpoint.find import add_checkpoint_flags, find_checkpoint
from common.checkpoint.hub import hub_name
from common.checkpoint.tokenizer import (
    PROBE_LENGTHS,
    SPACE,
    Piece,
    probe_sequences,
    tokenizer_config,
    tokenizer_json,
    vocab_text,
)
from common.folder import MANIFEST, check_output_dir, is_float16, read_manifest, staged_folder, write_json
from common.layouts import genai_folder
from common.layouts.genai import GENAI
from common.layouts.layout import check_tokenizer_of_graphs
from common.report.card import CARD, finish_folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("onnx_models"), help="model folder to write to (./%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return run(_export, parse_args(argv))


def _export(args: argparse.Namespace) -> None:
    check_output_dir(args.output_dir)
    folder = genai_folder(args.output_dir)
    if name := hub_name(args.model_name):
        check_tokenizer_of_graphs(folder, {"name": name})
    stages = Stages(2, verbose=args.verbose)
    stages.begin("tokenizer")
    checkpoint = find_checkpoint(args.model_name, args.revision, args.checkpoint_format)
    proto = checkpoint.tokenizer
    source = checkpoint.record()
    check_tokenizer_of_graphs(folder, source)
    content = tokenizer_json(proto)
    sequences = [ids for length in PROBE_LENGTHS for ids in probe_sequences(proto, length)]
    check_decoding(checkpoint.sentencepiece, content, sequences)
    stages.end(
        f"{len(content['model']['vocab'])} pieces",
        f"{len(content['added_tokens'])} special",
        f"{256 if content['model']['byte_fallback'] else 0} bytes",
        f"{len(sequences)} sequences decode like SentencePiece",
    )
    stages.begin("files")
    manifest = read_manifest(folder)
    with staged_folder(folder) as staging:
        write_json(staging / "tokenizer.json", content)
        write_json(staging / "tokenizer_config.json", tokenizer_config(proto))
        (staging / "vocab.txt").write_text(vocab_text(proto), encoding="utf-8", newline="\n")
        finish_folder(staging, folder, GENAI, manifest, "tokenizer", {"source": source})
    stages.end(*GENAI.vocabulary, MANIFEST, CARD)
    following = TEST_COMMAND if is_float16(manifest) else OPTIMIZE_COMMAND
    print(f"wrote {folder}; next: {following.format(args.output_dir)}")


def check_decoding(model: bytes, content: dict[str, Any], sequences: Sequence[list[int]]) -> None:
    """Decode `sequences` with the SentencePiece model and with `content`, a tokenizer.json; they share no code.

    SentencePiece is not given marks (it would show them as they are spelt), the unknown piece (it would show ` ⁇ `) and
    the blank (it has none). It is given control pieces, for which it shows nothing. Raises CheckError at the first
    sequence whose texts differ.
    """
    processor = SentencePieceProcessor(model_proto=model)
    pieces = ModelProto.FromString(model).pieces
    left_out = {len(pieces), processor.unk_id(), *(index for index, piece in enumerate(pieces) if _is_mark(piece))}
    exported = Tokenizer.from_str(json.dumps(content))
    for ids in sequences:
        expected = processor.decode([index for index in ids if index not in left_out])
        actual = exported.decode(ids)
        if actual != expected:
            raise CheckError(
                f"tokenizer.json decodes {ids} to {actual!r}, and SentencePiece to {expected!r}; please report it"
            )


def _is_mark(piece: Piece) -> bool:
    """Whether a user-defined piece is spelt `<…>` or `[…]`; independent of `special_ids`, which this helps to check."""
    text = piece.piece.removeprefix(SPACE)
    return piece.type == piece.USER_DEFINED and len(text) > 2 and text[0] + text[-1] in ("<>", "[]")


if __name__ == "__main__":
    raise SystemExit(main())
