"""Export a Parakeet-TDT checkpoint's tokenizer for ONNX Runtime GenAI and Hugging Face.

In:   a NeMo checkpoint, by its Hugging Face name or as a .nemo file. Only its SentencePiece model is read; neither NeMo
      nor torch is needed.
Out:  in --output_dir
        tokenizer.json         a Hugging Face Unigram tokenizer: SentencePiece's pieces and scores, the blank last
        tokenizer_config.json  the class by which ONNX Runtime GenAI chooses its reader
        vocab.txt              one piece a line, in id order, the blank last

    python export_tokenizer.py --model_name nvidia/parakeet-tdt-0.6b-v3 --output_dir ./onnx_models

Unknown and control pieces, user-defined marks (`<|en|>`, `[noise]`) and the blank are marked special: a transcript
never shows them. All other pieces are text, user-defined ones too, such as the digits of v3. Before anything is
written, every piece is decoded with SentencePiece and with the new tokenizer.json, alone and among others; a difference
is an error (exit status 1).
"""

import argparse
import json
from pathlib import Path

# First of all, since a package that is missing below is then reported in one line (common/__init__.py).
from common import console

# isort: split

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from common import tokenizer
from common.card import CARD, write_card
from common.download import DEFAULT_MODEL, REVISION_HELP, find_checkpoint
from common.files import (
    check_output_dir,
    read_manifest,
    require_free,
    staged_folder,
    write_json,
    write_manifest,
)
from common.identity import check_name_for_graphs, check_tokenizer_for_graphs
from common.layouts import GENAI, genai_folder
from common.model import read_tokenizer, source_record

# The files beside tokenizer.json, as a multiple of its compact text: its own indentation, vocab.txt, the manifest.
DISK_FACTOR = 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = console.Parser(__doc__)
    parser.add_argument(
        "--model_name", default=DEFAULT_MODEL, help=f"Hugging Face name or .nemo file (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--revision", help=REVISION_HELP)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("onnx_models"), help="model folder to write to (default: ./onnx_models)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return console.run(_export, parse_args(argv))


def _export(args: argparse.Namespace) -> None:
    check_output_dir(args.output_dir)
    args.output_dir = genai_folder(args.output_dir)
    stages = console.Stages(2)
    check_name_for_graphs(args.output_dir, args.model_name)
    checkpoint = find_checkpoint(args.model_name, args.revision)
    model = read_tokenizer(checkpoint)
    proto = tokenizer.parse_model(model)
    source = source_record(checkpoint, args.model_name, revision=args.revision)
    check_tokenizer_for_graphs(args.output_dir, source, len(proto.pieces) + 1)
    content = tokenizer.tokenizer_json(proto)
    sequences = [ids for length in (1, 32) for ids in tokenizer.probe_sequences(proto, length)]
    check_decoding(model, content, sequences)
    stages.report("tokenizer", *_measured(content), f"{len(sequences)} sequences decode like SentencePiece")

    require_free(DISK_FACTOR * len(json.dumps(content)), args.output_dir)
    with staged_folder(args.output_dir) as stage:
        write_json(stage / "tokenizer.json", content)
        write_json(stage / "tokenizer_config.json", tokenizer.tokenizer_config(proto))
        (stage / "vocab.txt").write_text(tokenizer.vocab_text(proto), encoding="utf-8", newline="\n")
        write_manifest(stage, read_manifest(args.output_dir), "tokenizer", {"source": source})
        write_card(stage, args.output_dir, GENAI)
    stages.report("tokenizer.json", "tokenizer_config.json", "vocab.txt", "manifest.json", CARD)
    following = console.Command("python optimize_encoder.py --model_dir {}").format(args.output_dir)
    print(f"wrote {args.output_dir}; next: {following}")


def check_decoding(model: bytes, content: dict, sequences: list[list[int]]) -> None:
    """Decode `sequences` with SentencePiece and with `content`, a tokenizer.json, which has no say in the first.

    SentencePiece is given every id but three kinds: it would show a mark as it is spelt, and the unknown piece as
    ` ⁇ `, a sign for text that the vocabulary lacks, and neither is text; the blank is none of its ids. It is given
    control pieces, for which it shows nothing itself. Raises CheckError at the first sequence whose texts differ.
    """
    processor = SentencePieceProcessor(model_proto=model)
    pieces = tokenizer.ModelProto.FromString(model).pieces
    left_out = {len(pieces), processor.unk_id(), *(index for index, piece in enumerate(pieces) if _is_mark(piece))}
    exported = Tokenizer.from_str(json.dumps(content))
    for ids in sequences:
        expected = processor.decode([index for index in ids if index not in left_out])
        got = exported.decode(ids)
        if got != expected:
            raise console.CheckError(f"tokenizer.json decodes {ids} to {got!r}, SentencePiece to {expected!r}")


def _is_mark(piece: tokenizer.Piece) -> bool:
    """Whether a user-defined piece is spelt `<…>` or `[…]`; apart from `special_ids`, which is checked with it."""
    text = piece.piece.removeprefix(tokenizer.SPACE)
    return piece.type == piece.USER_DEFINED and len(text) > 2 and text[0] + text[-1] in ("<>", "[]")


def _measured(content: dict) -> tuple[str, ...]:
    pieces = len(content["model"]["vocab"])
    num_bytes = 256 if content["model"]["byte_fallback"] else 0
    return f"{pieces} pieces", f"{len(content['added_tokens'])} special", f"{num_bytes} bytes"


if __name__ == "__main__":
    raise SystemExit(main())
