"""Command line, console output and exit codes of all scripts.

A script prints the name and the result of each stage to the standard output, and one line for an error or a warning to
the standard error. It exits with 0, 1 for a failed check, 2 for a command line or an input that cannot be used.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import math
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)

Item = TypeVar("Item")

EXIT_OK = 0
EXIT_CHECK = 1  # a check ran and failed, or the program itself did
EXIT_USAGE = 2  # the command line or an input file is not usable
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_CLOSED_OUTPUT = 141  # 128 + SIGPIPE: the program that read the output, such as `head`, has ended
INTERRUPTED = "interrupted; no output is half-written\n"
INSTALL_COMMAND = "pip install -r requirements.txt"


class CheckError(Exception):
    """A verification ran to its end and failed; the script exits with status 1."""


class Command(str):
    """A command to print, with `{}` for each argument. `format` quotes an argument for a shell where necessary."""

    def format(self, *args: object, **kwargs: object) -> str:
        return super().format(*(shlex.quote(str(value)) for value in args), **kwargs)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and the flag --verbose."""

    def __init__(self, description: str) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # `?` for a character that the terminal cannot encode
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--verbose", action="store_true", help="show the libraries' own log and full tracebacks")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message} (see --help)\n")


def seconds(text: str) -> float:
    """The value of a flag: a length in seconds, 0 or more. Raises ArgumentTypeError for any other number."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {text}")
    return float(text)


def count(text: str) -> int:
    """The value of a flag: a whole number, 1 or more. Raises ArgumentTypeError for any other whole number."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def options_of(kind: "type[T]", args: argparse.Namespace) -> "T":
    """An object of a dataclass whose fields have the names of flags, with their values. Raises as that class does."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `main(args)` and turn what it raises into one line on stderr and an exit status.

    CheckError gives 1. ValueError, OSError and ImportError report what cannot be used and give 2. Anything else is a
    defect of this program or of a library and gives 1. --verbose prints the traceback. An output whose reader has ended
    ends the script without a message, with the status that a shell gives for SIGPIPE.
    """
    if not args.verbose:
        quiet_libraries()
    try:
        main(args)
        sys.stdout.flush()  # so that a full disk is reported here, and not when the interpreter ends
        status = EXIT_OK
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        status = EXIT_CLOSED_OUTPUT
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        kind, status = f"unexpected {type(error).__name__}", EXIT_CHECK
        if isinstance(error, CheckError):
            kind = "check failed"
        elif isinstance(error, ValueError | OSError | ImportError):
            kind, status = "error", EXIT_USAGE
        hint = f"; run: {INSTALL_COMMAND}" if isinstance(error, ImportError) else ""
        print(f"{kind}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or the disk is full: without this, the interpreter reports it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def report_at_start(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sys.excepthook for what happens while a script imports what it needs: it reports a missing package, and that
    the script was interrupted, in one line and with the status that `run` gives."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write(INTERRUPTED)
        raise SystemExit(EXIT_INTERRUPTED)
    if issubclass(kind, ImportError) and "--verbose" not in sys.argv:
        sys.stderr.write(f"error: {error}; run: {INSTALL_COMMAND}\n")
        raise SystemExit(EXIT_USAGE)
    sys.__excepthook__(kind, error, trace)


def warn(message: str) -> None:
    """Print one line on stderr; the script continues."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


def quiet_libraries() -> None:
    """Hide the log and the warnings of NeMo, torch and ONNX Runtime."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # what NeMo logs as an error it also raises
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Hide what C libraries write to the standard error themselves (libmpg123 comments on every broken frame)."""
    sys.stderr.flush()
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


class Stages:
    """The numbered stages of a script: each prints its name when it starts, and what it measured when it ends.

    [2/6]  encoder
           2.4 GB → 540 MB  4.4 times smaller  19.0 s
    """

    def __init__(self, total: int, *, verbose: bool = False) -> None:
        """verbose: print the details of each stage, too."""
        self.total = total
        self.verbose = verbose
        self.number = 0
        self.since = 0.0  # time.perf_counter() at the start of the current stage

    def begin(self, name: str) -> None:
        """Print the number and the name of the next stage, before its work."""
        self.number += 1
        self.since = time.perf_counter()
        print(f"[{self.number}/{self.total}]  {name}", flush=True)

    def end(self, *results: str, details: Sequence[str] = ()) -> None:
        """Print what the current stage measured, and its seconds.

        details: what only a developer of this project needs; printed with --verbose.
        """
        fields = [*results, *(details if self.verbose else ()), f"{time.perf_counter() - self.since:.1f} s"]
        print(" " * len(f"[{self.number}/{self.total}]  ") + "  ".join(fields), flush=True)


def progress(items: Iterable[Item], *, total: int, task: str, unit: str) -> Iterator[Item]:
    """The items, with a bar that counts them."""
    with progress_bar(total=total, task=task, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()


def progress_bar(*, total: float | None, task: str, unit: str, shown: bool = True) -> Any:
    """A bar that the caller moves: a context manager with `update(steps)`; `write(line)` prints above it.

    total: None where it is not known; the bar then only counts.
    """
    from tqdm import tqdm  # not at the top: a missing package is reported by report_at_start

    # smoothing=0: the time left is computed from the average of all steps, since their cost varies.
    return tqdm(total=total, desc=task, unit=unit, smoothing=0, leave=False, disable=None if shown else True)


def size_text(num_bytes: float) -> str:
    """Bytes in a readable unit: `2.4 GB`, `368 MB`, `12 kB` (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            value = num_bytes / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Rows of one length, in columns as wide as their widest cell; the last column is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(f"{indent}{'  '.join(f'{cell:{width}}' for cell, width in zip(row, widths, strict=True)).rstrip()}")


MODEL_DIR_HELP = "model folder (./onnx_models_optimized, or ./onnx_models where that is missing)"


def default_model_dir() -> Path:
    """The optimized folder, or the exported one where that is missing or empty."""
    optimized = Path("onnx_models_optimized")
    return optimized if optimized.is_dir() and any(optimized.iterdir()) else Path("onnx_models")


EXPORT_COMMAND = Command("python export_parakeet_to_onnx.py --output_dir {}")
TOKENIZER_COMMAND = Command("python export_tokenizer.py --output_dir {}")
OPTIMIZE_COMMAND = Command("python optimize_encoder.py --model_dir {}")
TEST_COMMAND = Command("python test_e2e.py --model_dir {}")
PUBLISH_COMMAND = Command("hf upload YOUR_NAME/YOUR_MODEL {}")
