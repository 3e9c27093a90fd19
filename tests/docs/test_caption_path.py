"""CONTRIBUTING.md names the files that a caption passes from its file to the loss: one caption is followed."""

import re
import sys
from pathlib import Path

from jnana import JnanaCollator, JnanaForConditionalGeneration, JnanaProcessor
from jnana.processing.data import PrepareOptions, prepare
from tests.scripts.tiny_data import make_data
from tests.tiny import save_tiny_text, save_tiny_vision


ROOT = Path(__file__).parents[2]


def test_the_files_that_a_caption_passes(tmp_path):
    backbones = save_tiny_vision(tmp_path / "vision"), save_tiny_text(tmp_path / "text")
    processor = JnanaProcessor.from_vision_text_pretrained(*backbones)
    model = JnanaForConditionalGeneration.from_vision_text_pretrained(
        *map(str, backbones), image_token_id=processor.image_token_id
    ).train()
    data = make_data(tmp_path / "data")
    options = PrepareOptions(image_folder=data / "images", packing="shared_image", needs_images=True, progress=False)
    passed = set()

    def follow(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_name != "<module>" and path.is_relative_to(ROOT):
            passed.add(path.relative_to(ROOT).as_posix())

    sys.setprofile(follow)
    try:
        rows = prepare(data / "captions.json", processor, options)
        batch = JnanaCollator(processor, **options.for_collator)([rows[0]])
        model(**batch).loss.backward()
    finally:
        sys.setprofile(None)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.split("## From a caption to the loss")[1].split("\n## ")[0]
    named = {path for line in section.splitlines() if line.startswith("| ") for path in last_cell(line)}
    assert {path for path in passed if path.startswith(("modeling/", "processing/"))} == named


def last_cell(line: str) -> list[str]:
    return re.findall(r"`(\S+\.py)`", line.split("|")[-2])
