"""Run a model folder end to end in ONNX Runtime GenAI and check it against a baseline on plain ONNX Runtime.

In: a folder that export_parakeet_to_onnx.py and export_tokenizer.py, or optimize_encoder.py, have written; a clip.
Out: one line a stage. GenAI loads the folder, its tokenizer survives a round trip, and the clip is transcribed twice
from the same features: by GenAI, and by three ONNX Runtime sessions with the greedy TDT loop of common/decode.py. Exit
status 1 when the two disagree in one token, or the transcript is empty.

    python test_e2e.py
"""

import argparse
import re
from pathlib import Path

from common.console import CheckError, Parser, Stages, run
from common.files import MODEL_DIR_HELP, default_model_dir, verify_files
from common.graphs import GRAPH_FILES
from common.identity import check_one_checkpoint
from common.layouts import genai_folder
from common.runtime import GenAI, RawOrt, RuntimeConfig
from common.tokenizer import TOKENIZER_FILES

SAMPLE = Path(__file__).resolve().parent / "samples" / "clips" / "029_hibari.flac"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_dir", type=Path, help=MODEL_DIR_HELP)
    parser.add_argument("--audio", type=Path, default=SAMPLE, help="a clip that holds speech (a bundled one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run(_test, parse_args(argv))


def _test(args: argparse.Namespace) -> None:
    folder = genai_folder(args.model_dir or default_model_dir())
    stages = Stages(4)
    listed = verify_files(folder, (*GRAPH_FILES, *TOKENIZER_FILES))
    check_one_checkpoint(folder)
    samples = RuntimeConfig.read(folder).read_audio(args.audio)
    genai = GenAI(folder)
    stages.report("GenAI loads", str(folder), f"{listed} files are those of its manifest" if listed else "no checksums")

    tokens = genai.transcribe(samples)
    if not tokens:
        raise CheckError(f"GenAI decoded no token from {args.audio}; wanted a transcript of a clip that holds speech")
    text = genai.text(tokens)
    if not text:
        raise CheckError(
            f"expected tokens that spell words, got {tokens}, whose text is empty; export the tokenizer again"
        )
    stages.report("GenAI hears", f"{len(tokens)} tokens from {len(samples) / genai.config.sample_rate:.1f} s",
                  repr(text))  # fmt: skip

    check_tokenizer(genai, folder, tokens)
    stages.report("tokenizer", "GenAI and tokenizer.json agree, and show all that vocab.txt spells; text → ids → text "
                  "keeps every word")  # fmt: skip

    baseline = RawOrt(folder).transcribe(genai.features(samples)).tokens
    check_same_tokens(tokens, baseline)
    stages.report("raw ONNX", f"the same {len(baseline)} tokens")


def check_tokenizer(genai: GenAI, folder: Path, tokens: list[int]) -> None:
    """GenAI and Hugging Face's `tokenizers` give these ids one text, and its words survive encoding and decoding; and
    it shows the pieces of vocab.txt, which says nothing of which to hide.

    Spaces aside: GenAI's encoder makes one of several, which a lone `▁` before a piece that begins with one shows.
    Raises CheckError.
    """
    from tokenizers import Tokenizer

    text = genai.text(tokens)
    exported = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens).strip()
    if exported != text:
        raise CheckError(f"tokens {tokens} are {text!r} in GenAI, {exported!r} by tokenizer.json")
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    spelt = spell([pieces[token] for token in tokens])
    if spelt.split() != text.split():
        raise CheckError(f"tokens {tokens} are {text!r} in GenAI, {spelt!r} by vocab.txt; export the tokenizer again")
    encoded = [int(token) for token in genai.tokenizer.encode(text)]
    if genai.text(encoded).split() != text.split():
        raise CheckError(f"{text!r} encodes to {encoded}, which decodes to {genai.text(encoded)!r}")


def spell(pieces: list[str]) -> str:
    """The text of SentencePiece's pieces: marks such as `<|en|>`, `<unk>` and `[noise]` left out, bytes merged."""
    raw = b""
    for piece in pieces:
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            raw += bytes([int(piece[3:5], 16)])
        elif not re.fullmatch(r"▁?(<.+>|\[.+\])", piece):
            raw += piece.replace("▁", " ").encode()
    return raw.decode("utf-8", errors="replace")


def check_same_tokens(found: list[int], baseline: list[int]) -> None:
    """Raises CheckError showing both sequences."""
    if found != baseline:
        raise CheckError(f"GenAI and the raw ONNX baseline differ; GenAI: {found}; baseline: {baseline}")


if __name__ == "__main__":
    raise SystemExit(main())
