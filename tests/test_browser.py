"""The page of docs/runtimes.md in Chromium: parakeet.js gives NeMo's transcripts with the folder for onnx-asr.

`make browser` installs what these tests need; where it is missing they are skipped.

parakeet.js 1.4.4 has the prediction network's size in its code: two layers of 640, as in published checkpoints. The
bundled checkpoint has two layers of 64 and is widened here with units of zero weights. An LSTM unit without weights
stays at zero, so the function is the same, and NeMo's transcripts by the original checkpoint are the reference.
"""

import functools
import io
import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import export_parakeet_to_onnx
import optimize_encoder
from common.checkpoint.find import find_checkpoint
from common.layouts.onnx_asr import BROWSER_PAGE
from common.run.audio import Clip, load_clip
from common.run.reference import Transformers
from tests.helpers import (
    CLIPS,
    CONFIG,
    MANIFEST,
    REDUX,
    ROOT,
    WEIGHTS,
    edit_json,
    edit_tensors,
    export_for_every_runtime,
    small_members,
    write_tar,
)

PACKAGES = ROOT / "build/browser/node_modules"
DRIVER = ROOT / "tests/browser/drive.mjs"
CHROMIUM = shutil.which("chromium")
SPOKEN = CLIPS[:2]  # WebAssembly takes seconds a clip
WEBGPU = "--enable-unsafe-webgpu --use-webgpu-adapter=swiftshader --enable-features=Vulkan"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and shutil.which("node")), reason="needs chromium and node on the path"),
    pytest.mark.skipif(not PACKAGES.is_dir(), reason="needs the packages of tests/browser; run make browser"),
]


def widen(path: Path, width: int) -> Path:
    """Write to `path` the bundled checkpoint with `width` units in each LSTM; the new ones have weights of zero."""
    import torch

    members = small_members()
    config = yaml.safe_load(members[CONFIG])
    for section in (config["decoder"]["prednet"], config["joint"]["jointnet"], config["model_defaults"]):
        section["pred_hidden"] = width
    weights = torch.load(io.BytesIO(members[WEIGHTS]), weights_only=True)
    for name, value in weights.items():
        if "dec_rnn" in name:
            gates = value.reshape(4, -1, *value.shape[1:])
            wide = torch.zeros(4, *(width for _ in gates.shape[1:]))
            wide[(slice(None), *(slice(size) for size in gates.shape[1:]))] = gates
            weights[name] = wide.flatten(0, 1)
        elif name in ("decoder.prediction.embed.weight", "joint.pred.weight"):
            weights[name] = torch.nn.functional.pad(value, (0, width - value.shape[1]))
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    text = yaml.safe_dump(config, allow_unicode=True).encode()
    write_tar(path, {**members, CONFIG: text, WEIGHTS: buffer.getvalue()})
    return path


def widen_transformers(source: Path, folder: Path, width: int) -> Path:
    """Copy the checkpoint `source`, in the form of transformers, to `folder` with LSTMs and joint of `width` units."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, folder)
    narrow = json.loads((source / "config.json").read_text())["decoder_hidden_size"]
    edit_json(folder / "config.json", lambda config: config.update(decoder_hidden_size=width))

    def padded(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        wide = torch.zeros([width if size == narrow else size for size in shape], dtype=tensor.dtype)
        wide[tuple(slice(size) for size in shape)] = tensor.reshape(shape)
        return wide

    def change(tensors: dict) -> None:
        for name, tensor in load_file(source / "model.safetensors").items():
            if name.startswith("decoder.lstm."):
                tensors[name] = padded(tensor, (4, narrow, *tensor.shape[1:])).flatten(0, 1)
            elif name.startswith(("decoder.", "encoder_projector.", "joint.")):
                tensors[name] = padded(tensor, tuple(tensor.shape))

    edit_tensors(folder, change)
    return folder


class Handler(SimpleHTTPRequestHandler):
    """The model folder, with the page as its index and the packages beside it, as a user would put them."""

    def translate_path(self, path: str) -> str:
        parts = Path(urlsplit(path).path.lstrip("/"))
        root = PACKAGES.parent if parts.parts[:1] == (PACKAGES.name,) else Path(self.directory)
        return str(root / parts if parts.name else BROWSER_PAGE)

    def log_message(self, *_args) -> None:
        pass


def browse(folder: Path, backend: str = "wasm", flags: str = "", clips=SPOKEN) -> dict:
    """What the page shows for each clip (`texts`), what it asked for (`requests`), and the `adapter` of WebGPU."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/?backend={backend}"
    try:
        done = subprocess.run(
            ["node", DRIVER, CHROMIUM, url, flags, *clips], cwd=PACKAGES.parent, capture_output=True, text=True
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return widen(tmp_path_factory.mktemp("checkpoint") / "wide.nemo", 640)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    models = export_for_every_runtime(checkpoint, tmp_path_factory.mktemp("browser") / "onnx_models")
    shutil.rmtree(models / "sherpa-onnx")  # of the others, GenAI's has the features that calibration reads
    return models


@pytest.fixture(scope="module")
def spoken_texts(nemo_texts) -> list[str]:
    return nemo_texts[: len(SPOKEN)]


def test_transcribes_as_nemo_does(exported, spoken_texts):
    shown = browse(exported / "onnx-asr")
    assert shown["texts"] == spoken_texts
    assert all(urlsplit(url).hostname == "127.0.0.1" for url in shown["requests"] if url.startswith("http"))


@pytest.mark.parametrize("bits", [(), ("--weight_bits", "4")], ids=["int8", "int8 of 4 bits"])
def test_int8_transcribes_as_nemo_does(bits, exported, spoken_texts, tmp_path):
    argv = ("--model_dir", str(exported), "--output_dir", str(tmp_path / "int8"), "--quant_method", "int8", *bits)
    argv += ("--decoder_joint_precision", "int8", "--calibration_manifest", str(MANIFEST))
    assert optimize_encoder.main(list(argv)) == 0
    assert browse(tmp_path / "int8" / "onnx-asr")["texts"] == spoken_texts


@pytest.fixture(scope="module")
def ternary(tmp_path_factory) -> Path:
    """The bundled ternary checkpoint for onnx-asr, in float32."""
    place = tmp_path_factory.mktemp("ternary")
    checkpoint = widen_transformers(REDUX, place / "wide", 640)
    return export_for_every_runtime(checkpoint, place / "onnx_models") / "onnx-asr"


@pytest.fixture(scope="module")
def ternary_texts() -> list[str]:
    reference = Transformers(find_checkpoint(str(REDUX)).load_model())
    features = [reference.features(load_clip(Clip(clip), 16000, 0)) for clip in SPOKEN]
    return [reference.transcribe(each).text for each in features]


@pytest.mark.parametrize("flags", [("--quant_method", "int8"), ("--weight_bits", "2")], ids=["int8", "2 bits"])
def test_a_ternary_checkpoint_transcribes_as_transformers_does(flags, ternary, ternary_texts, tmp_path):
    """ONNX Runtime Web 1.24 unpacks the weights, and has the kernel for blocks of 2 bits."""
    argv = ["--model_dir", str(ternary), "--output_dir", str(tmp_path / "optimized"), *flags]
    assert optimize_encoder.main(argv) == 0
    assert browse(tmp_path / "optimized")["texts"] == ternary_texts


@pytest.fixture(scope="module")
def float16(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float16") / "onnx_models"
    argv = ["--model_name", str(checkpoint), "--output_dir", str(folder), "--precision", "fp16", "--skip_verify"]
    assert export_parakeet_to_onnx.main([*argv, "--runtime", "onnx-asr"]) == 0
    return folder / "onnx-asr"


def test_float16_transcribes_as_nemo_does(float16, spoken_texts):
    assert browse(float16)["texts"] == spoken_texts


@pytest.fixture(scope="module")
def on_webgpu(exported) -> dict:
    """What the page shows with the float32 folder on WebGPU."""
    return browse(exported / "onnx-asr", "webgpu-hybrid", WEBGPU)


def test_webgpu_transcribes_as_nemo_does(on_webgpu, spoken_texts):
    if on_webgpu["adapter"] is None:
        pytest.skip("this Chromium has no WebGPU adapter: parakeet.js went on with WebAssembly")
    assert on_webgpu["texts"] == spoken_texts


def test_float16_on_webgpu_transcribes_as_nemo_does(on_webgpu, float16, spoken_texts):
    adapter = on_webgpu["adapter"]
    if adapter is None or "shader-f16" not in adapter["features"]:
        pytest.skip(f"no WebGPU adapter with shader-f16 in this Chromium: {adapter and adapter['name']}")
    assert browse(float16, "webgpu-hybrid", WEBGPU)["texts"] == spoken_texts
