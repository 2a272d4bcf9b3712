"""What several test files use. Tests import from here and from conftest.py, never from each other."""

import io
import json
import os
import posixpath
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import helper
from sentencepiece import SentencePieceTrainer

import export_parakeet_to_onnx
import export_tokenizer
from common.checkpoint.find import find_checkpoint
from common.checkpoint.nemo import open_archive, parse_config
from common.checkpoint.tokenizer import ModelProto, Piece
from common.evaluate.compare import ComparedClip, Comparison
from common.evaluate.engines import GENAI_ENGINE, NEMO_ENGINE, ONNX_ENGINE, Engine
from common.folder import sha256
from common.layouts.layout import REPORT_FILES, Layout
from common.layouts.sherpa_onnx import SHERPA_ONNX
from common.report.card import CARD
from common.run.audio import Clip, load_clip

# ---- files of the project

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
TINY = SAMPLES / "parakeet-tdt-tiny.nemo"
REDUX = SAMPLES / "parakeet-redux-tiny"  # ternary, with its own words, in the published form of parakeet-redux
MANIFEST = SAMPLES / "manifest.jsonl"
ROWS = [json.loads(line) for line in MANIFEST.read_text(encoding="utf-8").splitlines()]
CLIPS = [SAMPLES / row["audio_filepath"] for row in ROWS]


# ---- comparisons


def comparison_of(
    clips: Sequence[ComparedClip],
    *,
    genai: Any = None,
    onnx: Any = None,
    is_float32: bool = True,
    with_nemo: bool = False,
) -> Comparison:
    """A comparison of the engines G and R, in GenAI and plain ONNX Runtime, on one folder; its windows have 60 s.

    genai, onnx: what transcribes; None: the comparison has taken place.
    """
    config = SimpleNamespace(
        sample_rate=16_000,
        window_seconds=60,
        frame_seconds=0.08,
        durations=(0, 4),
        read_clip=lambda clip: np.zeros(16_000, np.float32),
    )
    # These engines give no tokens to look up.
    folder: Any = SimpleNamespace(is_float32=is_float32, config=config, pieces=None, genai=None)
    engines = [Engine("G", GENAI_ENGINE, genai, folder), Engine("R", ONNX_ENGINE, onnx, folder)]
    reference: Any = SimpleNamespace(name="NeMo", sentencepiece_model=b"") if with_nemo else None
    if with_nemo:
        engines.insert(0, Engine("NeMo", NEMO_ENGINE, None))
    comparison = Comparison(clips=clips, folders=[folder], engines=engines, reference=reference)
    comparison.rules = ()
    return comparison


# ---- scripts


def windows_of(encoded: Sequence[np.ndarray], ends: Sequence[Sequence[int]]) -> Iterator[list[np.ndarray]]:
    """For one window after the other, the frames of each utterance in it; `ends`: where the windows of each end."""
    for number in range(max(map(len, ends))):
        begins = [(0, *own)[min(number, len(own))] for own in ends]
        stops = [own[min(number, len(own) - 1)] for own in ends]
        yield [frames[begin:stop] for frames, begin, stop in zip(encoded, begins, stops, strict=True)]


def rejected(capsys, script, *argv) -> str:
    """Run a script that must reject its input; return its one line on stderr."""
    try:
        status = script.main([str(argument) for argument in argv])
    except SystemExit as exit_:  # argparse
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# The beginning of a program that optimizes in a process of its own, to which the fixtures of conftest.py do not apply.
WITHOUT_SPEED = """
from common import optimize
optimize.measure_speed = lambda graphs: None
"""


def printed_by(optimized: Path, stream: str = "output") -> str:
    """What optimize_encoder.py printed when the fixture `optimized` made this folder; `stream` may be "errors"."""
    return (optimized.parent / stream).read_text()


def export_for_every_runtime(checkpoint: Path, folder: Path) -> Path:
    """Export a checkpoint and its tokenizer into `folder`, with a subfolder for each runtime; return `folder`."""
    argv = ["--model_name", str(checkpoint), "--output_dir", str(folder)]
    assert export_parakeet_to_onnx.main([*argv, "--runtime", "all", "--skip_verify"]) == 0
    assert export_tokenizer.main(argv) == 0
    return folder


# ---- variants of the bundled checkpoint

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"


def tiny_members() -> dict[str, bytes]:
    """The files of the bundled checkpoint by name."""
    return members_of(TINY)


def members_of(checkpoint: Path) -> dict[str, bytes]:
    """The files of a `.nemo` checkpoint by name, without the `./` that NeMo puts before them."""
    with tarfile.open(checkpoint) as tar:
        return {posixpath.normpath(member.name): tar.extractfile(member).read() for member in tar if member.isreg()}


@cache
def small_members() -> dict[str, bytes]:
    """The same without the config's two lists of 8192 labels: reading them takes seconds, and no model is built from
    them (common/checkpoint/nemo.py)."""
    members = tiny_members()
    config = yaml.safe_load(members[CONFIG])
    del config["labels"], config["joint"]["vocabulary"]
    return {**members, CONFIG: yaml.safe_dump(config, allow_unicode=True).encode()}


def write_tar(path: Path, members: dict[str, bytes], *extra: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info, content in extra:
            tar.addfile(info, io.BytesIO(content))


def rewrite_text(path: Path, change: Callable[[str], str], source: Path | None = None) -> Path:
    """Copy the bundled checkpoint, without the labels that `small_members` leaves out, or the checkpoint `source` to
    `path` with the text of its config changed by `change(text)`."""
    members = members_of(source) if source else small_members()
    write_tar(path, {**members, CONFIG: change(members[CONFIG].decode()).encode()})
    return path


def rewrite_config(path: Path, change: Callable[[dict], None], source: Path | None = None) -> Path:
    """Copy the bundled checkpoint, or the checkpoint `source`, to `path`; `change(config)` changes its config."""

    def rewritten(text: str) -> str:
        config = yaml.safe_load(text)
        change(config)
        return yaml.safe_dump(config, allow_unicode=True)

    return rewrite_text(path, rewritten, source)


def rewrite_weights(path: Path, change: Callable[[dict], None], source: Path | None = None) -> Path:
    """Copy the bundled checkpoint, without the labels, or the checkpoint `source` to `path` with its weights changed by
    `change(weights)`."""
    import torch

    members = members_of(source) if source else small_members()
    weights = torch.load(io.BytesIO(members[WEIGHTS]), weights_only=True)
    change(weights)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    write_tar(path, {**members, WEIGHTS: buffer.getvalue()})
    return path


def load_model(checkpoint: Path) -> Any:
    """The model of a checkpoint in its library."""
    return find_checkpoint(str(checkpoint)).load_model()


def config_of(checkpoint: Path) -> dict[str, Any]:
    """The content of a NeMo checkpoint's config."""
    with open_archive(checkpoint) as members:
        return parse_config(members[CONFIG].read(), members)


def plain_rnnt(config: dict) -> None:
    config["joint"]["num_extra_outputs"] = 0


def ctc_only(config: dict) -> None:
    del config["joint"], config["decoder"]


# ---- random checkpoints of other topologies, for benchmarks.random_checkpoint.write_checkpoint

SMALL = {"n_layers": 2, "n_heads": 2, "subsampling_conv_channels": 16}
TOPOLOGIES = {
    "80 mels, durations 0-1-2-4-8, one LSTM layer, biases, xscaling, layer norm": {
        "mels": 80,
        "durations": [0, 1, 2, 4, 8],
        "predictor": 48,
        "predictor_layers": 1,
        "pieces": 64,
        "encoder": {**SMALL, "d_model": 96, "use_bias": True, "xscaling": True, "conv_norm_type": "layer_norm"},
    },
    "hybrid TDT-CTC, tied position biases, group norm, wide kernel": {
        "hybrid": True,
        "predictor": 64,
        "pieces": 100,
        "encoder": {**SMALL, "d_model": 64, "untie_biases": False, "conv_norm_type": "group_norm4",
                    "conv_kernel_size": 15},
    },
    "4× striding subsampling, limited context, instance norm, three LSTM layers": {
        "durations": [0, 1, 2],
        "predictor": 32,
        "predictor_layers": 3,
        "pieces": 40,
        "encoder": {**SMALL, "d_model": 64, "subsampling": "striding", "subsampling_factor": 4,
                    "att_context_size": [40, 20], "conv_norm_type": "instance_norm"},
        "preprocessor": {"window_stride": 0.02, "window_size": 0.032},
    },
    "causal convolutions and chunked attention, 64 mels": {
        "mels": 64,
        "predictor": 40,
        "pieces": 50,
        "encoder": {**SMALL, "d_model": 64, "causal_downsampling": True, "conv_context_size": "causal",
                    "att_context_style": "chunked_limited", "att_context_size": [14, 6]},
    },
}  # fmt: skip


def narrow_encoder(width: int, heads: int, deviation: float) -> Any:
    """NeMo's encoder with one narrow layer of random weights, for long clips, whose time is quadratic in the length and
    linear in layers and heads. Position biases of a large standard deviation let positions decide what it attends to.
    """
    import torch
    from nemo.collections.asr.modules import ConformerEncoder

    torch.manual_seed(0)
    encoder = ConformerEncoder(
        feat_in=80, n_layers=1, d_model=width, n_heads=heads, subsampling="dw_striding", subsampling_factor=8,
        subsampling_conv_channels=8, self_attention_model="rel_pos",
    ).eval().requires_grad_(False)  # fmt: skip
    for bias in (encoder.layers[0].self_attn.pos_bias_u, encoder.layers[0].self_attn.pos_bias_v):
        torch.nn.init.normal_(bias, std=deviation)
    return encoder


# ---- SentencePiece models

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "FBI and CEO met in 1999, 2000 and 2001; BBC paid 100% of $20.50!",
    "Žluťoučký kůň úpěl ďábelské ódy, señor Müller.",
    "Съешь же ещё этих мягких французских булок.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "你好,世界。 今日は良い天気",
]
MARKS = {"control_symbols": ["<|nospeech|>", "<pad>"], "user_defined_symbols": ["<|en|>", "<|pnc|>", "%", "▁[no▁ise]"]}
NEMO = {"remove_extra_whitespaces": False}  # how NeMo trains its tokenizers unless told otherwise
RECIPES = {
    "unigram": {"model_type": "unigram", **MARKS},
    "unigram bytes": {"model_type": "unigram", "byte_fallback": True, **MARKS},
    "unigram nemo": {"model_type": "unigram", "byte_fallback": True, **MARKS, **NEMO},
    "bpe": {"model_type": "bpe"},
    "bpe bytes": {"model_type": "bpe", "byte_fallback": True, **MARKS},
    "bpe nemo": {"model_type": "bpe", **MARKS, **NEMO},
    "bpe phrases": {"model_type": "bpe", "split_by_whitespace": False, "normalization_rule_name": "identity"},
}


@cache
def trained(recipe: str) -> bytes:
    """A SentencePiece model of these RECIPES, trained on SENTENCES."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=620,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **RECIPES[recipe],
    )
    return model.getvalue()


def handmade(*pieces: tuple[str, float, int]) -> bytes:
    """A SentencePiece model with `<unk>` and these (piece, score, type), of the kind NeMo trains."""
    proto = ModelProto.FromString(trained("bpe nemo"))
    proto.trainer_spec.byte_fallback = any(kind == Piece.BYTE for _, _, kind in pieces)
    del proto.pieces[1:]
    proto.pieces.extend(Piece(piece=piece, score=score, type=kind) for piece, score, kind in pieces)
    return proto.SerializeToString()


def check_runtime(layout: Layout, spec: Any, features: Callable = lambda samples: samples) -> None:
    """Raise as the export does where the runtime cannot compute a checkpoint with these numbers and features."""
    layout.make_files(spec, ModelProto.FromString(trained("bpe")), features, {}, "cpu")


# ---- matrices to quantize


def _matrices() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    matrices = {
        "gaussian": draw.standard_normal((480, 64)),
        "heavy-tailed": draw.standard_t(4, (480, 64)),
        "off-centre": draw.standard_normal((480, 64)) + 1.5,
    }
    return {name: (0.02 * matrix).astype(np.float32) for name, matrix in matrices.items()}


MATRICES = _matrices()  # [K, N]; K is no multiple of the larger blocks


def code_at(packed: np.ndarray, index: int, bits: int) -> int:
    """Code number `index` of those that are packed into bytes, `bits` each."""
    return int(packed[index * bits // 8]) >> (index * bits % 8) & (2**bits - 1)


def dequantize(packed, K: int, bits: int) -> np.ndarray:
    """[K, N] of a Packed weight in blocks, one code at a time, as the operator's documentation describes it."""
    N, _, size = packed.codes.shape
    weight = np.zeros((K, N), np.float32)
    for n, k in np.ndindex(N, K):
        block, place = divmod(k, size * 8 // bits)
        zero = 2 ** (bits - 1) if packed.zero_points is None else code_at(packed.zero_points[n], block, bits)
        weight[k, n] = packed.scales[n, block] * (code_at(packed.codes[n, block], place, bits) - zero)
    return weight


# A process of its own: sherpa-onnx brings another libonnxruntime, and ends the process where a model is not right.
SHERPA_PROGRAM = """
import json, sys
import sherpa_onnx, soundfile

folder, *clips = sys.argv[1:]
files = {name: f"{folder}/{name}.onnx" for name in ("encoder", "decoder", "joiner")}
recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
    **files, tokens=f"{folder}/tokens.txt", model_type="nemo_transducer"
)
texts = []
for clip in clips:
    stream = recognizer.create_stream()
    samples, sample_rate = soundfile.read(clip, dtype="float32")
    stream.accept_waveform(sample_rate, samples)
    recognizer.decode_stream(stream)
    texts.append(stream.result.text)
print(json.dumps(texts))
"""


def run_python(program: str, *argv: object, **options: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


GENAI_PROGRAM = """
import json, sys
from pathlib import Path
from common.run.genai import GenAI

folder, *clips = sys.argv[1:]
genai = GenAI(Path(folder))
print(json.dumps([genai.transcribe(genai.config.read_audio(Path(clip))) for clip in clips]))
"""
ONNX_ASR_PROGRAM = """
import json, sys
import onnx_asr, soundfile

folder, *clips = sys.argv[1:]
model = onnx_asr.load_model("nemo-conformer-tdt", folder)
print(json.dumps([model.recognize(*soundfile.read(clip, dtype="float32")[:1], sample_rate=16000) for clip in clips]))
"""
PROGRAMS = {
    "genai": (GENAI_PROGRAM, "encoder.onnx"),
    "onnx-asr": (ONNX_ASR_PROGRAM, "encoder-model.onnx"),
    "sherpa-onnx": (SHERPA_PROGRAM, "encoder.onnx"),
}


def files_in(folder: Path, layout: Layout) -> list[str]:
    """The files of a layout that are in `folder`: an encoder may hold its weights, and the other graphs hold theirs."""
    return [name for name in layout.files if name not in layout.graph_files or (folder / name).is_file()]


def hub_cache_of(folder: Path, cache: Path) -> Path:
    """A folder as huggingface_hub's snapshot_download leaves it in `cache`: its files are links to blobs."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, repository / "blobs" / sha256(path))
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", sha256(path)))
    return snapshot


def change_weights(path: Path, change: Callable[[np.ndarray], np.ndarray], name: str | None = None) -> None:
    """Change the float32 weights of a graph, or the one called `name`; the graph then holds them."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and name in (None, tensor.name):
            weight = onnx.numpy_helper.to_array(tensor).copy()
            tensor.CopyFrom(onnx.numpy_helper.from_array(change(weight), tensor.name))
    onnx.save(model, path)


def profiled(
    runtime: str, folder: Path, scratch: Path, level: int, clips: Sequence[Path] = CLIPS
) -> tuple[list, list[dict]]:
    """The transcripts of a runtime, and the events of its encoder's session. Where ORT_LOAD_CONFIG_FROM_MODEL is set,
    ONNX Runtime reads a session's options from the model, whichever library it is built into."""
    shutil.copytree(folder, scratch / "model")
    program, file = PROGRAMS[runtime]
    proto = onnx.load(scratch / "model" / file, load_external_data=False)
    options = {"enable_profiling": 1, "graph_optimization_level": level}
    helper.set_model_props(
        proto,
        {prop.key: prop.value for prop in proto.metadata_props}
        | {"ort_config": json.dumps({"session_options": options})},
    )
    onnx.save(proto, scratch / "model" / file)
    environment = {**os.environ, "ORT_LOAD_CONFIG_FROM_MODEL": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", program, str(scratch / "model"), *map(str, clips)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=scratch, env=environment
    )
    assert done.returncode == 0, done.stderr
    profiles = list(scratch.glob("*.json"))
    assert profiles, "no session was profiled"
    events = [event for path in profiles for event in json.loads(path.read_text())]
    return json.loads(done.stdout.splitlines()[-1]), [event for event in events if event["cat"] == "Node"]


def runtime_texts(layout: Layout, folder: Path, clips: Sequence[Path] = CLIPS) -> list[str]:
    """The transcripts of clips by onnx-asr or sherpa-onnx, from PyPI, with a folder in its layout."""
    if layout is SHERPA_ONNX:
        done = run_python(SHERPA_PROGRAM, folder, *clips)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    import onnx_asr

    model = onnx_asr.load_model("nemo-conformer-tdt", folder)
    return [model.recognize(load_clip(Clip(clip), 16000, 0), sample_rate=16000) for clip in clips]


def prefer(folder: Path, token: int) -> None:
    """Bias the joint of the exported folder so that it chooses this token and duration 0 on every frame."""
    proto = onnx.load(folder / "joint.onnx")
    bias = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [8198])
    values = onnx.numpy_helper.to_array(bias).copy()
    values[[token, 8193]] += 1000
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(proto, folder / "joint.onnx")


def reproducible(path: Path) -> object:
    """The part of a file that the same input gives again. A report has a date and speeds, so that its checksum and its
    size, which the card shows, differ each time: of a report this is nothing, of a card all lines but those of reports,
    of the manifest beside a report all but the checksums of reports and card, and of another file its checksum."""
    if path.name in REPORT_FILES:
        return None
    if path.name == CARD:
        return [
            line for line in path.read_bytes().splitlines() if not any(name.encode() in line for name in REPORT_FILES)
        ]
    try:
        manifest = json.loads(path.read_text()) if path.name == "manifest.json" else {}
        for name in REPORT_FILES:
            del manifest["files"][name]
        manifest["files"].pop(CARD, None)
    except (ValueError, KeyError, TypeError):  # another file, a folder without a report, a damaged manifest
        return sha256(path)
    return manifest


def snapshot(folder: Path) -> dict[str, str]:
    """Every entry below `folder` with its kind, mode and content, as far as the same input reproduces it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, mode = str(path.relative_to(folder)), oct(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = f"{mode} → {path.readlink()}"
        else:
            found[name] = f"{mode} {reproducible(path)!r}" if path.is_file() else mode
    return found


def shard(folder: Path) -> dict:
    """Save the tensors in two files as transformers does, the smaller one first; return the content of the index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: names[place >= 3] for place, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors in a folder of transformers that has one file of weights."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def hostile_cases() -> tuple[dict[str, tuple], Callable[..., Callable]]:
    """A table, and a decorator that enters a function which damages a folder, with what the error must say.

    Table: the function's name in words → the function, expected parts of the message.
    """
    table: dict[str, tuple] = {}

    def case(*expected: str) -> Callable:
        def register(change: Callable) -> Callable:
            table[change.__name__.replace("_", " ")] = change, expected
            return change

        return register

    return table, case
