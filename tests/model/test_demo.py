"""The page: what it makes and refuses, and all of it in a browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.animator import CHECKPOINT
from model.demo import EXAMPLES, DemoConfig, Studio
from train.data.media import read_media
from train.errors import UserError

PHOTO, SPEECH = str(EXAMPLES / "face.jpg"), str(EXAMPLES / "speech.m4a")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def studio():
    return Studio(DemoConfig(kernels="eager", device="cpu"))


@pytest.fixture
def name(studio):
    return next(iter(studio.names))


def test_the_example_talks(studio, name, tmp_path):
    assert name == "weights that ship (fusion cp, 128×96)"
    made = studio.animate(PHOTO, SPEECH, name, 0, False, False, tmp_path)
    frames, _, sound = read_media(made.video, 16_000)
    assert frames.shape[1:] == made.crop.shape == (128, 96, 3)
    assert np.abs(sound).max() > 0.05
    assert re.search(rf"{len(frames)} frames, 3.0 s, made at \d+ frames/s", made.report)
    assert "kernels: eager, on cpu" in made.report
    pasted = studio.animate(PHOTO, SPEECH, name, 0, False, True, tmp_path)
    assert read_media(pasted.video, 16_000)[0].shape[1:] == (288, 360, 3)


def test_what_is_wrong_is_said(studio, name, tmp_path):
    def said(photo=PHOTO, speech=SPEECH, seed=0, page=studio):
        with pytest.raises(UserError) as error:
            page.animate(photo, speech, name, seed, False, False, tmp_path)
        return str(error.value)

    assert "no photo yet" in said(photo=None)
    assert "no speech yet" in said(speech=None)
    assert "seed is -1" in said(seed=-1)
    assert "seed is None" in said(seed=None)
    assert "not an image" in said(photo=SPEECH)
    strict = Studio(DemoConfig(max_seconds=2, max_megabytes=0.02))
    assert "speech.m4a: 0 MB, and at most 0.02 MB are taken" in said(page=strict)
    strict = Studio(DemoConfig(max_seconds=2))
    assert "speech.m4a: 3 s long, and at most 2 s are taken" in said(page=strict)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_make_no_sense(tmp_path):
    for field, value in (("max_seconds", 0.0), ("max_megabytes", -1.0), ("port", 70_000)):
        flag = f"--{field.replace('_', '-')} {value}"
        with pytest.raises(UserError, match=f"{flag}: expected"):
            DemoConfig(**{field: value})
    with pytest.raises(UserError, match="at least one run"):
        DemoConfig(checkpoints=())
    with pytest.raises(UserError, match=str(tmp_path)):
        Studio(DemoConfig(checkpoints=(CHECKPOINT, tmp_path)))


def drop(page, kind: str, file: str) -> None:
    """Give the page a file, and wait until it has it."""
    with page.expect_response(re.compile("/upload")):
        page.locator(f"input[type=file][accept*={kind}]").first.set_input_files(file)
    page.wait_for_timeout(500)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(tmp_path):
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    bad = tmp_path / "no face.png"
    Image.new("RGB", (400, 300), "white").save(bad)
    kept = tmp_path / "kept"
    kept.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "model.demo", "--kernels", "eager"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(kept)},
    )
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
        with sync_api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 390, "height": 844})
            asked = set()
            page.on("request", lambda request: asked.add(request.url))
            page.goto(address)
            animate = page.get_by_role("button", name="Animate", exact=True)
            animate.click(timeout=60_000)
            page.wait_for_selector("text=There is no photo yet", timeout=30_000)
            drop(page, "audio", SPEECH)
            drop(page, "image", str(bad))
            animate.click()
            page.wait_for_selector("text=no face.png: no face", timeout=60_000)
            page.get_by_label("Remove Image").first.click()
            drop(page, "image", PHOTO)
            animate.click()
            page.wait_for_selector("text=frames/s", timeout=120_000)
            page.wait_for_function(
                "() => { const v = document.querySelector('video');"
                " if (!v) return false; v.muted = true; v.play(); return v.currentTime > 0.2 }",
                timeout=60_000,
            )
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 390  # nothing to scroll sideways on a phone
            assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
            browser.close()
        assert list(kept.rglob("*.mp4"))
        server.terminate()
        assert server.wait(20) == 128 + signal.SIGTERM
        assert not list(kept.rglob("*.*")), "nothing stays after the session"
    finally:
        server.kill()
