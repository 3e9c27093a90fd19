"""Two rounds of QLoRA, the second by `accelerate launch`, killed and resumed; then merged and evaluated."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jnana import run_evaluate, run_merge, run_sft
from tests.scripts.conftest import options, sft_options
from tests.scripts.launching import ROOT, environment, finish, kill_at, launch


SECOND = {"lora_r": 0, "max_steps": 24, "save_steps": 4, "seed": 43, "learning_rate": "1e-2"}

# Asks with transformers alone: the repository is not on its path, the code comes with the checkpoint.
ASK = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, data = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert not any(name.split(".")[0] in ("jnana", "peft") for name in sys.modules)
assert type(model).__module__.startswith("transformers_modules.")
answers = []
for record in json.load(open(f"{data}/instruct.json")):
    image = {"type": "image", "path": f"{data}/images/{record['image']}"}
    for turn in record["conversations"][::2]:
        text = {"type": "text", "text": turn["value"].removeprefix("<image>").strip()}
        inputs = processor.apply_chat_template([{"role": "user", "content": [image, text]}], return_tensors="pt",
                                               add_generation_prompt=True, tokenize=True, return_dict=True)
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        answers.append(processor.decode(made, skip_special_tokens=True).strip())
print("ANSWERS" + json.dumps(answers))
"""


def killed_and_resumed(arguments: list[str], output: Path) -> str:
    """The second round, killed once its first checkpoint is whole, and started again; what the second start said."""
    process = launch("run_sft.py", [*arguments, "--save_total_limit=10"])
    kill_at(process, output / "checkpoint-4")
    for later in output.glob("checkpoint-*"):  # wherever exactly the kill came, most of the round is still to do
        if later.name != "checkpoint-4":
            shutil.rmtree(later)
    return finish(launch("run_sft.py", arguments))


def answers_of(folder: Path, data: Path, output: Path) -> list[str]:
    """By run_evaluate, which takes an adapter on its 4-bit base as well as a merged checkpoint."""
    values = {"eval_data": data / "instruct.json", "image_folder": data / "images", "output_dir": output}
    quick = {"max_new_tokens": 6, "blind": "false", "num_workers": 0, "max_examples": 0}
    run_evaluate.main(options(model_name_or_path=folder, **values, **quick))
    lines = (output / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def answers_elsewhere(folder: Path, data: Path, tmp_path: Path) -> list[str]:
    script = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    script += f"sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n" + ASK
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, str(folder), str(data)],
        cwd=tmp_path,
        env={**environment(), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS")]
    return json.loads(line.removeprefix("ANSWERS"))


@pytest.fixture(scope="module")
def rounds(aligned, data, tmp_path_factory) -> tuple[Path, Path, str]:
    """Folders of both rounds, and what the resumed second one said."""
    folder = tmp_path_factory.mktemp("night")
    first, second = folder / "round1", folder / "round2"
    changes = {"quantization": "nf4", "learning_rate": "1e-2", "max_steps": 12, "save_strategy": "no"}
    run_sft.main(sft_options(data, aligned, output_dir=first, **changes))
    return first, second, killed_and_resumed(sft_options(data, first, output_dir=second, **SECOND), second)


def test_the_second_round_went_on_where_it_was_killed(rounds, data, tmp_path):
    first, second, said = rounds
    assert f"resuming from {second / 'checkpoint-4'}" in said
    run_sft.main(sft_options(data, first, output_dir=tmp_path / "whole", **{**SECOND, "save_strategy": "no"}))
    resumed, whole, earlier = (folder / "adapter_model.safetensors" for folder in (second, tmp_path / "whole", first))
    assert resumed.read_bytes() == whole.read_bytes()
    before, after = load_file(earlier), load_file(whole)
    assert all(not torch.equal(after[name], before[name]) for name in after)  # the control: the round changed them


def test_merged_and_asked_in_a_fresh_interpreter(rounds, aligned, data, tmp_path):
    first, second, _ = rounds
    run_merge.main(options(model_name_or_path=second, output_dir=tmp_path / "merged"))
    adapter = answers_of(second, data, tmp_path / "adapter_answers")
    assert len(adapter) == 32 and len(set(adapter)) > 1
    assert answers_of(tmp_path / "merged", data, tmp_path / "merged_answers") == adapter
    assert answers_elsewhere(tmp_path / "merged", data, tmp_path) == adapter
    # the controls: neither the base nor the first round would have answered so
    assert answers_of(aligned, data, tmp_path / "base_answers") != adapter
    assert answers_of(first, data, tmp_path / "first_answers") != adapter
