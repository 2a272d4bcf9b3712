"""Steps of a long benchmark whose results are kept, so that a run that was stopped goes on where it was."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import Stages
from common.folder import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """The steps of one run."""

    folder: Path  # of the model; what the steps leave is below it
    stages: Stages
    failures: list[str] = field(default_factory=list)  # checks of the scripts that failed

    def step(
        self, name: str, inputs: Mapping[str, Any], make: Callable[[], dict[str, Any]], needs: Path | None = None
    ) -> dict[str, Any]:
        """The result of `make`, or the kept one if it was made from the same inputs and `needs` is still there.

        What has failed, or is missing something, is not kept, and tried again by the next run.
        """
        kept = self.folder / "results" / f"{name.replace(' ', '_')}.json"
        inputs = json.loads(json.dumps(inputs))
        self.stages.begin(name)
        if kept.is_file() and (needs is None or needs.exists()):
            content = read_json(kept, "this program")
            if content["inputs"] == inputs:
                self.stages.end("kept")
                return self._noted(name, content["result"])
        result = make()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)
        if not result.get("failed") and not result.get("missing"):
            write_json(kept, {"inputs": inputs, "result": result})
        self.stages.end(*([result["failed"]] if "failed" in result else []))
        return self._noted(name, result)

    def script(
        self,
        name: str,
        command: Sequence[str],
        inputs: Mapping[str, Any],
        makes: Path | None = None,
        result_file: Path | None = None,
    ) -> dict[str, Any]:
        """Run a script as a step; its exit status 1 is a check that failed.

        makes: what it writes for later steps. result_file: JSON that it writes, which becomes `output` of the result.
        Raises ValueError where it ends with another status, or without that file.
        """

        def make() -> dict[str, Any]:
            log = self.folder / "logs" / f"{name.replace(' ', '_')}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            result = run_script(command, log)
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            said = lines[-1] if lines else f"exit status {result['status']}"
            if result["status"] == 1:
                result["failed"] = said
            elif result["status"] != 0:
                raise ValueError(f"{command[0]} ended with status {result['status']} and said: {said} ({log})")
            if result_file:
                if not result_file.is_file():
                    raise ValueError(f"{command[0]} wrote no result and said: {said} ({log})")
                result["output"] = json.loads(result_file.read_text(encoding="utf-8"))
                result_file.unlink()
            return result

        return self.step(name, {"command": list(command), **inputs}, make, makes)

    def _noted(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        if "failed" in result:
            self.failures.append(f"{name}: {result['failed']}")
        return result


def run_script(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a script with its output in `log`: its exit status, seconds, and peak memory in bytes."""
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = round(time.perf_counter() - start, 1)
    return {"status": process.returncode, "seconds": seconds, "peak_memory": usage.ru_maxrss * 1024}
