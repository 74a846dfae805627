"""Run a stage: its cases in processes of their own, within a time, written down as each ends.

A case that ends its process (an illegal address makes CUDA useless for the rest of it, a kernel
never returns) costs only itself: the process is started again with the cases that have not begun.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu import CARRY

COMMAND = [sys.executable, "-m", "bench.gpu"]
DIED = 3
"""Exit code of a process whose device is of no more use."""


class Unavailable(Exception):
    """What a stage or a case needs is not here; the message says what."""


@dataclass(frozen=True)
class Setting:
    """What the cases are made for: a device, ``tiny`` sizes for a test of the code, a folder."""

    device: str
    tiny: bool
    out: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Case:
    """Rows of a table, made by ``run``; a row with a ``failure`` is one that is wrong."""

    name: str
    run: Callable[[], list[dict[str, Any]]]
    seconds: float = 60.0
    """After which its process is ended."""


@dataclass(frozen=True)
class Stage:
    """``module.cases(setting, *arguments)``, for at most ``seconds`` in ``lanes`` processes."""

    name: str
    title: str
    module: str
    seconds: float
    arguments: tuple[str, ...] = ()
    lanes: int = 1
    on_cpu: bool = True
    background: bool = False
    """Whether the next stages begin while it runs."""
    after: str = ""
    """A background stage that has to be over."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What became of a stage; ``reason`` says why it is not done, or not wholly."""

    name: str
    title: str
    seconds: float = 0.0
    reason: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_begun: list[str] = field(default_factory=list)


class Running:
    """The processes of a stage that has begun."""

    def __init__(self, stage: Stage, setting: Setting, seconds: float):
        self.stage, self.setting, self.seconds = stage, setting, seconds
        self.began, self.begun_at = time.monotonic(), time.time()
        self.stem = setting.out / stage.name
        self.log_file = self.stem.with_suffix(".log")
        self.log = self.log_file.open("w")
        lanes = stage.lanes if setting.on_gpu else 1
        self.files = [Path(f"{self.stem}.{lane}.jsonl") for lane in range(lanes)]
        for file in self.files:
            file.write_text("")
        self.children = [self._start(lane) for lane in range(lanes)]
        self.begun = [0] * lanes

    def _start(self, lane: int) -> subprocess.Popen:
        command = [*COMMAND, "--out", str(self.setting.out)]
        command += ["--stage", self.stage.name, "--lane", str(lane), str(len(self.files))]
        command += ["--tiny"] * self.setting.tiny
        return subprocess.Popen(
            command,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.stage.environment},
            start_new_session=True,  # so that what it starts ends with it
        )

    def wait(self) -> Result:
        """Wait for the end of the stage or of its time, and write what is known to NAME.json."""
        late = False
        while any(self._alive(lane) for lane in range(len(self.children))):
            if time.monotonic() - self.began > self.seconds:
                late = True
                break
            time.sleep(0.05)
        self.stop()
        if not self.log_file.stat().st_size:
            self.log_file.unlink()
        result = self._collect(late)
        write_json(self.stem.with_suffix(".json"), vars(result))
        for file in self.files:
            file.unlink()
        return result

    def _alive(self, lane: int) -> bool:
        """Whether a lane goes on; one that died in a case is started again after it."""
        code = self.children[lane].poll()
        if code is None:
            return True
        lines = _lines(self.files[lane])
        begun = sum("began" in line for line in lines)
        if code == 0 or begun == self.begun[lane]:
            return False
        self.begun[lane] = begun
        if case := _unfinished(lines):
            _append(self.files[lane], {"case": case, "died": code})
        self.children[lane] = self._start(lane)
        return True

    def stop(self) -> None:
        """End every process of the stage."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        self.log.close()

    def _collect(self, late: bool) -> Result:
        ended = time.time() if late else max(file.stat().st_mtime for file in self.files)
        result = Result(self.stage.name, self.stage.title, ended - self.begun_at)
        planned: list[str] = []
        for file, child in zip(self.files, self.children, strict=True):
            lines = _lines(file)
            planned = next((x["planned"] for x in lines if "planned" in x), planned)
            for line in lines:
                if "rows" in line:
                    result.rows += line["rows"]
                if "unavailable" in line and "case" in line:
                    result.rows.append({"case": line["case"], "not done": line["unavailable"]})
                elif "unavailable" in line:
                    result.reason = line["unavailable"]
                if "died" in line:
                    result.rows.append({"case": line["case"], "failure": _death(line["died"])})
            begun = _unfinished(lines)
            if begun and late:
                failure = f"not over when the stage's {self.seconds:.0f} s were"
                result.rows.append({"case": begun, "failure": failure})
            elif not planned and not result.reason:
                result.reason = f"ended with {child.returncode} at once, see {self.log_file.name}"
        begun_ones = {x["case"] for f in self.files for x in _lines(f) if "began" in x}
        result.not_begun = [name for name in planned if name not in begun_ones]
        if result.not_begun and not result.reason:
            result.reason = (
                f"{len(result.not_begun)} cases not begun, {self.seconds:.0f} s are over"
            )
        return result


def work(stage: Stage, setting: Setting, lane: int, lanes: int) -> int:
    """Run a lane's cases in this process, those that have not begun; return the exit code."""
    import torch

    file = Path(f"{setting.out / stage.name}.{lane}.jsonl")
    done = {line["case"] for line in _lines(file) if "began" in line}
    try:
        cases = importlib.import_module(stage.module).cases(setting, *stage.arguments)
    except ModuleNotFoundError as error:
        _append(file, {"unavailable": f"the package {error.name} is missing: {CARRY}"})
        return 0
    except Unavailable as error:
        _append(file, {"unavailable": str(error)})
        return 0
    if not done:
        _append(file, {"planned": [case.name for case in cases]})
    for case in cases[lane::lanes]:
        if case.name in done:
            continue
        _append(file, {"case": case.name, "began": time.time()})
        with _limit(case.seconds):
            failed = _run(case, file)
            if failed and setting.on_gpu:
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    return DIED
        if setting.on_gpu:
            torch.cuda.empty_cache()
    return 0


def _run(case: Case, file: Path) -> bool:
    """Run a case and write down what it gave; whether it raised."""
    start = time.monotonic()
    try:
        rows = [{"case": case.name, **row} for row in case.run()]
    except Unavailable as error:
        _append(file, {"case": case.name, "unavailable": str(error)})
        return False
    except Exception as error:
        traceback.print_exc()
        line = (str(error).strip().splitlines() or [""])[0][:300]
        row = {"case": case.name, "failure": f"{type(error).__name__}: {line}"}
        _append(file, {"case": case.name, "rows": [row]})
        return True
    _append(file, {"case": case.name, "rows": rows, "seconds": time.monotonic() - start})
    return False


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """End this process, with a trace of where it is, after so many seconds."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _death(code: int) -> str:
    if code == DIED:
        return "the device was of no more use after it"
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with {code}: it took too long, or crashed; see the log"


def _unfinished(lines: list[dict[str, Any]]) -> str | None:
    """The case that began and has no result."""
    over = {x["case"] for x in lines if "case" in x and "began" not in x}
    return next((x["case"] for x in lines if "began" in x and x["case"] not in over), None)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut short is left out."""
    found = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _append(file: Path, value: dict[str, Any]) -> None:
    with file.open("a") as opened:
        opened.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    os.replace(partial, path)
