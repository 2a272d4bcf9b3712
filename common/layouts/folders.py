"""The folders of one export: which layouts it writes, into which subfolders, and the files of each."""

from collections.abc import Iterable
from pathlib import Path

from common.checkpoint.format import format_of
from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import parse_model, tokens_text
from common.layouts.genai import GENAI
from common.layouts.layout import LAYOUTS, Layout, Window, write_configs, write_views

ALL = "all"  # every runtime that has a layout


def subfolders_of(runtime: str, *, float16: bool) -> dict[Layout, str]:
    """Each layout that `--runtime` stands for, and its subfolder, which is empty for a folder of GenAI alone.

    Raises ValueError for float16 weights of another runtime.
    """
    if float16 and runtime != GENAI.runtime:
        raise ValueError(
            f"expected --runtime {GENAI.runtime} with --precision fp16, got {runtime}; export them separately"
        )
    if runtime == GENAI.runtime:
        return {GENAI: ""}
    layouts = LAYOUTS.values() if runtime == ALL else (LAYOUTS[runtime],)
    return {layout: layout.runtime for layout in layouts}


def read_vocabulary(checkpoint: Path, layouts: Iterable[Layout]) -> str:
    """The vocabulary of a checkpoint as `write_layout` writes it; empty where no layout needs it."""
    needed = any(layout.exports_vocabulary for layout in layouts)
    return tokens_text(parse_model(format_of(checkpoint).read_tokenizer(checkpoint))) if needed else ""


def write_layout(
    layout: Layout, graphs: Path, folder: Path, spec: ModelSpec, window: Window, device: str, vocabulary: str
) -> None:
    """Write what the runtime of `layout` reads, the tokenizer of GenAI excepted, into `folder`.

    graphs: the folder of the exported graphs, of which the layout's are views. Raises as write_views does.
    """
    folder.mkdir(exist_ok=True)
    write_views(layout, graphs, folder, spec)
    write_configs(layout, folder, spec, window, device)
    if layout.exports_vocabulary:
        (folder / layout.vocabulary[0]).write_text(vocabulary, encoding="utf-8", newline="\n")
