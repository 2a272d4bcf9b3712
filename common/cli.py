"""How every script speaks: one line a stage, one line an error, exit status 0, 1 or 2."""

import argparse
import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

EXIT_OK = 0
EXIT_CHECK = 1  # a check ran and failed, or the program itself did
EXIT_USAGE = 2  # the command line or an input file is not usable


class CheckError(Exception):
    """A verification ran to its end and failed; the script exits with status 1."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; shows each default in the help."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--verbose", action="store_true", help="show the libraries' own log and full tracebacks")

    def error(self, message: str):
        self.exit(EXIT_USAGE, f"error: {message} (see --help)\n")


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `main(args)` and turn what it raises into one line on stderr and an exit status.

    CheckError gives 1. ValueError and OSError are how the code below reports input it cannot use: they give 2.
    Anything else is a defect of this program or of a library: 1, with the traceback under --verbose.
    """
    quiet_libraries(args.verbose)
    try:
        main(args)
        return EXIT_OK
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except CheckError as error:
        return _report("check failed", error, EXIT_CHECK, args.verbose)
    except (ValueError, OSError) as error:
        return _report("error", error, EXIT_USAGE, args.verbose)
    except ModuleNotFoundError as error:
        return _report("error", f"{error}; run: pip install -r requirements.txt", EXIT_USAGE, args.verbose)
    except Exception as error:
        return _report(f"unexpected {type(error).__name__}", error, EXIT_CHECK, args.verbose)


def _report(kind: str, error: BaseException | str, status: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"{kind}: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def quiet_libraries(verbose: bool) -> None:
    """Hide the log and warnings of NeMo, torch and ONNX Runtime unless `verbose`."""
    if verbose:
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # what NeMo logs as an error it also raises
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Hide what C libraries write to the error output themselves (libmpg123 comments on every broken frame)."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


class Stages:
    """Numbered one-line reports: `[2/4] encoder.onnx  max|Δ| 3e-05 ≤ 1e-03  2.4 GB  19 s`."""

    def __init__(self, total: int):
        self.total, self.done, self.since = total, 0, time.perf_counter()

    def report(self, *fields: str) -> None:
        """Close the current stage: print its fields and the seconds since the previous one ended."""
        self.done += 1
        now = time.perf_counter()
        print(f"[{self.done}/{self.total}]", *fields, f"{now - self.since:.1f} s", sep="  ", flush=True)
        self.since = now


def size_text(num_bytes: float) -> str:
    """Bytes in the unit a person would choose: `2.4 GB`, `368 MB`, `12 kB` (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            value = num_bytes / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{num_bytes:.0f} B"


MODEL_DIR_HELP = "model folder (./onnx_models_optimized, or ./onnx_models where that is missing)"


def default_model_dir() -> Path:
    """The optimized folder, or the exported one where that is missing."""
    optimized = Path("onnx_models_optimized")
    return optimized if optimized.is_dir() else Path("onnx_models")


EXPORT_COMMAND = "python export_parakeet_to_onnx.py --output_dir {}"
TOKENIZER_COMMAND = "python export_tokenizer.py --output_dir {}"
