"""The folders of optimize_encoder.py: check the source; compare the result with it, complete it and record it."""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.cli import EXPORT_COMMAND, Stages, size_text
from common.evaluate import word_limit
from common.evaluate.speed import AUDIO_SECONDS, machine, measure_speed
from common.evaluate.stress import StressOptions, StressRow, judge_stress, run_stress, stress_rows
from common.evaluate.word_limit import BothModels, EvaluatedClip, WordErrors
from common.folder import (
    CHECKPOINT,
    check_output_dir,
    fingerprint,
    is_float16,
    read_location,
    read_manifest,
    state_needs,
    verify_files,
    write_locations,
    write_manifest,
)
from common.layouts import check_same_layouts
from common.layouts.layout import Layout
from common.layouts.views import write_second_name
from common.onnx_io import MINIMUM_RUNTIME, minimum_runtime, of_one_name, save_model
from common.quantize.calibration import read_speech
from common.quantize.fidelity import MIN_FLOAT_SQNR_DB, MIN_SQNR_DB, compare
from common.quantize.methods import Calibrated, OptimizeOptions, QuantMethod
from common.quantize.rewrite import OptimizedEncoder
from common.quantize.tokens import QuantizedTokenGraphs, quantize_token_graphs
from common.report.card import write_card
from common.report.decision import verdict
from common.report.report import (
    REPORT_HTML,
    PageWriter,
    QuantizedWeights,
    make_evaluation,
    make_report,
    run_record,
    write_report,
)
from common.run.audio import Clip

# Peak memory as a multiple of the exported encoder, measured at 0.6B: one float32 session, while both are compared.
MEMORY_FACTOR = 1.3
CALIBRATION_MEMORY_FACTOR = 2.25
# What the libraries take, measured on the tiny checkpoint, and what those that read and transcribe speech add to it.
MEMORY_OF_IMPORTS = 160e6  # bytes
MEMORY_OF_SPEECH = 80e6  # bytes


def check_folders(source: Path, target: Path, layouts: Mapping[str, Layout]) -> None:
    """Raise FileNotFoundError naming the command that makes what `source` lacks; ValueError if `target` is the same
    folder, a file of `source` is not the one that its manifest lists, its weights are float16, or its parts are of
    different checkpoints."""
    check_output_dir(target)
    if target.resolve() == source.resolve():
        raise ValueError(
            f"expected --output_dir and --model_dir to differ, got {target} twice; give another --output_dir"
        )
    check_same_layouts(target, layouts)
    for name, layout in layouts.items():
        folder = source / name
        exported = (*layout.graph_files, *layout.config_files)
        for files, command in ((exported, EXPORT_COMMAND), (layout.vocabulary, layout.vocabulary_command)):
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                files_text = ", ".join(missing)
                raise FileNotFoundError(
                    f"expected {files_text} in {folder}, got none; first run: {command.format(folder)}"
                )
        if is_float16(read_manifest(folder)):
            raise ValueError(
                f"expected float32 weights to quantize, got {folder}, exported with --precision fp16; export it without"
            )
        verify_files(folder, (*layout.graph_files, *layout.vocabulary))
        layout.check_one_checkpoint(folder)


def state_needs_of_folders(source: Path, target: Path, layouts: Mapping[str, Layout], options: OptimizeOptions) -> None:
    """Print what optimizing the subfolders `layouts` of `source` needs. Raises OSError as state_needs does."""
    encoder = max(bytes_of(source / name, layout.encoder.files) for name, layout in layouts.items())
    factor = CALIBRATION_MEMORY_FACTOR if options.calibration_manifest else MEMORY_FACTOR
    memory = MEMORY_OF_IMPORTS + factor * encoder
    if options.calibration_manifest or options.eval_manifest:
        memory += MEMORY_OF_SPEECH
    # As much as the sources, though the result is smaller: sources with shared weights are copied, and removed later.
    disk = sum(bytes_of(source / name, layout.files) for name, layout in layouts.items())
    state_needs(f"encoder.onnx ({size_text(encoder)})", memory, disk, target)


def bytes_of(folder: Path, files: Iterable[str]) -> int:
    return sum((folder / file).stat().st_size for file in files)


@dataclass(frozen=True)
class ModelFolder:
    """One model folder that is being optimized."""

    layout: Layout
    source: Path
    readable: Path  # the source, or copies of its graphs: see `of_one_name`
    target: Path  # where the result will be
    staging: Path  # where it is being written
    manifest: dict[str, Any]  # of the source

    @property
    def encoder(self) -> Path:
        return self.readable / self.layout.encoder.file

    @property
    def device(self) -> str:
        """What the folder was exported for: cpu or cuda."""
        return str(self.manifest.get("export", {}).get("flags", {}).get("device", "cpu"))

    def bytes_in(self, folder: Path) -> int:
        """Size of the encoder's files in `folder`."""
        return bytes_of(folder, self.layout.encoder.files)


@contextlib.contextmanager
def open_folder(layout: Layout, name: str, source: Path, target: Path, staging: Path) -> Iterator[ModelFolder]:
    """Open the subfolder `name` of `source`, or `source` itself for "", to optimize it into that subfolder of `target`.

    The result is written into the same subfolder of `staging`, which is made here if it is missing. Raises ValueError
    at the end of the block if the source was written in the meantime.
    """
    (staging / name).mkdir(exist_ok=True)
    manifest = read_manifest(source / name)
    with tempfile.TemporaryDirectory(dir=staging.parent) as scratch:
        readable = of_one_name(source / name, layout.graph_files, Path(scratch) / "copies")
        yield ModelFolder(layout, source / name, readable, target / name, staging / name, manifest)
    if read_manifest(source / name) != manifest:
        raise ValueError(f"{source / name} was written again while it was being read; run this again")


def calibrate(
    folder: ModelFolder, method: QuantMethod, options: OptimizeOptions, clips: list[Clip], stages: Stages
) -> Calibrated:
    """Fit the encoder's weights to speech, once for the folders of all runtimes."""
    stages.begin("calibration")
    speech = read_speech(folder.source, clips)
    calibrated = method.calibrate(folder.encoder, speech.batches, options)
    stages.end(f"{speech.seconds:.0f} s of speech in {speech.clips} clips", *calibrated.summary())
    return calibrated


@dataclass(frozen=True)
class EvaluationSpeech:
    """What a folder is evaluated on."""

    clips: list[Clip]  # with texts; empty for no evaluation
    stress: StressOptions


@dataclass(frozen=True)
class ReportOptions:
    """How the report is written, the command that it names, and measurements that another folder's report has made."""

    write_page: PageWriter
    command: Sequence[str]
    speed: dict[str, Any] | None = None  # of the same encoder in the form of another runtime


@dataclass(frozen=True)
class Evaluation:
    """The transcripts of both models and their error rates; empty where there are no evaluation clips."""

    clips: list[EvaluatedClip] = field(default_factory=list)
    table: list[WordErrors] = field(default_factory=list)
    stress: list[StressRow] = field(default_factory=list)


def finish_folder(
    folder: ModelFolder,
    encoder: OptimizedEncoder,
    options: OptimizeOptions,
    speech: EvaluationSpeech,
    report: ReportOptions,
    stages: Stages,
) -> dict[str, Any] | None:
    """Write the encoder and the other files of the folder into its staging folder. Returns the speeds in its report.

    Raises CheckError where a graph does not agree with the exported one, or more words are lost than a limit allows.
    """
    layout = folder.layout
    stages.begin(f"write {layout.encoder.file}")
    save_model(encoder.model, folder.staging / layout.encoder.file)
    before = folder.bytes_in(folder.source)
    after = folder.bytes_in(folder.staging)
    stages.end(f"{size_text(before)} → {size_text(after)}", f"{before / after:.1f} times smaller")
    stages.begin("compare with the exported encoder on noise")
    floor = MIN_SQNR_DB if encoder.stored else MIN_FLOAT_SQNR_DB
    ratio = compare(folder.source, folder.staging, floor, layout.encoder)
    stages.end(_ratio_text(ratio, quantized=bool(encoder.stored)))
    tokens = _quantize_tokens(folder, options, stages)
    for file in layout.files_in(folder.source):
        if not (folder.staging / file).exists():
            shutil.copyfile(folder.source / file, folder.staging / file)
    evaluation = _evaluate(folder, options, speech, stages) if speech.clips else Evaluation()

    speed = _speed(folder, report.speed, stages)
    stages.begin("report")
    section = _manifest_section(folder, encoder, options, ratio, tokens, evaluation)
    weights = QuantizedWeights({layout.encoder.name: encoder.stored, **tokens.stored}, encoder.sensitivity)
    words = (
        make_evaluation(options.eval_manifest, evaluation.clips, evaluation.table, options.max_wer_increase)
        if evaluation.table and options.eval_manifest
        else None
    )
    content = make_report(folder.readable, folder.staging, layout.graphs, folder.manifest, section, weights, words)
    content |= {
        "stress": [asdict(row) for row in evaluation.stress],
        "max_lost_words": speech.stress.max_lost_words,
        "speed": speed,
        "run": run_record(report.command),
    }
    content["verdict"] = asdict(verdict(content))
    write_report(folder.staging, content, evaluation.clips, report.write_page)
    if options.method:
        for file, name in layout.second_names(options.method.name).items():
            write_second_name(folder.staging, file, name)
    write_manifest(folder.staging, folder.manifest, "optimize", section)
    write_card(folder.staging, folder.target, layout)
    checkpoint = read_location(folder.source, CHECKPOINT)
    write_locations(folder.staging, folder.target, checkpoint=checkpoint, exported=folder.source)
    stages.end(str(folder.target / REPORT_HTML))
    return speed


def _speed(folder: ModelFolder, measured: dict[str, Any] | None, stages: Stages) -> dict[str, Any] | None:
    """The speeds of the exported and the optimized encoder on this machine; None where they could not be measured.

    measured: those of another runtime's folder, whose encoder has the same operators and weights.
    """
    stages.begin("speed")
    if measured:
        stages.end(f"that of the encoder for {measured['runtime']}")
        return measured
    file = folder.layout.encoder.file
    speeds = measure_speed([folder.source / file, folder.staging / file])
    if speeds is None:
        stages.end("not measured: too little memory is free")
        return None
    before, after = speeds
    memory = [size_text(each.peak_memory) for each in speeds if each.peak_memory]
    rates = f"encoder RTFx {before.rtfx:.1f} → {after.rtfx:.1f}"
    stages.end(rates, *([f"peak memory {' → '.join(memory)}"] if memory else []))
    sides = {"exported": asdict(before), "optimized": asdict(after)}
    return {**sides, "runtime": folder.layout.runtime, "audio_seconds": AUDIO_SECONDS, **machine()}


def _ratio_text(ratio: float, *, quantized: bool) -> str:
    """A signal to quantization noise ratio, and what such a ratio has meant for words (README.md)."""
    if not math.isfinite(ratio):
        return "identical"
    scale = "on speech, 20 dB changed 2 words in 100, 30 dB fewer than 1" if quantized else "equal but for rounding"
    return f"SQNR {ratio:.1f} dB ({scale})"


def _quantize_tokens(folder: ModelFolder, options: OptimizeOptions, stages: Stages) -> QuantizedTokenGraphs:
    """Decoder and joint in 8 bits, where the options say so."""
    if not options.int8_tokens:
        return QuantizedTokenGraphs()
    layout, vocabulary = folder.layout, folder.layout.vocabulary_size(folder.source)
    stages.begin("decoder and joint, int8")
    tokens = quantize_token_graphs(folder.readable, folder.staging, layout.token_graphs, vocabulary, options)
    stages.end(*(f"{name} SQNR {ratio:.1f} dB" for name, ratio in tokens.sqnr_db.items()))
    return tokens


def _evaluate(folder: ModelFolder, options: OptimizeOptions, speech: EvaluationSpeech, stages: Stages) -> Evaluation:
    """Transcribe the clips with both models, and print the word errors; then under stress, where that is asked for.

    Raises as word_limit.judge and judge_stress do.
    """
    assert options.eval_manifest is not None, "clips come from --eval_manifest"
    clips = speech.clips
    stages.begin(f"evaluation on {len(clips)} clips")
    models = BothModels(folder.source, folder.staging)
    transcribed = word_limit.transcribe_with_both(models, options.eval_manifest, clips)
    table = word_limit.word_table(transcribed)
    stages.end(str(table[0]))
    word_limit.print_word_errors(table, transcribed)
    if options.max_wer_increase is not None:
        word_limit.judge(table, options.max_wer_increase)
    if speech.stress.stress is None:
        return Evaluation(transcribed, table)
    stages.begin(f"{len(clips)} clips under stress")
    engines = [models.float32, models.optimized]
    test = run_stress(engines, models.genai, models.genai.folder.config, clips, speech.stress)
    stages.end(f"{len(test.conditions)} conditions")
    judge_stress(test, speech.stress.max_lost_words)
    return Evaluation(transcribed, table, stress_rows(test))


def _manifest_section(
    folder: ModelFolder,
    encoder: OptimizedEncoder,
    options: OptimizeOptions,
    ratio: float,
    tokens: QuantizedTokenGraphs,
    evaluation: Evaluation,
) -> dict[str, Any]:
    """What manifest.json has under `optimize`."""
    manifest = options.calibration_manifest
    section = {
        "flags": options.record(),
        "method": options.description,
        "runs_as": options.method.runs_as(encoder.weights_by_bits) if options.method else "",
        "calibration": None if manifest is None else fingerprint(manifest),
        "fused": dict(encoder.fused),
        "weights_by_bits": {str(bits): count for bits, count in encoder.weights_by_bits.items()},
        "encoder_bytes": {"exported": folder.bytes_in(folder.source), "optimized": folder.bytes_in(folder.staging)},
        "sqnr_db_on_noise": round(ratio, 2) if math.isfinite(ratio) else None,
        "token_sqnr_db_on_noise": {name: round(ratio, 2) for name, ratio in tokens.sqnr_db.items()},
        MINIMUM_RUNTIME: minimum_runtime(folder.staging / graph.file for graph in folder.layout.graphs),
    }
    if evaluation.table:
        over_all = evaluation.table[0]
        section["wer"] = {"float32": asdict(over_all.float32), "optimized": asdict(over_all.optimized)}
    return section
