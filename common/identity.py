"""Whether the parts of a model folder are of one checkpoint: the graphs, their configuration and the tokenizer.

The manifest has the SHA-256 of the checkpoint that step 1 (section `export`) and step 2 (section `tokenizer`) read.
Where it lacks one of them, as in a folder that was copied without its manifest, only sizes are compared: those of the
vocabulary in each file, and what the graph that gives the logits puts out.
"""

import shlex
from pathlib import Path

from common.files import CHECKPOINT, FILES, read_json, read_location, read_manifest
from common.graphs import JOINT
from common.layouts import GENAI, Layout
from common.runtime import EXPORT_COMMAND, MAPPED, TOKENIZER_COMMAND, RuntimeConfig
from common.tokenizer import TOKENIZER_FILES

OPTIMIZE_COMMAND = "python optimize_encoder.py --model_dir {} --output_dir {}"
REPORT_FILES = ("optimization_report.json", "optimization_report.html")
# More durations than a TDT has (published ones have 5): beyond, the vocabulary is of another model.
MAX_DURATIONS = 32


def check_one_checkpoint(folder: Path, layout: Layout = GENAI) -> None:
    """Raise ValueError naming the command that repairs it where parts of `folder` are of different checkpoints; and
    FileNotFoundError where one is missing."""
    graphs, tokenizer = (_source(folder, section) for section in ("export", "tokenizer"))
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
            f"{JOINT.file}: they are of different checkpoints; run: {EXPORT_COMMAND.format(shlex.quote(str(folder)))}"
        )
    for file, found in _tokenizer_sizes(folder).items():
        if found != tokens:
            raise ValueError(
                f"expected a tokenizer of {tokens} tokens, blank included, for the graphs in {folder}, got {found} in "
                f"{file}: they are of different checkpoints; run: {_tokenizer_command(folder)}"
            )


def _tokenizer_sizes(folder: Path) -> dict[str, int]:
    """Tokens, blank included, by the files that list them; a copied folder may do without vocab.txt."""
    path = folder / "tokenizer.json"
    content = read_json(path, TOKENIZER_COMMAND.format(folder))
    try:
        sizes = {path.name: len(content["model"]["vocab"])}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a Unigram tokenizer of this project's ({error!r})") from None
    if (folder / "vocab.txt").is_file():
        sizes["vocab.txt"] = GENAI.vocabulary_size(folder)
    return sizes


def check_same_checkpoint(folder: Path, exported: Path) -> None:
    """Raise ValueError where `folder` was optimized from graphs of another checkpoint than `exported` has now."""
    one, other = _source(folder, "export"), _source(exported, "export")
    if one and other and one["sha256"] != other["sha256"]:
        command = OPTIMIZE_COMMAND.format(shlex.quote(str(exported)), shlex.quote(str(folder)))
        raise ValueError(
            f"expected {folder} and {exported}, which it was optimized from, to be of one checkpoint, got "
            f"{_named(one)} and {_named(other)}; run: {command}"
        )


def check_name_for_graphs(folder: Path, model_name: str) -> None:
    """Raise ValueError where a tokenizer of `model_name`, which is to be downloaded, cannot belong to the graphs that
    lie in `folder` by what its manifest says. Before the download, which may take an hour."""
    graphs = _source(folder, "export")
    to_download = not Path(model_name).exists() and Path(model_name).suffix != ".nemo"
    if graphs and to_download and graphs.get("name") != model_name:
        raise ValueError(
            f"expected --model_name of the checkpoint that {folder} was exported from, {_named(graphs)}, got "
            f"{model_name}; run: {_tokenizer_command(folder)}"
        )


def check_tokenizer_for_graphs(folder: Path, source: dict, tokens: int) -> None:
    """Raise ValueError where a tokenizer of `tokens` tokens, blank included, from the checkpoint `source` does not
    belong to the graphs that lie in `folder`; where there are none it may be the first part."""
    graphs = _source(folder, "export")
    if graphs and graphs["sha256"] != source["sha256"]:
        raise ValueError(
            f"expected the checkpoint that {folder} was exported from, {_named(graphs)}, got {_named(source)}; run: "
            f"{_tokenizer_command(folder)}"
        )
    if not (folder / "genai_config.json").is_file():
        return
    expected = RuntimeConfig.read(folder).blank_id + 1
    if tokens != expected:
        raise ValueError(
            f"expected a tokenizer of {expected} tokens, blank included, for the graphs in {folder}, got one of "
            f"{tokens} in {_named(source)}; run: {_tokenizer_command(folder)}"
        )


def kept_by_export(folder: Path, source: dict, layout: Layout = GENAI) -> tuple[dict, tuple[str, ...]]:
    """What an export of the checkpoint `source` into `folder` goes on with: its manifest, and the files to remove.

    New graphs end what an optimization said of the old ones. A tokenizer stays if the manifest says that it is of the
    same checkpoint; one of unknown origin (an older manifest, or none) goes, since step 2, which writes it, comes next.
    The export writes the vocabulary of other layouts itself.
    """
    manifest, removed = dict(read_manifest(folder)), set(REPORT_FILES)
    manifest.pop("optimize", None)
    tokenizer = _source(folder, "tokenizer")
    if layout is GENAI and (tokenizer is None or tokenizer["sha256"] != source["sha256"]):
        manifest.pop("tokenizer", None)
        removed |= set(TOKENIZER_FILES)
    files = manifest.get(FILES, {})
    manifest[FILES] = {name: entry for name, entry in files.items() if name not in removed}
    return manifest, tuple(sorted(name for name in removed if (folder / name).is_file()))


def _source(folder: Path, section: str) -> dict | None:
    """Where the parts that `section` of the manifest is about came from; None where it does not say so."""
    source = read_manifest(folder).get(section, {}).get("source")
    return source if source and "sha256" in source else None


def _named(source: dict) -> str:
    return f"{source.get('name') or source.get('file')} (SHA-256 {source['sha256'][:8]}…)"


def _tokenizer_command(folder: Path) -> str:
    """The command that gives `folder` the tokenizer of its graphs."""
    graphs = _source(folder, "export") or {}
    path = read_location(folder, CHECKPOINT)
    name = graphs.get("name") or (str(path.resolve()) if path else "CHECKPOINT_OF_THE_GRAPHS")
    revision = f" --revision {shlex.quote(graphs['revision'])}" if "revision" in graphs else ""
    output = TOKENIZER_COMMAND.format(shlex.quote(str(folder)))
    return f"{output} --model_name {shlex.quote(name)}{revision}"
