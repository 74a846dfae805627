"""The choice of configurations: fastest wins, choices outlive the process, nothing can break it."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import triton.language as tl

from polyfusion import info
from polyfusion.kernels.triton import common, tune
from polyfusion.kernels.triton.compile import block  # noqa: F401  (it fills SHIPPED)
from polyfusion.kernels.triton.compile.shipped import SHIPPED
from tests.library.helpers import FORMS, make_problem

TILES = [{"BLOCK_M": 16}, {"BLOCK_M": 32}, {"BLOCK_M": 64}]
OPTIONS = tune.Options("example", (100, 7), TILES)
CONSTANTS = {"ACC": tl.float32, "COMPUTE": tl.float16, "PRECISION": "ieee"}
LIKE = torch.zeros(1, dtype=torch.float16)
KEY = "Test GPU 90, triton {}, example 128x8 float16"


class Timer:
    """Launches that take given milliseconds, or raise them, and are counted."""

    def __init__(self, times):
        self.times, self.launched, self.timed = times, [], 0

    def run(self, tile):
        self.launched.append(tile["BLOCK_M"])
        if isinstance(self.times[tile["BLOCK_M"]], Exception):
            raise self.times[tile["BLOCK_M"]]
        return f"result with {tile['BLOCK_M']}"

    def measure(self, call):
        self.timed += 1
        call()
        return self.times[self.launched[-1]]


def forget():
    tune._chosen.clear()
    tune._kept.cache_clear()
    tune._complain.cache_clear()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Pretend that the tensor is on a GPU, with an empty cache; returns how to set the times."""
    monkeypatch.setenv("POLYFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POLYFUSION_AUTOTUNE", raising=False)
    monkeypatch.setattr(tune, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(tune, "_gpu", lambda tensor: "Test GPU")
    monkeypatch.setattr(tune, "_device", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget()

    def set_times(*times):
        timer = Timer({16: times[0], 32: times[1], 64: times[2]})
        monkeypatch.setattr(tune, "_milliseconds", timer.measure)
        return timer

    with common.pretend(90):
        yield set_times
    forget()


def choose(timer):
    return tune.tuned(OPTIONS, LIKE, CONSTANTS, timer.run)


def test_the_fastest_is_used_and_measured_once(gpu):
    timer = gpu(3.0, 1.0, 2.0)
    assert choose(timer) == "result with 32"
    assert timer.launched == [16, 32, 64, 32]
    assert choose(timer) == "result with 32"
    assert timer.timed == 3
    assert tune.find(OPTIONS, LIKE, CONSTANTS) == {"BLOCK_M": 32}


def test_the_choice_is_kept(gpu):
    choose(gpu(3.0, 2.0, 1.0))
    (entry,) = json.loads(tune.cache_file().read_text()).items()
    assert entry == (KEY.format(tune.triton.__version__), {"BLOCK_M": 64})
    forget()
    timer = gpu(1.0, 2.0, 3.0)
    assert choose(timer) == "result with 64"
    assert timer.timed == 0


def test_a_second_process_reads_it(gpu):
    choose(gpu(3.0, 2.0, 1.0))
    code = (
        "import polyfusion, torch\n"
        "import triton.language as tl\n"
        "from polyfusion.kernels.triton import common, tune\n"
        f"options = tune.{OPTIONS!r}\n"
        "constants = {'ACC': tl.float32, 'COMPUTE': tl.float16, 'PRECISION': 'ieee'}\n"
        "tune._on_gpu, tune._gpu = (lambda tensor: True), (lambda tensor: 'Test GPU')\n"
        "with common.pretend(90):\n"
        "    print(tune.find(options, torch.zeros(1).half(), constants))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.strip() == "{'BLOCK_M': 64}"


@pytest.mark.parametrize(
    "content",
    ["", "{", "\x00\xff", "[1, 2]", '{"%s": 7}', '{"%s": {"BLOCK_M": 999}}', '{"%s": null}'],
)
def test_a_damaged_or_foreign_cache_is_ignored_and_replaced(gpu, content):
    path = tune.cache_file()
    path.parent.mkdir()
    path.write_text(content.replace("%s", KEY.format(tune.triton.__version__)))
    assert choose(gpu(3.0, 1.0, 2.0)) == "result with 32"
    assert json.loads(path.read_text()) == {KEY.format(tune.triton.__version__): {"BLOCK_M": 32}}
    assert os.listdir(path.parent) == [path.name]


def test_other_choices_in_the_cache_stay(gpu):
    path = tune.cache_file()
    path.parent.mkdir()
    path.write_text('{"another GPU": {"BLOCK_M": 16}}')
    choose(gpu(3.0, 1.0, 2.0))
    assert len(json.loads(path.read_text())) == 2


def test_a_cache_that_cannot_be_written_is_said_once(gpu, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYFUSION_CACHE", str(tmp_path / "file"))
    timer = gpu(3.0, 1.0, 2.0)
    assert choose(timer) == choose(timer) == "result with 32"
    assert timer.timed == 3
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_candidate_that_does_not_launch_is_skipped(gpu):
    assert choose(gpu(3.0, RuntimeError("out of resource: shared memory"), 2.0)) == "result with 64"


def test_none_launches(gpu):
    first, other = RuntimeError("first"), RuntimeError("other")
    with pytest.raises(RuntimeError, match="first"):
        choose(gpu(first, other, other))
    assert not tune.cache_file().exists()


@pytest.mark.parametrize("why", ["switched off", "no GPU", "captured"])
def test_the_first_without_measuring(gpu, why, monkeypatch):
    timer = gpu(3.0, 1.0, 2.0)
    if why == "switched off":
        monkeypatch.setenv("POLYFUSION_AUTOTUNE", "0")
    elif why == "no GPU":
        monkeypatch.setattr(tune, "_on_gpu", lambda tensor: False)
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(timer) == "result with 16"
    assert (timer.timed, timer.launched) == (0, [16])
    assert not tune.cache_file().exists()


def test_switched_off_ignores_what_was_kept(gpu, monkeypatch):
    timer = gpu(3.0, 1.0, 2.0)
    choose(timer)
    monkeypatch.setenv("POLYFUSION_AUTOTUNE", "0")
    assert choose(timer) == "result with 16"


def test_sizes_share_a_choice_within_a_power_of_two(gpu):
    timer = gpu(3.0, 1.0, 2.0)
    choose(timer)
    for sizes, times in (((128, 5), 3), ((129, 7), 6)):
        options = tune.Options("example", sizes, TILES)
        assert tune.tuned(options, LIKE, CONSTANTS, timer.run) == "result with 32"
        assert timer.timed == times


def test_variants():
    plain = {**CONSTANTS, "COMPUTE": tl.float32}
    double = {**CONSTANTS, "ACC": tl.float64, "COMPUTE": tl.float64}
    tile, cores, fma = {"M": 1, "N": 2}, [{"M": 8}, {"N": 2}], [{"N": 4}]
    assert tune.vary(tile, LIKE, CONSTANTS, cores, fma) == [tile]  # the interpreter
    with common.pretend(80):
        assert tune.vary(tile, LIKE, CONSTANTS, cores, fma) == [tile, {"M": 8, "N": 2}]
        assert tune.vary(tile, LIKE, plain, cores, fma) == [tile, {"M": 1, "N": 4}]
        assert tune.vary(tile, LIKE, double, cores, fma) == [tile]


@pytest.mark.parametrize("form", FORMS)
def test_a_sweep_repeats_launches_without_changing_results(form):
    """Every launch can be repeated, as timing does: the same value and gradients."""
    problem, cotangent = make_problem(form), torch.ones(2, 3, 21, dtype=torch.double)
    expected = [problem.fuse("triton"), *problem.gradients("triton", cotangent)]
    original = tune.tuned

    def twice(options, tensor, constants, run):
        run(options.tiles[0])
        return original(options, tensor, constants, run)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("hadamard", "tucker", "matmul"):
            patch.setattr(f"polyfusion.kernels.triton.{module}.tuned", twice)
        found = [problem.fuse("triton"), *problem.gradients("triton", cotangent)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_info_says_what_is_tuned(gpu):
    """Of two launches one is in the cache: the report says so of that one only."""
    with tune.record() as launches, common.dry():
        SHIPPED["final_bfloat16"].call()
    (forward, _), (backward, _) = launches
    gpu(3.0, 1.0, 2.0)
    like, constants = torch.empty(0, dtype=torch.bfloat16), {**CONSTANTS, "COMPUTE": tl.bfloat16}
    tune._remember(forward, like, constants, forward.tiles[1])
    forget()
    report = list(info._configurations("cpu"))
    assert any(str(tune.cache_file()) in line for line in report)
    (line,) = [x for x in report if x.strip().startswith("final forward")]
    assert line.split()[2:] == [*info.words(forward.tiles[1]).split(), "tuned"]
    (line,) = [x for x in report if x.strip().startswith("final backward")]
    assert line.endswith(f"default of {len(backward.tiles)}")
