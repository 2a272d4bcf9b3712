"""Measure a published checkpoint on public speech: download both, run the five scripts, write a table.

    python -m benchmarks.published --model_name nvidia/parakeet-tdt-0.6b-v3
    python -m benchmarks.published --model_name moondream/parakeet-redux --clips all

In: names on Hugging Face; LibriSpeech test-other and FLEURS in five languages (benchmarks/published_speech.py).
Out: in WORK_DIR/OWNER--MODEL published.json, published.md (a section of docs/published.md as it is) and readme_rows.md;
what each script printed is in logs/.

The steps, each a script that runs as a user would run it, in a process of its own, or a short function:
    sources      the commit of the checkpoint, and the files of the speech
    speech       of each set the clips to measure, and others to calibrate on
    export       export_parakeet_to_onnx.py, export_tokenizer.py
    reference    test_real_speech.py of each set: NeMo (or transformers) beside float32 ONNX
    and for float32 and each quantized folder:
    optimize     optimize_encoder.py, which also times both encoders
    e2e          test_e2e.py
    load         GenAI loads the folder and transcribes a clip, in a fresh process
    speech       test_real_speech.py of each set in GenAI
    stress       test_real_speech.py --stress

The result of each step is kept in results/, with what it was made from, so a run that was stopped goes on where it was.
Exit status 1 where a script's own check failed, a set is missing, or float32 is far from the published error rate; the
table is written all the same.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.published_report import FLOAT32, MODELS, Model, figures, judge, markdown, readme_rows
from benchmarks.published_speech import (
    CLIP_SECONDS,
    CLIPS,
    HELD_OUT_CLIPS,
    SET_CLIPS,
    SETS,
    STRESSED,
    SpeechSet,
    combined_list,
    fetch_set,
    repository_files,
    set_files,
    write_list,
)
from benchmarks.steps import ROOT, Run
from common.checkpoint.hub import DEFAULT_MODEL, DEFAULT_REVISION, hub_name
from common.cli import CheckError, Parser, Stages, run, size_text
from common.folder import MANIFEST, lock, package_versions, read_json, require_free, sha256, write_json, write_text

STRESS_KINDS = ("level", "silence", "noise", "telephone")
CALIBRATED = "--calibration_manifest"  # a method that ends with this flag is given the held-out clips
# The README's program, in a process that has loaded nothing else.
LOAD = """
import json, sys, time
from pathlib import Path
import onnxruntime_genai as og

start = time.perf_counter()
model = og.Model(sys.argv[1])
seconds = time.perf_counter() - start
processor = model.create_multimodal_processor()
generator = og.Generator(model, og.GeneratorParams(model))
generator.set_inputs(processor("", audios=og.Audios.open(sys.argv[2])))
while not generator.is_done():
    generator.generate_next_token()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"load_seconds": seconds, "peak_memory": int(status["VmHWM"].split()[0]) * 1024}))
"""


# ---- the steps


def find_sources(name: str, revision: str, sets: Sequence[SpeechSet]) -> dict[str, Any]:
    """The checkpoint's commit and size, the files of each set, and why a set is missing."""
    commit, files = repository_files(name, "model", revision)
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for one in sets:
        try:
            found[one.key] = set_files(one)
        except ValueError as error:
            missing[one.key] = str(error)
    nemo = files.get(f"{name.split('/')[1]}.nemo")
    weights = [file for path, file in files.items() if path.endswith((".json", ".safetensors"))]
    size = sum(file["bytes"] for file in ([nemo] if nemo else weights))
    return {"commit": commit, "bytes": size, "sets": found, "missing": missing}


def fetch_speech(
    steps: Run, sources: Mapping[str, Any], sets: Sequence[SpeechSet], clips: int | None, folder: Path
) -> dict[str, Any]:
    """Download every set that there is; returns the measure of its lists, by the set's key."""
    fetched = {}
    for one in sets:
        files = sources["sets"].get(one.key)
        if files is None:
            steps.stages.begin(f"speech {one.key}")
            steps.stages.end(f"LEFT OUT: {sources['missing'][one.key]}")
            continue
        target = folder / one.key
        inputs = {"set": [one.repository, one.commit], "files": files, "clips": clips}
        fetched[one.key] = steps.step(
            f"speech {one.key}",
            inputs,
            lambda one=one, files=files, target=target: fetch_set(one, files, clips, target),
            target / CLIPS,
        )
    if not fetched:
        raise ValueError(f"no set of speech can be had: {'; '.join(sources['missing'].values())}")
    return fetched


@dataclass(frozen=True)
class Speech:
    """The clip lists of a run."""

    clips: Mapping[str, Path]  # by the key of the set
    held_out: Path
    stressed: Path


def write_lists(folder: Path, keys: Sequence[str], target: Path) -> Speech:
    """Write the lists that join the sets, in turns, since of a long list of calibration its first minutes are used."""
    folders = [folder / key for key in keys]
    lists = Speech({key: folder / key / CLIPS for key in keys}, target / HELD_OUT_CLIPS, target / "stressed.jsonl")
    write_list(lists.held_out, combined_list(folders, HELD_OUT_CLIPS))
    write_list(lists.stressed, combined_list(folders, CLIPS, STRESSED))
    return lists


def export(steps: Run, name: str, commit: str) -> tuple[Path, dict[str, Any]]:
    """Steps 1 and 2 of the README; returns the folder and what its export took."""
    folder = steps.folder / FLOAT32
    source = ["--model_name", name, "--revision", commit, "--output_dir", str(folder)]
    inputs = {"versions": package_versions()}
    made = steps.script("export", ["export_parakeet_to_onnx.py", *source], inputs, folder)
    tokenizer = steps.script("tokenizer", ["export_tokenizer.py", *source], inputs, folder / "tokenizer.json")
    for result in (made, tokenizer):
        if "failed" in result:
            raise CheckError(f"the export failed, so there is nothing to measure: {result['failed']}")
    return folder, made


def measure_folder(steps: Run, method: str, flags: Sequence[str] | None, speech: Speech) -> dict[str, Any]:
    """Make a quantized folder and measure it; flags: of optimize_encoder.py, None for float32 itself."""
    exported, folder = steps.folder / FLOAT32, steps.folder / method
    results: dict[str, Any] = {"flags": flags}
    if flags is not None:
        command = ["optimize_encoder.py", "--model_dir", str(exported), "--output_dir", str(folder), *flags]
        inputs: dict[str, Any] = {"exported": sha256(exported / MANIFEST)}
        if flags[-1] == CALIBRATED:
            command.append(str(speech.held_out))
            inputs["held_out"] = sha256(speech.held_out)
        results["optimize"] = steps.script(f"{method} optimize", command, inputs, folder)
        if "failed" in results["optimize"]:
            return results
        results["speed"] = read_json(folder / "optimization_report.json", command[0])["speed"]
    made = {"folder": sha256(folder / MANIFEST)}
    results["bytes"] = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    results["e2e"] = steps.script(f"{method} e2e", ["test_e2e.py", "--model_dir", str(folder)], made)
    clip = ROOT / "samples" / "jfk.wav"
    results["load"] = steps.step(f"{method} load", made, lambda: _load(folder, clip))
    alone = "exported" if flags is None else "optimized"
    common = ["test_real_speech.py", "--model_dir", str(folder), "--folders", alone, "--skip_nemo"]
    results["speech"] = {
        key: _transcribe(steps, f"{method} {key}", [*common, "--engines", "genai"], clips, made)
        for key, clips in speech.clips.items()
    }
    stress = [*common, "--engines", "onnx", "--stress", *STRESS_KINDS]
    results["stress"] = _transcribe(steps, f"{method} stress", stress, speech.stressed, made)
    return results


def _transcribe(
    steps: Run, name: str, command: Sequence[str], clips: Path, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Run test_real_speech.py on a clip list."""
    output = steps.folder / f"{name.replace(' ', '_')}.json"
    flags = ["--manifest", str(clips), "--json", str(output)]
    return steps.script(name, [*command, *flags], {**inputs, "clips": sha256(clips)}, result_file=output)


def _load(folder: Path, clip: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(clip)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": f"GenAI does not load the folder: {(done.stderr.splitlines() or ['it ended'])[-1]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- the command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    names = ", ".join(MODELS)
    add("--model_name", default=DEFAULT_MODEL, help=f"name on Hugging Face: {names}, or another (%(default)s)")
    add("--revision", default=DEFAULT_REVISION, help="branch, tag or commit of the checkpoint (%(default)s)")
    add("--clips", default="40", help="clips of each set, or all (%(default)s)")
    add("--sets", nargs="+", choices=tuple(SETS), help="sets of speech (those whose language the model knows)")
    add("--methods", nargs="+", help="folders to make, of those that the model has (all of them)")
    add("--work_dir", type=Path, default=Path("build/published"), help="where to write (%(default)s)")
    args = parser.parse_args(argv)
    args.model_name = hub_name(args.model_name) or parser.error(f"{args.model_name} is no name on Hugging Face")
    if args.clips != "all" and not (args.clips.isdecimal() and int(args.clips) > 0):
        parser.error(f"--clips is a number or all, not {args.clips}")
    model = MODELS.get(args.model_name, Model())
    if unknown := set(args.methods or ()) - set(model.methods):
        parser.error(f"--methods: {args.model_name} has {', '.join(model.methods)}, not {', '.join(sorted(unknown))}")
    return args


def main(argv: list[str] | None = None) -> int:
    return run(_publish, parse_args(argv))


def _publish(args: argparse.Namespace) -> None:
    model = MODELS.get(args.model_name, Model())
    sets = [SETS[key] for key in args.sets or SETS if args.sets or SETS[key].lang in model.languages]
    methods = {name: flags for name, flags in model.methods.items() if name in (args.methods or model.methods)}
    clips = None if args.clips == "all" else int(args.clips)
    work = args.work_dir.resolve()
    folder = work / args.model_name.replace("/", "--")
    # Each set is fetched, transcribed by the reference and float32, and by each method; a method has four more steps.
    stages = Stages(1 + len(sets) + 2 + len(sets) + (3 + len(sets)) * (1 + len(methods)) + len(methods))
    work.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        steps = Run(folder, stages)
        asked = {
            "model": [args.model_name, args.revision],
            "sets": [[one.repository, one.commit, one.files] for one in sets],
        }
        sources = steps.step("sources", asked, lambda: find_sources(args.model_name, args.revision, sets))
        announce(model, sources, clips, len(methods), folder)
        fetched = fetch_speech(steps, sources, sets, clips, work / "speech")
        speech = write_lists(work / "speech", list(fetched), folder)
        exported, took = export(steps, args.model_name, sources["commit"])
        made = {"folder": sha256(exported / MANIFEST)}
        reference = ["test_real_speech.py", "--model_dir", str(exported), "--engines", "nemo,onnx"]
        results: dict[str, Any] = {
            "export": took,
            "reference": {
                key: _transcribe(steps, f"reference {key}", reference, clip_list, made)
                for key, clip_list in speech.clips.items()
            },
            "folders": {
                method: measure_folder(steps, method, flags, speech)
                for method, flags in {FLOAT32: None, **methods}.items()
            },
        }
        published = figures(args.model_name, model, sources, fetched, results)
        published["failed_checks"] = steps.failures
        write_json(folder / "published.json", published)
        write_text(folder / "published.md", markdown(published))
        write_text(folder / "readme_rows.md", readme_rows(published))
    print(f"\n{markdown(published)}\nwrote published.json, published.md and readme_rows.md to {folder}", flush=True)
    judge(published)


def announce(model: Model, sources: Mapping[str, Any], clips: int | None, methods: int, folder: Path) -> None:
    """Print what will be downloaded, what it needs, and about how long it takes.

    Raises OSError for a full disk, before the first export, which takes most of it.
    """
    sizes = [sum(file["bytes"] for file in files.values()) for files in sources["sets"].values()]
    speech = sum(sizes)
    disk = (
        model.disk(sources["bytes"]) + max(sizes, default=0) + (speech * min(clips / SET_CLIPS, 1) if clips else speech)
    )
    if not (folder / FLOAT32).exists():
        require_free(disk, folder)
    hours = len(sizes) * CLIP_SECONDS * (clips or SET_CLIPS) / 3600
    print(
        f"       downloads: checkpoint {size_text(sources['bytes'])} (commit {sources['commit'][:12]}), speech "
        f"{size_text(speech)}, each file of which is removed when its clips are taken\n"
        f"       needs: {size_text(disk)} of disk, about {size_text(model.memory)} of memory\n"
        f"       takes: about {model.minutes(hours, methods):.0f} minutes on 4 cores besides the downloads, for "
        f"{hours:.1f} hours of speech; a run that is stopped goes on where it was",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
