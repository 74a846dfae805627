"""Files that appear whole or not at all, and errors in one line."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from train.data.prepared import DataError
from train.errors import UserError, one_line, run
from train.files import TEMPORARY, replacing, write_atomically, write_json

ROOT = Path(__file__).parents[2]


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "notes.txt"
    write_atomically(path, "α")
    assert path.read_bytes() == "α".encode()

    def stop() -> None:
        with replacing(path, durable=True) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert path.read_text() == "α"
    write_json(path, {"a": 1}, indent=0)
    assert path.read_text() == '{\n"a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_long_names_are_written(tmp_path):
    path = tmp_path / f"{'é' * 125}.json"
    write_json(path, 1)
    assert path.read_text() == "1\n"
    with replacing(path) as temporary:
        assert TEMPORARY.fullmatch(temporary.name)
        temporary.touch()


def test_output_of_another_encoding_says_everything(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert run(lambda: print("β caf\udce9", flush=True)) == 0
    assert ascii_only.buffer.getvalue() == b"\\u03b2 caf\\udce9\n"


def test_a_mistake_is_one_line_whoever_made_it(capsys):
    def worker() -> None:
        raise DataError(
            "Traceback (most recent call last):\n  …\ntrain.data.prepared.DataError: no"
        )

    assert run(worker) == 2
    assert capsys.readouterr().err == "error: no\n"
    assert one_line(UserError()) == "UserError"

    def stopped() -> None:
        raise KeyboardInterrupt

    assert run(stopped, "all is lost") == 130
    assert capsys.readouterr().err == "stopped; all is lost\n"


def test_a_command_that_is_terminated_leaves_no_temporary(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from train.errors import run; from train.files import replacing\n"
        "def write():\n"
        "    with replacing(Path(sys.argv[1])) as path:\n"
        "        path.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
        "sys.exit(run(write))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "result.txt")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.wait(20) == 143
        assert process.stderr.read() == "stopped; nothing was written\n"
    assert list(tmp_path.iterdir()) == []
