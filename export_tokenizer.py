"""Export a Parakeet-TDT checkpoint's tokenizer for ONNX Runtime GenAI and Hugging Face.

In:   a NeMo checkpoint, by its Hugging Face name or as a .nemo file. Only its SentencePiece model is read; neither NeMo
      nor torch is needed.
Out:  in --output_dir
        tokenizer.json         a Hugging Face Unigram tokenizer: SentencePiece's pieces and scores, the blank last
        tokenizer_config.json  the class by which ONNX Runtime GenAI chooses its reader
        vocab.txt              one piece a line, in id order, the blank last

    python export_tokenizer.py --model_name nvidia/parakeet-tdt-0.6b-v3 --output_dir ./onnx_models

Unknown, control and user-defined pieces (`<|en|>`) and the blank are marked special: a transcript never shows them.
Before anything is written, id sequences that hold every piece are decoded with SentencePiece and with the new
tokenizer.json; a difference is an error (exit status 1).
"""

import argparse
import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from common import console, tokenizer
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
    checkpoint = find_checkpoint(args.model_name, args.revision)
    model = read_tokenizer(checkpoint)
    proto = tokenizer.parse_model(model)
    content = tokenizer.tokenizer_json(proto)
    sequences = tokenizer.probe_sequences(proto)
    check_decoding(model, content, sequences)
    stages.report("tokenizer", *_measured(content), f"{len(sequences)} sequences decode like SentencePiece")

    require_free(DISK_FACTOR * len(json.dumps(content)), args.output_dir)
    with staged_folder(args.output_dir) as stage:
        write_json(stage / "tokenizer.json", content)
        write_json(stage / "tokenizer_config.json", tokenizer.tokenizer_config(proto))
        (stage / "vocab.txt").write_text(tokenizer.vocab_text(proto), encoding="utf-8", newline="\n")
        source = source_record(checkpoint, args.model_name, revision=args.revision)
        write_manifest(stage, read_manifest(args.output_dir), "tokenizer", {"source": source})
        write_card(stage, args.output_dir, GENAI)
    stages.report("tokenizer.json", "tokenizer_config.json", "vocab.txt", "manifest.json", CARD)
    print(f"wrote {args.output_dir}; next: python optimize_encoder.py --model_dir {args.output_dir}")


def check_decoding(model: bytes, content: dict, sequences: list[list[int]]) -> None:
    """Decode `sequences` with SentencePiece, special ids dropped, and with `content`, a tokenizer.json.

    Raises CheckError at the first sequence whose texts differ.
    """
    processor = SentencePieceProcessor(model_proto=model)
    exported = Tokenizer.from_str(json.dumps(content))
    special = {token["id"] for token in content["added_tokens"]}
    for ids in sequences:
        wanted = processor.decode([index for index in ids if index not in special])
        found = exported.decode(ids)
        if found != wanted:
            raise console.CheckError(f"tokenizer.json decodes {ids} to {found!r}, SentencePiece to {wanted!r}")


def _measured(content: dict) -> tuple[str, ...]:
    pieces = len(content["model"]["vocab"])
    num_bytes = 256 if content["model"]["byte_fallback"] else 0
    return f"{pieces} pieces", f"{len(content['added_tokens'])} special", f"{num_bytes} bytes"


if __name__ == "__main__":
    raise SystemExit(main())
