"""Several optimized folders of one export under stress, beside the export and NeMo, in one run.

    python -m benchmarks.stress --model_dir onnx_models --optimized rtn int8 --manifest samples/manifest.jsonl

Out: what test_real_speech.py --stress prints, then a markdown table: words lost / added / changed against the texts, in
parentheses the points of words missed beyond float32's, and the transcripts without a word where there are any. Each
engine is named after its folder, the exported one float32. A run of all conditions is long, so --stress chooses kinds;
separate runs of several kinds have the same results as one run of all.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from benchmarks.bench import machine
from common.checkpoint.find import find_checkpoint
from common.cli import quiet_libraries
from common.evaluate.engines import OpenFolder, genai_engine, library_engine, onnx_engine
from common.evaluate.stress import FLOAT32, KINDS, StressOptions, StressTest
from common.folder import write_json
from common.run.audio import read_clips
from common.run.reference import Nemo


def markdown(test: StressTest) -> str:
    """A line for each condition and a column for each engine that is given every take."""
    names = [engine.name for engine in test.engines]
    lines = [["condition", *names], ["---"] * (len(names) + 1)]
    for condition, rows in itertools.groupby(test.rows(), key=lambda row: row["condition"]):
        by_engine = {row["engine"]: row for row in rows}
        lines.append([condition, *(_cell(by_engine[name]) for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any]) -> str:
    text, empty = row["text"], row["windows"]["empty"]
    points = "" if row["points"] is None else f" ({row['points']:+.1f})"
    return f"{text['lost']} / {text['added']} / {text['changed']}{points}{f', {empty} empty' if empty else ''}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="exported folder")
    parser.add_argument("--optimized", type=Path, nargs="+", required=True, help="folders optimized from it")
    parser.add_argument("--manifest", type=Path, required=True, help="clips with texts")
    parser.add_argument("--model_name", type=Path, help="the .nemo file, for a column of NeMo, which is slow")
    parser.add_argument("--genai", action="store_true", help="columns of GenAI too")
    parser.add_argument("--stress", nargs="*", choices=KINDS, default=(), metavar="KIND", help="kinds (all)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write every transcript there")
    args = parser.parse_args(argv)
    quiet_libraries()
    exported = OpenFolder(args.model_dir)
    engines = [library_engine(Nemo(find_checkpoint(str(args.model_name)).load_model()))] if args.model_name else []
    for name, folder in {FLOAT32: exported, **{path.name: OpenFolder(path) for path in args.optimized}}.items():
        engines.append(onnx_engine(name, folder))
        if args.genai:
            engines.append(genai_engine(f"{name}, GenAI", folder))
    test = StressTest(
        engines,
        exported.genai,
        exported,
        read_clips(args.manifest, with_text=True),
        StressOptions(stress=args.stress, seed=args.seed),
        judged=args.optimized[0].name,
    ).run()
    print(f"\n{machine()}\n\n{markdown(test)}")
    if args.json:
        write_json(args.json, test.as_json())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
