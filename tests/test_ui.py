"""What a reviewer opens: MLflow's own pages of a finished pipeline and its overview, driven in headless Chromium."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from scripts.screenshots import take

pytestmark = pytest.mark.slow

PICTURES = {"runs", "charts", "artifacts", "registry", "pipeline-light", "pipeline-dark"}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here: apt-get install chromium")
def test_the_pages_show_what_was_logged(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    """`take` itself waits for the runs, the charts, the artefacts and the champion; the pictures are not blank."""
    take(finished[1], tmp_path, [])
    pictures = {path.stem: Image.open(path).convert("RGB") for path in tmp_path.glob("*.png")}
    assert set(pictures) == PICTURES
    for name, picture in pictures.items():
        colours = picture.getcolors(picture.width * picture.height)
        assert len(colours) > 50, name
    light, dark = (sum(pictures[f"pipeline-{name}"].getpixel((3, 3))) for name in ("light", "dark"))
    assert light > 700 and dark < 100
