"""Step 3, optimize_encoder.py: exported folders → optimized, compared, evaluated folders with their reports.

A folder may hold subfolders for several runtimes. Each is optimized in turn, with the same calibration of the weights.
"""

import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.cli import EXPORT_COMMAND, PUBLISH_COMMAND, TOKENIZER_COMMAND, Stages, size_text, warn
from common.evaluate import word_limit
from common.evaluate.speed import AUDIO_SECONDS, machine, measure_speed, why_slower
from common.evaluate.stress import StressOptions, StressTest
from common.evaluate.word_limit import EvaluatedClip, WordErrors, compare_words, read_speech_manifests
from common.folder import (
    CHECKPOINT,
    FILES,
    fingerprint,
    is_float16,
    link,
    read_location,
    read_manifest,
    staged_folder,
    state_needs,
    verify_files,
    write_json,
    write_locations,
)
from common.layouts import former_manifests, layouts_in
from common.layouts.layout import SECOND_NAME, Layout
from common.onnx_io import (
    MINIMUM_RUNTIME,
    minimum_runtime,
    save_model,
    share_equal_graphs,
)
from common.quantize.calibration import calibrate, read_speech
from common.quantize.fidelity import MIN_FLOAT_SQNR_DB, MIN_SQNR_DB, compare
from common.quantize.methods import FittingMethod, OptimizeOptions
from common.quantize.rewrite import Calibrated, OptimizedEncoder, optimize_graph
from common.quantize.tokens import quantize_token_graphs
from common.report.card import finish_folder
from common.report.report import (
    REPORT_HTML,
    REPORT_JSON,
    checks,
    make_evaluation,
    make_report,
    run_record,
    write_page,
)
from common.run.audio import Clip

STAGES = 6  # of each folder: fusion, quantization, size, comparison, speed, report
# Peak memory as a multiple of the exported encoder, measured at 0.6B: one float32 session, while both are compared.
MEMORY_FACTOR = 1.3
CALIBRATION_MEMORY_FACTOR = 2.25
# What the libraries take, measured on the tiny checkpoint, and what those that read and transcribe speech add to it.
MEMORY_OF_IMPORTS = 160e6  # bytes
MEMORY_OF_SPEECH = 80e6  # bytes


@dataclass(frozen=True)
class Run:
    """What is the same for every folder of one run."""

    options: OptimizeOptions
    stress: StressOptions
    clips: list[Clip]  # with texts, to evaluate on; empty for no evaluation
    command: Sequence[str]  # as the report names it
    stages: Stages


@dataclass(frozen=True)
class Folder:
    """One exported folder, and the folder where its result will be."""

    layout: Layout
    source: Path
    target: Path
    manifest: dict[str, Any]  # of the source

    @property
    def device(self) -> str:
        """What the folder was exported for: cpu or cuda."""
        return str(self.manifest.get("export", {}).get("flags", {}).get("device", "cpu"))

    def encoder_bytes(self, staging: Path) -> dict[str, int]:
        """Size of the encoder's files before and after, under the names that the manifest has for them."""
        encoder = self.layout.encoder
        return {"exported": encoder.bytes_in(self.source), "optimized": encoder.bytes_in(staging)}


def optimize(
    source: Path,
    target: Path,
    options: OptimizeOptions,
    stress: StressOptions,
    command: Sequence[str],
    *,
    verbose: bool = False,
) -> Path | None:
    """Optimize every model folder in `source` into `target`, and print the stages and what the user may want to change.

    command: for the report. Returns the new folder that GenAI can transcribe with; None where there is none. Raises
    ValueError or OSError before the work for input that cannot be used, CheckError for a result that is not good
    enough; nothing is then written.
    """
    if target.resolve() == source.resolve():
        raise ValueError(f"--output_dir and --model_dir are both {target}; give another --output_dir")
    layouts = layouts_in(source)
    former = former_manifests(target, layouts)
    folders = {
        name: Folder(layout, source / name, target / name, read_manifest(source / name))
        for name, layout in layouts.items()
    }
    for folder in folders.values():
        _check(folder)
    speech_folder = next((name for name, layout in layouts.items() if not layout.is_view), None)
    calibration, evaluation = read_speech_manifests(options, source, speech_folder)
    _state_needs(folders.values(), options, target)
    if options.full_range:
        warn(f"--full_range makes a folder for {options.cpus}")

    once = bool(calibration) + bool(evaluation) + (stress.stress is not None)
    stages = Stages(once + len(folders) * (STAGES + options.int8_tokens), verbose=verbose)
    run = Run(options, stress, evaluation, command, stages)
    removed = [
        str(Path(name) / file) for name, manifest in former.items() for file in layouts[name].former_graphs(manifest)
    ]
    with staged_folder(target, removed) as staging:
        calibrated = None
        if calibration and speech_folder is not None:
            calibrated = _calibrate(folders[speech_folder], run, calibration)
        speed = None
        for name, folder in folders.items():
            if name:
                print(f"{name}:")
            (staging / name).mkdir(exist_ok=True)
            speed = optimize_folder(folder, staging / name, run, calibrated, speed)
        share_equal_graphs([staging / name for name in folders])
    advice: list[str | None] = []
    for folder in folders.values():
        advice += [*options.advice(folder.device), _publishing_advice(folder.target, folder.layout, options)]
    for line in dict.fromkeys(filter(None, advice)):
        print(line)
    return None if speech_folder is None else target / speech_folder


def _publishing_advice(folder: Path, layout: Layout, options: OptimizeOptions) -> str | None:
    """How to publish a folder whose graphs have two names without having each of them twice."""
    if options.method is None or not layout.is_view:
        return None
    name = SECOND_NAME.format(name="*", method=options.method.name)
    return f"each graph has two names; to publish one: {PUBLISH_COMMAND.format(folder)} --exclude '{name}'"


def _check(folder: Folder) -> None:
    """Raise FileNotFoundError naming the command that makes what the source lacks; ValueError if one of its files is
    not the one that its manifest lists, its weights are float16, or its parts are of different checkpoints."""
    layout, source = folder.layout, folder.source
    exported = (*(graph.file for graph in layout.graphs), *layout.config_files)
    vocabulary_command = EXPORT_COMMAND if layout.is_view else TOKENIZER_COMMAND
    for files, command in ((exported, EXPORT_COMMAND), (layout.vocabulary, vocabulary_command)):
        missing = ", ".join(file for file in files if not (source / file).is_file())
        if missing:
            raise FileNotFoundError(f"{source} has no {missing}; first run: {command.format(source)}")
    if is_float16(folder.manifest):
        raise ValueError(
            f"{source} was exported with --precision fp16, and only float32 weights can be quantized; export it without"
        )
    verify_files(source, (*layout.graph_files, *layout.vocabulary))
    layout.check_one_checkpoint(source)


def _state_needs(folders: Collection[Folder], options: OptimizeOptions, target: Path) -> None:
    """Print what optimizing these folders into `target` needs. Raises OSError as state_needs does."""
    encoder = max(folder.layout.encoder.bytes_in(folder.source) for folder in folders)
    factor = CALIBRATION_MEMORY_FACTOR if options.calibration_manifest else MEMORY_FACTOR
    memory = MEMORY_OF_IMPORTS + factor * encoder
    if options.calibration_manifest or options.eval_manifest:
        memory += MEMORY_OF_SPEECH
    # As much as the sources, though the result is smaller.
    disk = sum(graph.bytes_in(folder.source) for folder in folders for graph in folder.layout.graphs)
    state_needs(f"encoder.onnx ({size_text(encoder)})", memory, disk, target)


def _calibrate(folder: Folder, run: Run, clips: list[Clip]) -> Calibrated:
    """Fit the encoder's weights to speech, once for the folders of all runtimes."""
    method = run.options.method
    assert isinstance(method, FittingMethod), "--calibration_manifest needs a method that calibrates"
    run.stages.begin("calibration")
    batches, seconds = read_speech(folder.source, clips)
    calibrated = calibrate(method, folder.source / folder.layout.encoder.file, batches, run.options)
    run.stages.end(f"{seconds:.0f} s of speech")
    return calibrated


def optimize_folder(
    folder: Folder, staging: Path, run: Run, calibrated: Calibrated | None, speed: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Write the optimized folder into `staging`, stage after stage. Returns the speeds in its report.

    speed: measured for another runtime's folder, whose encoder has the same operators and weights. Raises CheckError
    where a graph does not agree with the exported one, or more words are lost than a limit allows.
    """
    options = run.options
    stages = run.stages
    layout = folder.layout
    source = folder.source
    encoder = optimize_graph(source / layout.encoder.file, options, folder.device, calibrated, stages)
    ratio = _write_encoder(encoder, folder, staging, run)
    token_sqnr_db: dict[str, float] = {}
    stored = {layout.encoder.name: encoder.stored}
    if options.int8_tokens:
        stages.begin("decoder and joint, int8")
        vocabulary = layout.vocabulary_size(source)
        token_sqnr_db, others = quantize_token_graphs(source, staging, layout.graphs[1:], vocabulary, options)
        stored |= others
        stages.end(*(f"{name} SQNR {ratio:.1f} dB" for name, ratio in token_sqnr_db.items()))
    unchanged = [file for graph in layout.graphs if not (staging / graph.file).exists() for file in graph.files]
    for file in (*unchanged, *layout.config_files, *layout.vocabulary, *layout.optional_files):
        if (source / file).is_file():
            shutil.copyfile(source / file, staging / file)

    clips, table, stressed = _evaluate(source, staging, run) if run.clips and not layout.is_view else ([], [], [])
    stages.begin("speed")
    if speed is None:
        speed = _measure_speed(folder, staging, stages)
    else:
        stages.end(f"measured above, on the encoder for {speed['runtime']}")

    stages.begin("report")
    section = _manifest_section(folder, staging, options, encoder, ratio, token_sqnr_db, table)
    sensitivity = calibrated.sensitivity if calibrated else None
    report = {
        "run": run_record(run.command),
        "evaluation": None,
        "stress": stressed,
        "max_lost_words": run.stress.max_lost_words,
        "speed": speed,
        **make_report(source, staging, layout.graphs, folder.manifest, section, stored, sensitivity),
    }
    if table and options.eval_manifest:
        report["evaluation"] = make_evaluation(options.eval_manifest, clips, table, options.max_wer_increase)
    report["verdict"] = {"checks": checks(report)}
    write_json(staging / REPORT_JSON, report)
    write_page(staging / REPORT_HTML, report, clips)
    if options.method and layout.is_view:
        for graph in layout.graphs:
            name = SECOND_NAME.format(name=graph.name, method=options.method.name)
            link(staging / graph.file, staging / name)
    write_locations(staging, folder.target, checkpoint=read_location(source, CHECKPOINT), exported=source)
    finish_folder(staging, folder.target, layout, {**folder.manifest, FILES: {}}, "optimize", section)
    stages.end(str(folder.target / REPORT_HTML))
    return speed


def _write_encoder(encoder: OptimizedEncoder, folder: Folder, staging: Path, run: Run) -> float:
    """Write the encoder into `staging` and return its SQNR on noise, in dB, against the exported one. Raises CheckError
    where that is too low."""
    options = run.options
    stages = run.stages
    layout = folder.layout
    stages.begin(f"write {layout.encoder.file}")
    single_file = options.single_file or bool(options.method and layout.is_view)
    save_model(encoder.model, staging / layout.encoder.file, single_file=single_file)
    before, after = folder.encoder_bytes(staging).values()
    stages.end(f"{size_text(before)} → {size_text(after)}", f"{before / after:.1f} times smaller")
    stages.begin("compare with the exported encoder on noise")
    floor = MIN_SQNR_DB if encoder.stored else MIN_FLOAT_SQNR_DB
    ratio = compare(folder.source, staging, floor, layout.encoder)
    scale = (
        "on speech, 20 dB changed 2 words in 100, 30 dB fewer than 1" if encoder.stored else "equal but for rounding"
    )
    stages.end(f"SQNR {ratio:.1f} dB ({scale})" if math.isfinite(ratio) else "identical")
    return ratio


def _evaluate(
    source: Path, staging: Path, run: Run
) -> tuple[list[EvaluatedClip], list[WordErrors], list[dict[str, Any]]]:
    """Transcribe the clips with both models, and print the word errors; then under stress, where that is asked for.

    Returns the clips, their error rates and the rows of the stress test. Raises as the judges of both.
    """
    options, stages = run.options, run.stages
    assert options.eval_manifest is not None, "clips come from --eval_manifest"
    stages.begin(f"evaluation on {len(run.clips)} clips")
    comparison, clips = compare_words(source, staging, options.eval_manifest, run.clips)
    table = word_limit.word_table(clips)
    stages.end(str(table[0]))
    word_limit.print_word_errors(table, clips)
    if options.max_wer_increase is not None:
        word_limit.judge(table, options.max_wer_increase)
    if run.stress.stress is None:
        return clips, table, []
    stages.begin(f"{len(clips)} clips under stress")
    optimized, _ = comparison.folders
    test = StressTest(comparison.engines, optimized.genai, optimized, run.clips, run.stress).run()
    stages.end(f"{len(test.conditions)} conditions")
    test.judge()
    return clips, table, test.rows()


def _measure_speed(folder: Folder, staging: Path, stages: Stages) -> dict[str, Any] | None:
    """The speeds of the exported and the optimized encoder on this machine; None where they could not be measured."""
    file = folder.layout.encoder.file
    speeds = measure_speed([folder.source / file, staging / file])
    if speeds is None:
        stages.end("not measured: too little memory is free")
        return None
    before, after = speeds
    memory = [size_text(each.peak_memory) for each in speeds if each.peak_memory]
    rates = f"encoder RTFx {before.rtfx:.1f} → {after.rtfx:.1f} (seconds of audio encoded in one second)"
    stages.end(rates, *([f"peak memory {' → '.join(memory)}"] if memory else []))
    sides = {"exported": asdict(before), "optimized": asdict(after)}
    if reason := why_slower(before.rtfx, after.rtfx, folder.layout.encoder.bytes_in(folder.source)):
        print(reason)
    return {**sides, "runtime": folder.layout.runtime, "audio_seconds": AUDIO_SECONDS, **machine()}


def _manifest_section(
    folder: Folder,
    staging: Path,
    options: OptimizeOptions,
    encoder: OptimizedEncoder,
    ratio: float,
    token_sqnr_db: dict[str, float],
    table: list[WordErrors],
) -> dict[str, Any]:
    """What manifest.json has under `optimize`."""
    manifest = options.calibration_manifest
    section = {
        "flags": options.record(),
        "method": options.description,
        "cpus": options.cpus,
        "runs_as": options.method.runs_as(encoder.weights_by_bits) if options.method else "",
        "calibration": None if manifest is None else fingerprint(manifest),
        "fused": dict(encoder.fused),
        "weights_by_bits": {str(bits): count for bits, count in encoder.weights_by_bits.items()},
        "encoder_bytes": folder.encoder_bytes(staging),
        "sqnr_db_on_noise": round(ratio, 2) if math.isfinite(ratio) else None,
        "token_sqnr_db_on_noise": {name: round(ratio, 2) for name, ratio in token_sqnr_db.items()},
        MINIMUM_RUNTIME: minimum_runtime(staging / graph.file for graph in folder.layout.graphs),
    }
    if table:
        section["wer"] = {"float32": asdict(table[0].float32), "optimized": asdict(table[0].optimized)}
    return section
