"""What a change of structure must not change: the bytes of every file that the scripts make, and their interfaces.

    python -m tests.frozen --write build/frozen.json      before the change
    python -m tests.frozen --compare build/frozen.json    after it: exit status 1, and a line for each difference

The scripts run on the bundled checkpoint in both formats and on two random topologies: every runtime, precision and
quantization method, calibrated too. Recorded are the SHA-256 of each graph, data file, tokenizer and configuration, the
keys of `manifest.json`, of the report and of `--json`, and the flags in each script's help. Reports and model cards are
for people and are left out. The record is of one machine: sums of floats, and with them calibrated weights, may differ
on another. `--only TEXT` runs the recipes whose name contains TEXT; three minutes for all of them on two cores.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
TINY = SAMPLES / "parakeet-tdt-tiny.nemo"
MANIFEST = SAMPLES / "manifest.jsonl"
FOR_PEOPLE = {"README.md", "optimization_report.html"}
KEYS_ONLY = {"manifest.json", "optimization_report.json"}
SCRIPTS = ("export_parakeet_to_onnx", "export_tokenizer", "optimize_encoder", "test_e2e", "test_real_speech")
CALIBRATED = ("--calibration_manifest", str(MANIFEST))

EXPORTS = {  # name → (checkpoint, flags)
    "nemo/all": ("tiny", ["--runtime", "all"]),
    "nemo/verified": ("tiny", ["--chunk_seconds", "30.08", "--opset_version", "18"]),
    "nemo/fp16": ("tiny", ["--runtime", "all", "--precision", "fp16", "--skip_verify"]),
    "nemo/one script": ("tiny", ["--scripts", "latin", "--skip_verify"]),
    "transformers/all": ("transformers", ["--runtime", "all", "--skip_verify"]),
    "random/all": ("hybrid TDT-CTC", ["--runtime", "all", "--skip_verify"]),
    "random/fp16": ("biases", ["--precision", "fp16", "--skip_verify"]),
}
OPTIMIZATIONS = {  # name → flags; each on the GenAI folder of nemo/all
    "rtn": [],
    "rtn unfused": ["--skip_fusion"],
    "rtn 128 level 0": ["--block_size", "128", "--accuracy_level", "0"],
    "fusion alone": ["--skip_quantization"],
    "k_quant_mixed": ["--quant_method", "k_quant_mixed"],
    "k_quant_mixed calibrated": ["--quant_method", "k_quant_mixed", *CALIBRATED],
    "k_quant_mixed budget": ["--quant_method", "k_quant_mixed", "--size_budget_mb", "1.6", *CALIBRATED],
    "hqq": ["--quant_method", "hqq"],
    "int8": ["--quant_method", "int8"],
    "int8 calibrated": ["--quant_method", "int8", *CALIBRATED],
    "int8 full range, tokens": ["--quant_method", "int8", "--full_range", "--decoder_joint_precision", "int8"],
    "int8 full range calibrated": ["--quant_method", "int8", "--full_range", *CALIBRATED],
    "int8 in 4 bits": ["--quant_method", "int8", "--weight_bits", "4"],
    "int8 in 4 bits calibrated": ["--quant_method", "int8", "--weight_bits", "4", *CALIBRATED],
    "int8 mixed": ["--quant_method", "int8", "--size_budget_mb", "1.7", *CALIBRATED],
}  # fmt: skip
ALL_RUNTIMES = {  # on the folders of every runtime
    "nemo/all": {"int8, tokens": ["--quant_method", "int8", "--decoder_joint_precision", "int8"]},
    "transformers/all": {"rtn": []},
    "random/all": {
        "int8 calibrated": ["--quant_method", "int8", *CALIBRATED],
        "k_quant_mixed": ["--quant_method", "k_quant_mixed"],
    },
}


def key_paths(content: object, path: str = "") -> Iterator[str]:
    """The keys of JSON; entries of a list are one. Names that depend on the data (graphs, files, engines) are kept."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from key_paths(value, f"{path}.{key}")
    elif isinstance(content, list):
        for value in content:
            yield from key_paths(value, f"{path}[]")
    else:
        yield path


def key_digest(content: object) -> list[str]:
    return sorted(set(key_paths(content)))


def folder_record(folder: Path) -> dict[str, object]:
    record: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name in FOR_PEOPLE or ".cache" in path.parts:
            continue
        if path.name in KEYS_ONLY:
            record[name] = key_digest(json.loads(path.read_text()))
        else:
            record[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return record


def call(script: str, *argv: object) -> str:
    """Run a script in this process; return what it prints. Raises SystemExit where it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = importlib.import_module(script).main([str(argument) for argument in argv])
    if status:
        raise SystemExit(f"{script} {argv}: exit status {status}")
    return printed.getvalue()


def help_flags(script: str) -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(script).main(["--help"])
    return sorted(set(re.findall(r"--\w+", printed.getvalue())))


def do_not_measure_speed() -> None:
    """Speed takes two processes and seconds of runs; its keys in the report stay out of the record."""
    importlib.import_module("common.optimize").measure_speed = lambda *_: None


class Recipes:
    """Every recipe by name; each makes what it needs first."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def checkpoint(self, kind: str) -> Path:
        if kind == "tiny":
            return TINY
        path = self.work / kind
        if not path.exists():
            if kind == "transformers":
                from benchmarks.transformers_checkpoint import convert

                convert(TINY, path)
            else:
                from benchmarks.random_checkpoint import write_checkpoint
                from tests.helpers import TOPOLOGIES

                path = path.with_suffix(".nemo")
                if not path.exists():
                    write_checkpoint(path, next(topology for name, topology in TOPOLOGIES.items() if kind in name))
        return path

    def export(self, name: str) -> Path:
        folder = self.work / "exports" / name
        if not folder.exists():
            kind, flags = EXPORTS[name]
            checkpoint = self.checkpoint(kind)
            call("export_parakeet_to_onnx", "--model_name", checkpoint, "--output_dir", folder, *flags)
            tokenizer = folder / "genai" if "all" in flags else folder
            call("export_tokenizer", "--model_name", checkpoint, "--output_dir", tokenizer)
        return folder

    def optimize(self, source: Path, flags: list[str]) -> dict[str, object]:
        with tempfile.TemporaryDirectory(dir=self.work) as target:
            folder = Path(target) / "optimized"
            call("optimize_encoder", "--model_dir", source, "--output_dir", folder, *flags)
            return folder_record(folder)

    def speech_keys(self, name: str, *flags: str) -> list[str]:
        folder = self.work / "optimized for speech"
        if not folder.exists():
            call("optimize_encoder", "--model_dir", self.export("nemo/all") / "genai", "--output_dir", folder)
        result = self.work / f"{name}.json"
        call("test_real_speech", "--model_dir", folder, "--json", result, *flags)
        return key_digest(json.loads(result.read_text()))

    def all(self) -> dict[str, Callable[[], object]]:
        recipes: dict[str, Callable[[], object]] = {}
        for script in SCRIPTS:
            recipes[f"flags/{script}"] = lambda script=script: help_flags(script)
        for name in EXPORTS:
            recipes[f"export/{name}"] = lambda name=name: folder_record(self.export(name))
        for name, flags in OPTIMIZATIONS.items():
            recipes[f"optimize/genai/{name}"] = lambda flags=flags: self.optimize(
                self.export("nemo/all") / "genai", flags
            )
        for source, cases in ALL_RUNTIMES.items():
            for name, flags in cases.items():
                recipes[f"optimize/{source}/{name}"] = lambda source=source, flags=flags: self.optimize(
                    self.export(source), flags
                )
        speech = ("--manifest", str(MANIFEST))
        recipes["json/speech"] = lambda: self.speech_keys("speech", *speech, "--timestamps")
        recipes["json/stress"] = lambda: self.speech_keys("stress", *speech, "--skip_nemo", "--stress", "level", "join")
        return recipes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file to record to")
    parser.add_argument("--compare", type=Path, help="file to compare with")
    parser.add_argument("--only", default="", help="run the recipes whose name contains this")
    args = parser.parse_args()
    do_not_measure_speed()
    expected = json.loads(args.compare.read_text()) if args.compare else {}
    made: dict[str, object] = {}
    wrong = 0
    with tempfile.TemporaryDirectory() as work:
        for name, recipe in Recipes(Path(work)).all().items():
            if args.only not in name:
                continue
            made[name] = recipe()
            if args.compare:
                problems = list(differences(expected.get(name), json.loads(json.dumps(made[name]))))
                wrong += bool(problems)
                print(f"{'differs' if problems else 'equal':8}{name}", *problems, sep="\n    ", flush=True)
            else:
                print(f"recorded {name}", flush=True)
            if args.write:  # after each recipe, since all of them take minutes
                args.write.parent.mkdir(parents=True, exist_ok=True)
                args.write.write_text(json.dumps(made, indent=1))
    print(f"{len(made)} recipes, {wrong} that differ")
    return int(wrong > 0)


def differences(expected: object, actual: object) -> Iterator[str]:
    if expected == actual:
        return
    if isinstance(expected, dict) and isinstance(actual, dict):
        for name in sorted({*expected, *actual}):
            if expected.get(name) != actual.get(name):
                inner = list(differences(expected.get(name), actual.get(name)))
                yield f"{name}: {'; '.join(inner)}"
    elif isinstance(expected, list) and isinstance(actual, list):
        missing, added = sorted({*expected} - {*actual}), sorted({*actual} - {*expected})
        yield f"lost {missing}, gained {added}" if missing or added else "in another order"
    else:
        yield "not recorded" if expected is None else "no longer made" if actual is None else "other bytes"


if __name__ == "__main__":
    sys.exit(main())
