"""How much time and memory an encoder takes to load, by how its weights are stored on disk.

    python -m benchmarks.loading build/bench/int8_weight_bits_4_decoder_joint_precision_int8_calibrated

For each folder these forms of the encoder are made, and loaded in fresh processes that take turns: as it was written;
with data that is not aligned, so that it cannot be mapped; with 4-bit weights joined to a few large ones; in one .onnx
file; and the optimized graph that ONNX Runtime saves, whose 4-bit weights are unpacked, with the weights as they are
and packed for this CPU's kernels. A figure is the median over rounds; files are in the page cache. Memory is the peak
of the process until the session exists, without what the imports took. Expect three minutes a folder at 0.6B, and
4 GB of disk.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from benchmarks.bench import machine, peak_memory, process
from common.cli import size_text
from common.contract import ENCODER
from common.onnx_io import load, save_model
from common.quantize.int8 import packed_tensor
from common.run.ort import open_session

ROUNDS = 5
DATA = ENCODER.data_file


def as_written(source: Path, target: Path) -> None:
    for file in source.glob(f"{ENCODER.file}*"):
        (target / file.name).symlink_to(file.resolve())


def unaligned(source: Path, target: Path) -> None:
    ir.save(load(source / ENCODER.file), target / ENCODER.file, external_data=DATA, alignment=1)


def joined(source: Path, target: Path) -> None:
    """Write the encoder with the 4-bit weights of each shape stacked in one tensor, which a Split takes apart again."""
    model = load(source / ENCODER.file)
    groups: dict[tuple[int, ...], list[ir.Node]] = {}
    for node in model.graph:
        stored = node.inputs[0] if node.op_type == "Cast" else None
        if stored is not None and stored.const_value is not None and stored.const_value.dtype == ir.DataType.INT4:
            groups.setdefault(tuple(stored.const_value.shape.numpy()), []).append(node)
    for i, nodes in enumerate(groups.values()):
        weights = [node.inputs[0].const_value.numpy() for node in nodes]
        stacked = packed_tensor(f"joined.{i}", np.concatenate(weights), ir.DataType.INT4)
        whole = Tape(model.graph).initializer(stacked)
        cast = ir.Node("", "Cast", [whole], [ir.AttrInt64("to", ir.DataType.INT8)])
        attributes = [ir.AttrInt64("axis", 0), ir.AttrInt64("num_outputs", len(nodes))]
        split = ir.Node("", "Split", [cast.outputs[0]], attributes, num_outputs=len(nodes))
        model.graph.insert_before(nodes[0], [cast, split])
        for node, part in zip(nodes, split.outputs, strict=True):
            ir.convenience.replace_all_uses_with(node.outputs[0], part)
            model.graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
    ir.save(model, target / ENCODER.file, external_data=DATA)


def one_file(source: Path, target: Path) -> None:
    save_model(load(source / ENCODER.file), target / ENCODER.file, single_file=True)


def saved(source: Path, target: Path, **entries: str) -> None:
    """Save ONNX Runtime's optimized graph. Paths of data are relative to the target."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target / ENCODER.file)
    keys = {"session.optimized_model_external_initializers_file_name": DATA, **entries}
    open_session(source / ENCODER.file, entries=keys, options=options)


def saved_prepacked(source: Path, target: Path) -> None:
    saved(source, target, **{"session.save_external_prepacked_constant_initializers": "1"})


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "as written": as_written,
    "not aligned": unaligned,
    "4-bit weights joined by shape": joined,
    "one file": one_file,
    "saved by ONNX Runtime": saved,
    "saved, packed for the kernels": saved_prepacked,
}


def load_session(graph: Path) -> tuple[float, int]:
    """Seconds and bytes that a session of the graph takes, in this process."""
    import onnxruntime  # noqa: F401

    before = peak_memory()
    start = time.perf_counter()
    session = open_session(graph)
    seconds = time.perf_counter() - start
    assert session.get_inputs()
    return seconds, peak_memory() - before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="model folders")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="fresh processes of each form (%(default)s)")
    args = parser.parse_args(argv)
    print(f"{machine()}; {args.rounds} rounds\n\n| encoder | form | size | load | peak memory |\n|---|---|---|---|---|")
    for folder in args.folders:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            targets = {name: Path(scratch) / str(i) for i, name in enumerate(FORMS)}
            for name, target in targets.items():
                target.mkdir()
                with process() as worker:
                    worker.submit(FORMS[name], folder, target).result()
            results: dict[str, list[tuple[float, int]]] = {name: [] for name in FORMS}
            for _ in range(args.rounds):
                for name, target in targets.items():
                    with process() as worker:
                        results[name].append(worker.submit(load_session, target / ENCODER.file).result())
            for name, target in targets.items():
                size = size_text(sum(file.stat().st_size for file in target.iterdir()))
                seconds, memory = (median(values) for values in zip(*results[name], strict=True))
                print(f"| {folder.name} | {name} | {size} | {seconds:.2f} s | {size_text(memory)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
