"""Run a model folder end to end in ONNX Runtime GenAI and compare it with plain ONNX Runtime.

In: a folder that export_parakeet_to_onnx.py and export_tokenizer.py, or optimize_encoder.py, have written; a clip.
Out: one line for each of four steps: GenAI loads the folder; it transcribes the clip; the tokenizer encodes and decodes
the transcript without losing a word; three ONNX Runtime sessions with the greedy TDT loop of common/run/decode.py
transcribe the same features again. It exits with status 1 if the two transcripts differ in one token, or are empty.

    python test_e2e.py
"""

import argparse
import re
from pathlib import Path

from common.cli import MODEL_DIR_HELP, CheckError, Parser, Stages, default_model_dir, run
from common.folder import verify_files
from common.layouts import genai_folder
from common.layouts.genai import GENAI
from common.run.config import RuntimeConfig
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime

SAMPLE = Path(__file__).resolve().parent / "samples" / "clips" / "029_hibari.flac"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    parser.add_argument("--model_dir", type=Path, help=MODEL_DIR_HELP)
    parser.add_argument("--audio", type=Path, default=SAMPLE, help="a clip of speech (a bundled one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run(_test, parse_args(argv))


def _test(args: argparse.Namespace) -> None:
    folder = genai_folder(args.model_dir or default_model_dir())
    stages = Stages(4, verbose=args.verbose)
    stages.begin(f"GenAI loads {folder}")
    listed = verify_files(folder, (*GENAI.graph_files, *GENAI.vocabulary))
    GENAI.check_one_checkpoint(folder)
    samples = RuntimeConfig.read(folder).read_audio(args.audio)
    genai = GenAI(folder)
    checksums = f"{listed} files have the checksums of its manifest" if listed else "the folder has no checksums"
    stages.end(checksums)

    stages.begin(f"GenAI transcribes {args.audio.name}")
    tokens = genai.transcribe(samples)
    if not tokens:
        raise CheckError(f"GenAI gives no token for {args.audio}: there is no speech in it, or the model is broken")
    text = genai.text(tokens)
    if not text:
        raise CheckError(f"the text of the tokens {tokens} is empty; export the tokenizer again")
    seconds = len(samples) / genai.config.sample_rate
    stages.end(f"{len(tokens)} tokens from {seconds:.1f} s of audio", repr(text))

    stages.begin("tokenizer")
    check_tokenizer(genai, folder, tokens)
    stages.end("GenAI, tokenizer.json and vocab.txt give one text, also after encoding it")

    stages.begin("plain ONNX Runtime")
    expected = OnnxRuntime(folder).transcribe(genai.features(samples)).tokens
    if tokens != expected:
        raise CheckError(f"GenAI gives the tokens {tokens}, and plain ONNX Runtime {expected}")
    stages.end(f"gives the same {len(tokens)} tokens")


def check_tokenizer(genai: GenAI, folder: Path, tokens: list[int]) -> None:
    """Raise CheckError unless GenAI and Hugging Face's `tokenizers` give these tokens the same text, this text has the
    words that vocab.txt spells (which does not say what is hidden), and encoding and decoding it keeps every word.

    Words are compared, not spaces: GenAI's encoder merges several spaces into one, and a `▁` piece before a piece that
    begins with `▁` makes two spaces.
    """
    from tokenizers import Tokenizer

    text = genai.text(tokens)
    exported = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens).strip()
    if exported != text:
        raise CheckError(f"GenAI shows the tokens {tokens} as {text!r}, and tokenizer.json as {exported!r}")
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    spelt = spell([pieces[token] for token in tokens])
    if spelt.split() != text.split():
        raise CheckError(
            f"GenAI shows the tokens {tokens} as {text!r}, and vocab.txt as {spelt!r}; export the tokenizer again"
        )
    encoded = [int(token) for token in genai.tokenizer.encode(text)]
    if genai.text(encoded).split() != text.split():
        raise CheckError(f"{text!r} encodes to {encoded}, which decodes to {genai.text(encoded)!r}")


def spell(pieces: list[str]) -> str:
    """The text of SentencePiece's pieces, with bytes merged, without marks such as `<|en|>`, `<unk>` and `[noise]`."""
    raw = b""
    for piece in pieces:
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            raw += bytes([int(piece[3:5], 16)])
        elif not re.fullmatch(r"▁?(<.+>|\[.+\])", piece):
            raw += piece.replace("▁", " ").encode()
    return raw.decode("utf-8", errors="replace")


if __name__ == "__main__":
    raise SystemExit(main())
