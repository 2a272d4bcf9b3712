"""The folders of one export: which layouts it writes, into which subfolders, and the files of each."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.checkpoint.find import format_of
from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import parse_model
from common.layouts.genai import GENAI
from common.layouts.layout import LAYOUTS, Layout, Window, write_configs, write_views

ALL = "all"  # every runtime that has a layout


def subfolders_of(runtime: str) -> dict[Layout, str]:
    """Each layout that `--runtime` stands for, and the name of its subfolder, which is empty for GenAI alone."""
    if runtime == GENAI.runtime:
        return {GENAI: ""}
    layouts = LAYOUTS.values() if runtime == ALL else (LAYOUTS[runtime],)
    return {layout: layout.runtime for layout in layouts}


def read_vocabulary(checkpoint: Path, layouts: Iterable[Layout]) -> dict[str, str]:
    """The files of the vocabulary that `write_layout` writes, by name; empty where no layout needs one."""
    named = (
        zip(layout.vocabulary, layout.vocabulary_texts, strict=True) for layout in layouts if layout.vocabulary_texts
    )
    texts = dict(itertools.chain.from_iterable(named))
    if not texts:
        return {}
    proto = parse_model(format_of(checkpoint).read_tokenizer(checkpoint))
    return {name: text(proto) for name, text in texts.items()}


def write_layout(
    layout: Layout,
    graphs: Path,
    folder: Path,
    spec: ModelSpec,
    window: Window,
    device: str,
    vocabulary: Mapping[str, str],
) -> None:
    """Write into `folder` what the runtime of `layout` reads, except for the tokenizer of GenAI.

    graphs: the folder of the exported graphs; the layout's graphs are views of them. Raises as write_views does.
    """
    folder.mkdir(exist_ok=True)
    write_views(layout, graphs, folder, spec)
    write_configs(layout, folder, spec, window, device)
    if layout.vocabulary_texts:
        for name in layout.vocabulary:
            (folder / name).write_text(vocabulary[name], encoding="utf-8", newline="\n")
