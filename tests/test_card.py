"""The model card: valid front matter, a snippet that runs, no invented licence, and no loss of a card made by hand."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import soundfile
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from onnx import TensorProto, helper

import export_tokenizer
from common.checkpoint import read_terms
from common.folder import sha256
from common.layouts.genai import GENAI
from common.layouts.onnx_asr import BROWSER_PAGE, ONNX_ASR
from common.layouts.sherpa_onnx import SHERPA_ONNX
from common.onnx_io import INT4, MATMUL_NBITS, OPSETS, minimum_runtime
from common.optimize import _publishing_advice
from common.quantize.methods import OptimizeOptions
from common.report.card import CARD, PUBLISHED, front_matter, model_card
from tests.helpers import ROOT, SAMPLES, TINY

MANIFEST = {
    "export": {
        "source": {"name": "nvidia/parakeet-tdt-0.6b-v2", "commit": "f" * 40, "sha256": "0" * 64},
        "flags": {"runtime": "genai", "opset_version": 17, "device": "cpu", "skip_verify": False, "scripts": None},
        "versions": {"onnxruntime-genai": "0.18.0", "torch": "2.13.0"},
        "minimum_onnxruntime": "1.12",
        "parity": {"encoder.onnx": {"max_abs": 1.23e-5, "max_rel": 4.56e-7, "cases": 9}},
    },
    "optimize": {
        "flags": {"quant_method": "rtn", "block_size": 32, "skip_fusion": True},
        "versions": {"onnxruntime": "1.32.0"},
        "minimum_onnxruntime": "1.17",
        "weights_by_bits": {"4": 337, "8": 1},
        "encoder_bytes": {"exported": 2_435_000_000, "optimized": 383_000_000},
        "cpus": "every CPU",
        "runs_as": "weights of 4 bits times activations rounded to int8",
        "sqnr_db_on_noise": 17.25,
        "token_sqnr_db_on_noise": {"decoder": 54.0},
        "wer": {"float32": {"errors": 5, "words": 80, "low": 2.5, "high": 10.0}},
    },
    "files": {"README.md": {"bytes": 1, "sha256": ""}, "encoder.onnx": {"bytes": 1_500_000, "sha256": ""}},
}
# The card of that manifest, except for the code under "Use", which `test_the_snippet_runs` runs.
BEFORE_THE_CODE = f"""\
---
license: cc-by-4.0
language:
- en
library_name: onnxruntime-genai
pipeline_tag: automatic-speech-recognition
base_model: nvidia/parakeet-tdt-0.6b-v2
base_model_relation: quantized
tags:
- onnx
- onnxruntime
- onnxruntime-genai
- parakeet
- fastconformer
- tdt
- transducer
- speech
- 4-bit
- 8-bit
---

# parakeet-tdt-0.6b-v2, ONNX

[nvidia/parakeet-tdt-0.6b-v2](https://huggingface.co/nvidia/parakeet-tdt-0.6b-v2), a FastConformer-TDT model for \
speech recognition made with NeMo, as ONNX graphs: encoder, prediction network and joint, with tokenizer and \
configuration. The checkpoint's SHA-256 is `{"0" * 64}`.

These files are an adaptation of it under the same licence, [CC-BY-4.0]\
(https://creativecommons.org/licenses/by/4.0/): give credit to its authors, and say what was changed.

## Use

In this folder, with `pip install onnxruntime-genai==0.18.0 soundfile soxr` (the graphs need ONNX Runtime 1.17 or \
newer):

"""
AFTER_THE_CODE = f"""

## Files

| file | size |
|---|---|
| `encoder.onnx` | 1.5 MB |
| `manifest.json` | checksums, versions, measurements |

## How it was made

```bash
python export_parakeet_to_onnx.py --model_name nvidia/parakeet-tdt-0.6b-v2 --revision {"f" * 40} --runtime genai \
--opset_version 17 --device cpu
python optimize_encoder.py --quant_method rtn --block_size 32 --skip_fusion
```

With onnxruntime 1.32.0, onnxruntime-genai 0.18.0, torch 2.13.0.

## Measured

Largest difference from the modules of NeMo, over short and long inputs and batches of unequal lengths, as exported:

| graph | largest difference | of the largest value | comparisons |
|---|---|---|---|
| `encoder.onnx` | 1.2e-05 | 4.6e-07 | 9 |

Weights of the encoder: 337 at 4 bits, 1 at 8 bits; 2.4 GB became 383 MB. The embedding and the LSTM of the decoder \
and the matrices of the joint have 8 bits. Weights of 4 bits times activations rounded to int8. For every CPU. Signal \
to quantization noise ratio on noise: encoder 17.25 dB, decoder 54.0 dB.

| | WER | 95 % interval | words |
|---|---|---|---|
| float32 | 6.25 % | 2.50 – 10.00 % | 80 |
"""


def test_a_card_has_this_text():
    before, code, after = model_card(MANIFEST, GENAI).split("```", 2)
    assert before == BEFORE_THE_CODE
    assert code.startswith("python\n")
    assert after == AFTER_THE_CODE


def manifest_of(folder, name=None):
    manifest = json.loads((folder / "manifest.json").read_text())
    if name:
        manifest["export"]["source"] = {"name": name, "sha256": "0" * 64}
    return manifest


@pytest.mark.parametrize("name", [None, *PUBLISHED, "somebody/parakeet-finetuned"])
def test_front_matter(name, tiny_optimized):
    text = model_card(manifest_of(tiny_optimized, name), GENAI)
    card = ModelCard(text)  # raises where Hugging Face would not read it
    found = yaml.safe_load(text.split("---\n")[1])
    assert found == card.data.to_dict()
    assert found["pipeline_tag"] == "automatic-speech-recognition"
    assert found.get("base_model") == name
    if name in PUBLISHED:
        assert found["license"] == "cc-by-4.0"
        assert "en" in found["language"]
        assert "CC-BY-4.0" in card.text
    else:
        assert found["license"] == "other"
        assert "language" not in found
        assert "licence is not known" in card.text
    if name:
        assert found["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: cc-by-sa-4.0\nlanguage: en\n---\n", {"license": "cc-by-sa-4.0", "language": ["en"]}),
        (
            "---\r\nlicense: other\r\nlicense_name: nvidia-open\r\nlicense_link: LICENSE\r\n---\r\n# x",
            {"license": "other", "license_name": "nvidia-open", "license_link": "LICENSE"},
        ),
        ("---\nlicense: mit\nlanguage: [en, no]\n---", {"license": "mit"}),  # YAML reads `no` as false
        ("---\nlicense: other\nlicense_name: unknown\n---\n", {}),  # as in a card that this project writes
        ("---\nlicense: unknown\n---\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense: a](http://b)\n---\n", {}),
        ('---\nlicense: "two\\nlines"\n---\n', {}),
        ("---\nlicense: !!python/object/apply:os.system [id]\n---\n", {}),
        ("---\nlicense: {mit\n---\n", {}),
        (f"---\n{'[' * 5000}\n---\n", {}),
        ("# A model\n\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_terms_are_read_from_a_card_that_may_hold_anything(card, expected, tmp_path):
    path = tmp_path / CARD
    path.write_bytes(card.encode())
    assert read_terms(path) == expected
    path.unlink()
    assert read_terms(path) == {}


def test_the_licence_is_that_of_the_checkpoint_s_own_card():
    """It goes before the one that is known by name, which still gives the languages."""
    source = {**MANIFEST["export"]["source"], "terms": {"license": "cc-by-nc-sa-4.0"}}
    text = model_card({**MANIFEST, "export": {**MANIFEST["export"], "source": source}}, GENAI)
    assert text.startswith("---\nlicense: cc-by-nc-sa-4.0\nlanguage:\n- en\n")
    assert "[CC-BY-NC-SA-4.0](https://creativecommons.org/licenses/by-nc-sa/4.0/)" in text
    source["terms"] = {"license": "other", "license_name": "house-rules", "license_link": "LICENSE"}
    text = model_card({**MANIFEST, "export": {**MANIFEST["export"], "source": source}}, GENAI)
    link = f"https://huggingface.co/nvidia/parakeet-tdt-0.6b-v2/blob/{'f' * 40}/LICENSE"
    assert f"license: other\nlanguage:\n- en\nlicense_name: house-rules\nlicense_link: {link}\n" in text
    assert f"Its own card gives its licence as [house-rules]({link})." in text
    source["terms"] = {"license": "cc-by-nd-4.0"}
    text = model_card({**MANIFEST, "export": {**MANIFEST["export"], "source": source}}, GENAI)
    assert "Its own card gives its licence as `cc-by-nd-4.0`." in text


def test_figures_are_the_manifest_s(tiny_optimized, tiny_export):
    manifest = manifest_of(tiny_optimized)
    text = (tiny_optimized / CARD).read_text()
    assert f"| `encoder.onnx` | {manifest['export']['parity']['encoder.onnx']['max_abs']:.1e} |" in text
    assert f"encoder {manifest['optimize']['sqnr_db_on_noise']} dB" in text
    listed = set(re.findall(r"^\| `(\S+)` \| [\d.]+ (?:[kMG]?B)", text, re.M))
    assert listed | {CARD, "manifest.json"} == {path.name for path in tiny_optimized.iterdir() if path.is_file()}
    assert "--quant_method rtn --block_size 32" in text
    assert "--skip_fusion" not in text
    assert str(TINY.parents[1]) not in text
    assert "Signal to quantization noise" not in (tiny_export / CARD).read_text()
    assert "mono[: len(mono) // 160 * 160], 16000, " in text
    manifest["export"] |= {"sample_rate": 8000, "hop_length": 80}
    assert "mono[: len(mono) // 80 * 80], 8000, " in model_card(manifest, GENAI)
    unverified = manifest_of(tiny_export)
    unverified["export"]["parity"] = {}
    assert "not verified" in model_card(unverified, GENAI)


def graph(opset, operator="Identity", dtype=TensorProto.FLOAT, domain="", **attributes):
    """A graph with one node, and one initializer of that type."""
    weight = helper.make_tensor("w", dtype, [2], bytes(2 * 4) if dtype == TensorProto.FLOAT else bytes(1), raw=True)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    node = helper.make_node(operator, ["x"], ["y"], domain=domain, **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    content = helper.make_graph([node], "g", [value], [output], [weight])
    return helper.make_model(content, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (graph(17), "1.12"),
        (graph(21), "1.18"),
        (graph(17, "MatMulNBits", domain="com.microsoft", bits=4), "1.17"),
        (graph(20, "MatMulNBits", domain="com.microsoft", bits=8), "1.22"),
        (graph(17, "MatMulNBits", domain="com.microsoft", bits=2), "1.24"),
        (graph(21, dtype=TensorProto.INT4), "1.23"),
        (graph(25, dtype=TensorProto.INT2), "1.24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_oldest_onnxruntime_is_that_of_the_newest_part(model, expected, tmp_path):
    for name, content in (("a.onnx", model), ("b.onnx", graph(17))):
        onnx.save(content, tmp_path / name)
    assert minimum_runtime(sorted(tmp_path.iterdir())) == expected


def test_the_oldest_runtimes_of_the_documentation_are_those_of_the_code():
    page = (ROOT / "docs/runtimes.md").read_text(encoding="utf-8")
    rows = page.split("| what a graph has | oldest ONNX Runtime |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    opsets = dict(zip(map(int, re.findall(r"\d+", cells[0][0])), re.findall(r"1\.\d+", cells[0][1]), strict=True))
    assert opsets == {opset: f"{major}.{minor}" for opset, (major, minor) in OPSETS.items()}
    bits = {int(re.search(r"(\d) bits", what)[1]): oldest for what, oldest in cells[1:-1]}
    assert bits == {bits: f"{major}.{minor}" for bits, (major, minor) in MATMUL_NBITS.items()}
    assert cells[-1][1] == f"{INT4[0]}.{INT4[1]}"


def test_a_second_name_is_called_that_and_publishing_one_leaves_it_out(capsys):
    weights = {"bytes": 5_000_000, "sha256": "1"}
    listed = {"encoder.int8.onnx": weights, "encoder.onnx": weights, "tokens.txt": {"bytes": 1, "sha256": "2"}}
    text = model_card({"files": listed}, SHERPA_ONNX)
    assert "| `encoder.int8.onnx` | 5.0 MB |" in text
    assert "| `encoder.onnx` | the same file as `encoder.int8.onnx`: one of them is enough |" in text
    advice = _publishing_advice(Path("models"), SHERPA_ONNX, OptimizeOptions(quant_method="int8"))
    assert advice.endswith("hf upload YOUR_NAME/YOUR_MODEL models --exclude '*.int8.onnx'")
    assert [*filter_repo_objects(listed, ignore_patterns=[shlex.split(advice)[-1]])] == ["encoder.onnx", "tokens.txt"]
    assert _publishing_advice(Path("models"), GENAI, OptimizeOptions(quant_method="int8")) is None


def test_the_card_names_the_oldest_onnxruntime_and_the_bits(tiny_export, tiny_optimized):
    assert "(the graphs need ONNX Runtime 1.12 or newer)" in (tiny_export / CARD).read_text()
    assert "(the graphs need ONNX Runtime 1.17 or newer)" in (tiny_optimized / CARD).read_text()
    assert "4-bit" in front_matter(manifest_of(tiny_optimized), GENAI)["tags"]
    manifest = manifest_of(tiny_optimized)
    del manifest["optimize"]["minimum_onnxruntime"]  # as folders of earlier versions
    assert "or newer" not in model_card(manifest, GENAI)


def test_card_and_documentation_have_the_page_that_runs_in_a_browser(tiny_export):
    """tests/test_browser.py runs it, with these versions of the packages."""
    page = f"```html\n{BROWSER_PAGE.read_text(encoding='utf-8')}```"
    packages = json.loads((ROOT / "tests/browser/package.json").read_text())["dependencies"]
    command = f"npm install parakeet.js@{packages['parakeet.js']} onnxruntime-web@{packages['onnxruntime-web']}"
    for text in (
        model_card(manifest_of(tiny_export), ONNX_ASR),
        (ROOT / "docs/runtimes.md").read_text(encoding="utf-8"),
    ):
        assert page in text
        assert command in text


def test_word_errors_where_there_are_any(tiny_optimized):
    rows = {"float32": {"errors": 5, "words": 80, "low": 2.5, "high": 10.0}}
    manifest = manifest_of(tiny_optimized)
    manifest["optimize"]["wer"] = rows
    assert "| float32 | 6.25 % | 2.50 – 10.00 % | 80 |" in model_card(manifest, GENAI)
    assert "WER" not in model_card(manifest_of(tiny_optimized), GENAI)


def test_the_snippet_runs(tiny_optimized, tmp_path):
    folder = tmp_path / "downloaded"
    shutil.copytree(tiny_optimized, folder)
    samples, rate = soundfile.read(SAMPLES / "clips" / "029_hibari.flac")
    soundfile.write(folder / "audio.wav", samples, rate)
    snippet = re.search(r"```python\n(.*?)```", (folder / CARD).read_text(), re.S).group(1)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "We have 13 black fans.", done.stderr


def test_cuda_names_its_package(tiny_export):
    manifest = manifest_of(tiny_export)
    manifest["export"]["flags"]["device"] = "cuda"
    assert "pip install onnxruntime-genai-cuda==" in model_card(manifest, GENAI)


def test_only_an_unedited_card_is_replaced(tiny_export, tmp_path, capsys):
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    argv = ["--model_name", os.path.relpath(TINY), "--output_dir", str(folder)]
    card = folder / CARD
    before = card.read_bytes()
    assert export_tokenizer.main(argv) == 0
    assert card.read_bytes() == before
    assert manifest_of(folder)["files"][CARD]["sha256"] == sha256(card)
    assert "by hand" not in capsys.readouterr().out

    card.write_text("mine")
    for _ in range(2):  # after the first run it still counts as made by hand
        assert export_tokenizer.main(argv) == 0
        assert card.read_text() == "mine"
        assert f"{card} was written or changed by hand and stays as it is" in capsys.readouterr().out
        assert CARD not in manifest_of(folder)["files"]
    card.unlink()
    assert export_tokenizer.main(argv) == 0
    assert card.read_bytes() == before


def test_front_matter_of_float16(tiny_export):
    manifest = manifest_of(tiny_export, "nvidia/parakeet-tdt-0.6b-v3")
    assert "base_model_relation" not in front_matter(manifest, GENAI)
    manifest["export"]["flags"]["precision"] = "fp16"
    assert front_matter(manifest, GENAI)["base_model_relation"] == "quantized"
    assert "float16" in front_matter(manifest, GENAI)["tags"]
