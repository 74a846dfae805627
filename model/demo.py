"""A page to try it: drop a photo, speak, and see the photo say it.

    pip install -e '.[demo]'
    python -m model.demo

It is served to this computer alone unless --host says otherwise. What is dropped, recorded and made
lies in a temporary folder that goes when the page is closed or the command ends.
"""

import inspect
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import tyro

from model.animate import choose_threads
from model.animator import CHECKPOINT, Animator
from model.config import Kernels
from polyfusion.dispatch import KernelsUnavailable, resolve
from train.config import load_config
from train.data.recording import Recording
from train.errors import UserError, one_line, run

if TYPE_CHECKING:
    import gradio as gr

EXAMPLES = Path(__file__).parents[1] / "docs" / "example"
KEPT = 600  # seconds that the files of an open page are kept

ABOUT = """# A photo that talks

Give a photo of a face seen from the front, and speech. Photo and recording of the example: GRID
corpus, CC BY 4.0. Animate only people who have agreed to it, and say of a video that it was made.
"""


@dataclass(frozen=True)
class DemoConfig:
    """Serve a page on which photos talk."""

    checkpoints: tuple[Path, ...] = (CHECKPOINT,)
    """Directories of runs to choose from, the first at the start."""
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 serves the page to the whole network."""
    port: int = 0
    """Port to serve at; 0 takes the first free one from 7860 on."""
    max_seconds: float = 60.0
    """Greatest length of a recording in seconds."""
    max_megabytes: float = 50.0
    """Greatest size of a file in MB."""
    kernels: Kernels = "auto"
    """Kernels that compute the fused operators."""
    device: str = "auto"
    """Device to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise UserError("--checkpoints: give at least one run")
        for name, value in (("seconds", self.max_seconds), ("megabytes", self.max_megabytes)):
            if not 0 < value < float("inf"):
                raise UserError(f"--max-{name} {value}: expected a positive number")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port {self.port}: expected a number from 0 to 65535")


class Made(NamedTuple):
    """What the page shows of a photo that talks."""

    video: Path
    crop: np.ndarray
    """(h, w, 3) uint8 RGB: the face as the network saw it."""
    report: str


class Studio:
    """The runs of a page, loaded when they are first chosen, and what they make.

    Args:
        config: whose ``checkpoints`` have to be runs; :class:`UserError` names one that is not.
    """

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.names: dict[str, Path] = {}
        for path in config.checkpoints:
            told = load_config(path)
            name = "weights that ship" if path == CHECKPOINT else str(path)
            size = f"{told.model.height}×{told.model.width}"
            self.names[f"{name} (fusion {told.fusion}, {size})"] = path
        self._loaded: dict[str, Animator] = {}

    def animator(self, name: str) -> Animator:
        """The network of one of ``names``."""
        if name not in self._loaded:
            options: Any = {"kernels": self.config.kernels, "device": self.config.device}
            self._loaded[name] = Animator(self.names[name], **options)
            choose_threads(self._loaded[name])
        return self._loaded[name]

    def animate(
        self,
        photo: str | None,
        speech: str | None,
        name: str,
        seed: float | None,
        aligned: bool,
        paste: bool,
        out: Path,
    ) -> Made:
        """Make a video in the folder ``out``; :class:`UserError` says what is wrong."""
        if photo is None:
            raise UserError("There is no photo yet: drop one, or click the example.")
        if speech is None:
            raise UserError("There is no speech yet: record or drop some, or click the example.")
        if seed is None or not 0 <= seed < 2**32:
            raise UserError(f"The seed is {seed}: expected a number from 0 to 4294967295.")
        for file in (photo, speech):
            size = os.path.getsize(file) / 1e6
            if size > self.config.max_megabytes:
                most = f"{self.config.max_megabytes:g} MB"
                raise UserError(f"{Path(file).name}: {size:.0f} MB, and at most {most} are taken")
        sound = Recording(speech)
        if sound.seconds > self.config.max_seconds:
            raise UserError(
                f"{Path(speech).name}: {sound.seconds:.0f} s long, and at most "
                f"{self.config.max_seconds:g} s are taken"
            )
        animator = self.animator(name)
        began = time.monotonic()
        animation = animator(photo, sound, aligned=aligned, paste=paste, seed=int(seed))
        video = out / "talk.mp4"
        frames = animation.save(video)
        rate = frames / (time.monotonic() - began)
        report = [
            f"{frames} frames, {frames / animation.fps:.1f} s, made at {rate:.0f} frames/s: "
            f"{rate / animation.fps:.1f} times as fast as they play",
            f"kernels: {_served(animator)}, on {animator.device}",
            *animation.remarks,
        ]
        return Made(video, animation.portrait.still, "\n".join(f"- {line}" for line in report))


def _served(animator: Animator) -> str:
    """The kernels that the network's operators get."""
    return resolve(animator.kernels, [torch.empty(1, device=animator.device)])


def build(studio: Studio) -> "gr.Blocks":
    """Lay out the page."""
    import gradio as gr

    def animate(
        photo: str | None,
        speech: str | None,
        name: str,
        seed: float | None,
        aligned: bool,
        paste: bool,
    ) -> tuple[Any, np.ndarray, str]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = studio.animate(photo, speech, name, seed, aligned, paste, Path(folder))
            except (UserError, KernelsUnavailable) as error:
                message = _without_folders(one_line(error), photo, speech)
                raise gr.Error(
                    message, title="This cannot be done", print_exception=False
                ) from None
            path = shown.move_resource_to_block_cache(str(made.video))
        return path, made.crop, made.report

    with gr.Blocks(
        title="A photo that talks", analytics_enabled=False, delete_cache=(KEPT, KEPT)
    ) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column():
                photo = gr.Image(
                    label="Photo", type="filepath", sources=["upload", "webcam", "clipboard"]
                )
                speech = gr.Audio(label="Speech", type="filepath", sources=["upload", "microphone"])
                names = list(studio.names)
                name = gr.Dropdown(names, label="Network", value=names[0])
                seed = gr.Number(0, label="Seed of the blinks", precision=0, minimum=0)
                aligned = gr.Checkbox(label="The photo is the face, cut out (--aligned)")
                paste = gr.Checkbox(label="Put the face back into the photo (--paste)")
                button = gr.Button("Animate", variant="primary")
            with gr.Column():
                shown = gr.Video(label="Video", autoplay=True, height=420, interactive=False)
                crop = gr.Image(label="The face as it was cut", height=160, interactive=False)
                report = gr.Markdown()
        files = [str(EXAMPLES / "face.jpg"), str(EXAMPLES / "speech.m4a")]
        gr.Examples([files], [photo, speech], label="Example")
        button.click(
            animate,
            [photo, speech, name, seed, aligned, paste],
            [shown, crop, report],
            concurrency_limit=1,
            api_name="animate",
        )
    return page


def _without_folders(message: str, *files: str | None) -> str:
    """Name the user's files alone, and not the folder where the page keeps them."""
    for file in filter(None, files):
        message = message.replace(file, Path(file).name)
    return message


def serve(config: DemoConfig) -> None:
    """Serve the page until Ctrl-C."""
    studio = Studio(config)
    studio.animator(next(iter(studio.names)))
    with tempfile.TemporaryDirectory(prefix="polyfusion-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio  # noqa: F401
        except ImportError:
            raise UserError("the page needs the extra demo: pip install -e '.[demo]'") from None
        page = build(studio)
        try:
            page.launch(
                server_name=config.host,
                server_port=config.port or None,
                max_file_size=int(config.max_megabytes * 1e6),
                allowed_paths=[str(EXAMPLES)],
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                footer_links=[],
            )
        except OSError as error:
            raise UserError(
                f"--host {config.host} --port {config.port}: {one_line(error)}"
            ) from None
        print(f"the page is at {page.local_url}; Ctrl-C ends it", flush=True)
        page.block_thread()


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    return run(
        lambda: serve(
            tyro.cli(
                DemoConfig,
                prog="python -m model.demo",
                description=inspect.cleandoc(__doc__ or ""),
            )
        ),
        "nothing was kept",
    )


if __name__ == "__main__":
    sys.exit(main())
