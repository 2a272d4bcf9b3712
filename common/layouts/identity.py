"""Whether the parts of a model folder belong to one checkpoint: the graphs, their configuration and the tokenizer.

The manifest has the SHA-256 of the checkpoint from which the graphs were exported (section `export`) and of the one
whose tokenizer was exported (section `tokenizer`). Where one of these is missing, as in a folder that was copied
without its manifest, only sizes are compared: the vocabulary in each file, and the logits of the last graph.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoint import nemo
from common.checkpoint.hub import hub_name
from common.cli import EXPORT_COMMAND, TOKENIZER_COMMAND, Command
from common.contract import GENAI_CONFIG, JOINT, TOKENIZER_FILES
from common.folder import CHECKPOINT, FILES, read_json, read_location, read_manifest
from common.layouts.genai import GENAI
from common.layouts.layout import Layout
from common.run.config import RuntimeConfig
from common.run.ort import MAPPED

OPTIMIZE_COMMAND = Command("python optimize_encoder.py --model_dir {} --output_dir {}")
REPORT_FILES = ("optimization_report.json", "optimization_report.html")
# The most durations that a TDT may have (published ones have 5); with more, the vocabulary is of another model.
MAX_DURATIONS = 32


def check_one_checkpoint(folder: Path, layout: Layout = GENAI) -> None:
    """Raise ValueError where parts of `folder` come from different checkpoints, FileNotFoundError where one is missing.

    The message names the command that repairs the folder.
    """
    graphs = _source(folder, "export")
    tokenizer = _source(folder, "tokenizer")
    if graphs and tokenizer and graphs["sha256"] != tokenizer["sha256"]:
        raise ValueError(
            f"expected graphs and tokenizer of one checkpoint in {folder}, got graphs of {_named(graphs)} and a "
            f"tokenizer of {_named(tokenizer)}; run: {_tokenizer_command(folder)}"
        )
    _check_sizes(folder, layout)


def _check_sizes(folder: Path, layout: Layout) -> None:
    width = MAPPED(folder, layout.graphs[-1]).output_width
    if layout is not GENAI:
        tokens = layout.vocabulary_size(folder)
        if not 0 < width - tokens <= MAX_DURATIONS:
            raise ValueError(
                f"expected a vocabulary for the {width} logits of {layout.graphs[-1].file} in {folder}, durations "
                f"included, got {tokens} tokens in {layout.vocabulary[0]}; export the folder again"
            )
        return
    config = RuntimeConfig.read(folder)
    tokens = config.blank_id + 1
    if tokens + len(config.durations) != width:
        raise ValueError(
            f"expected {tokens} + {len(config.durations)} logits by genai_config.json in {folder}, got {width} from "
            f"{JOINT.file}: they are of different checkpoints; run: {EXPORT_COMMAND.format(folder)}"
        )
    for file, size in _tokenizer_sizes(folder).items():
        if size != tokens:
            raise ValueError(
                f"expected a tokenizer of {tokens} tokens, blank included, for the graphs in {folder}, got {size} in "
                f"{file}: they are of different checkpoints; run: {_tokenizer_command(folder)}"
            )


def _tokenizer_sizes(folder: Path) -> dict[str, int]:
    """Tokens, blank included, in each file that lists them; a copied folder may lack vocab.txt."""
    path = folder / "tokenizer.json"
    content = read_json(path, TOKENIZER_COMMAND.format(folder))
    try:
        sizes = {path.name: len(content["model"]["vocab"])}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"expected a Unigram tokenizer of this project in {path}, got another file ({error!r})"
        ) from None
    if (folder / "vocab.txt").is_file():
        sizes["vocab.txt"] = GENAI.vocabulary_size(folder)
    return sizes


def check_same_checkpoint(folder: Path, exported: Path) -> None:
    """Raise ValueError where `folder` was optimized from graphs of another checkpoint than `exported` has now."""
    optimized = _source(folder, "export")
    source = _source(exported, "export")
    if optimized and source and optimized["sha256"] != source["sha256"]:
        command = OPTIMIZE_COMMAND.format(exported, folder)
        raise ValueError(
            f"expected {folder} and {exported}, which it was optimized from, to be of one checkpoint, got "
            f"{_named(optimized)} and {_named(source)}; run: {command}"
        )


def check_name_for_graphs(folder: Path, model_name: str) -> None:
    """Raise ValueError where a tokenizer of `model_name` on Hugging Face cannot belong to the graphs in `folder`.

    The name in the manifest decides, so that this shows before a download that may take an hour. A path is not checked.
    """
    graphs = _source(folder, "export")
    name = hub_name(model_name)
    if graphs and name is not None and graphs.get("name") != name:
        raise ValueError(
            f"expected --model_name of the checkpoint that {folder} was exported from, {_named(graphs)}, got "
            f"{model_name}; run: {_tokenizer_command(folder)}"
        )


def check_tokenizer_for_graphs(folder: Path, source: Mapping[str, Any], tokens: int) -> None:
    """Raise ValueError where a tokenizer does not belong to the graphs in `folder`, if there are any.

    source: the record of the tokenizer's checkpoint. tokens: the number of its tokens, blank included.
    """
    graphs = _source(folder, "export")
    if graphs and graphs["sha256"] != source["sha256"]:
        raise ValueError(
            f"expected the checkpoint that {folder} was exported from, {_named(graphs)}, got {_named(source)}; run: "
            f"{_tokenizer_command(folder)}"
        )
    if not (folder / GENAI_CONFIG).is_file():
        return
    expected = RuntimeConfig.read(folder).blank_id + 1
    if tokens != expected:
        raise ValueError(
            f"expected a tokenizer of {expected} tokens, blank included, for the graphs in {folder}, got one of "
            f"{tokens} in {_named(source)}; run: {_tokenizer_command(folder)}"
        )


def kept_by_export(
    folder: Path, source: Mapping[str, Any], layout: Layout = GENAI
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What remains in `folder` when the checkpoint `source` is exported into it: a manifest, and the files to remove.

    The report of an optimization is about the former graphs and is removed. A tokenizer is kept if the manifest says
    that it is of the same checkpoint; one of unknown origin (an older manifest, or none) is removed, since exporting
    the tokenizer is the next step. The export writes the vocabulary of other layouts itself.
    """
    manifest = dict(read_manifest(folder))
    removed = set(REPORT_FILES)
    manifest.pop("optimize", None)
    tokenizer = _source(folder, "tokenizer")
    if layout is GENAI and (tokenizer is None or tokenizer["sha256"] != source["sha256"]):
        manifest.pop("tokenizer", None)
        removed |= set(TOKENIZER_FILES)
    files = manifest.get(FILES, {})
    manifest[FILES] = {name: entry for name, entry in files.items() if name not in removed}
    return manifest, tuple(sorted(name for name in removed if (folder / name).is_file()))


def _source(folder: Path, section: str) -> dict[str, Any] | None:
    """The record of the checkpoint in a section of the manifest, or None where there is none."""
    source: dict[str, Any] = read_manifest(folder).get(section, {}).get("source") or {}
    return source if "sha256" in source else None


def _named(source: Mapping[str, Any]) -> str:
    return f"{source.get('name') or source.get('file')} (SHA-256 {source['sha256'][:8]}…)"


def _tokenizer_command(folder: Path) -> str:
    """The command that exports the tokenizer of the graphs in `folder`."""
    graphs = _source(folder, "export") or {}
    path = read_location(folder, CHECKPOINT)
    name = graphs.get("name") or (str(path.resolve()) if path else "CHECKPOINT_OF_THE_GRAPHS")
    command = Command(f"{TOKENIZER_COMMAND} --model_name {{}}").format(folder, name)
    for flag, key in (("--revision", "revision"), ("--checkpoint_format", "format")):
        if "name" in graphs and graphs.get(key) not in (None, nemo.NAME):
            command += Command(" {} {}").format(flag, graphs[key])
    return command
