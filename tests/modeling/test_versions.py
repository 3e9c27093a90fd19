"""Checkpoints and adapters saved under one of the supported versions of all dependencies answer the same under each.

Three environments: `.venv` (constraints.txt), `.venv-lowest` and `.venv-newest`; `make test-lowest` and
`make test-newest` build the last two. Checkpoints are loaded in fresh interpreters that can't import `jnana`.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {
    "pinned": (ROOT / ".venv", ROOT / "constraints.txt"),
    "lowest": (ROOT / ".venv-lowest", ROOT / "constraints-lowest.txt"),
    "newest": (ROOT / ".venv-newest", ROOT / "constraints-newest.txt"),
}
# The file that `make` writes once an environment is complete; `make test` runs in the first one.
STAMPS = {"pinned": "bin/python", "lowest": ".installed", "newest": ".installed"}
MISSING = [name for name, (folder, _) in ENVIRONMENTS.items() if not (folder / STAMPS[name]).exists()]
REQUIRED = os.environ.get("CI") == "true" or os.environ.get("JNANA_MATRIX") == "1"

# Text and image of the question, the same for every checkpoint.
ASK = """
import json, sys
import torch
from PIL import Image

def ask(model, processor):
    image = Image.new("RGB", (30, 24), "red")
    image.putpixel((3, 5), (0, 0, 255))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is <image>?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].tolist()
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    return {"prompt": inputs["input_ids"][0].tolist(), "answer": made.sequences[0].tolist(), "logits": logits}
"""

SAVE = (
    ASK
    + """
root, backbones, target = sys.argv[1:]
sys.path.insert(0, root)
from pathlib import Path
import transformers
from jnana import JnanaForConditionalGeneration, JnanaProcessor
vision, text = Path(backbones) / "vision", Path(backbones) / "text"
processor = JnanaProcessor.from_vision_text_pretrained(vision, text)
torch.manual_seed(0)
model = JnanaForConditionalGeneration.from_vision_text_pretrained(
    str(vision), str(text), image_token_id=processor.image_token_id
)
model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
model.save_pretrained(target)
processor.save_pretrained(target)
answers = {"transformers": transformers.__version__, **ask(model, processor)}
Path(target, "answers.json").write_text(json.dumps(answers))

from jnana.training.adapters import base_reference, complete_adapter_folder
from jnana.training.options.arguments import LoraArguments, ModelArguments
from jnana.training.stages import apply_stage
lora, adapter = LoraArguments(lora_r=2), target + "-adapter"
reference = base_reference(ModelArguments(model_name_or_path=target, dtype="float32"), lora)
model = apply_stage(model, "sft", lora)
generator = torch.Generator().manual_seed(1)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
model.save_pretrained(adapter)
processor.save_pretrained(adapter)
complete_adapter_folder(model, reference, adapter)
Path(adapter, "answers.json").write_text(json.dumps(ask(model, processor)))
"""
)

LOAD = (
    ASK
    + """
class NoJnana:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "jnana":
            raise ModuleNotFoundError("the package is hidden in this test")

sys.meta_path.insert(0, NoJnana())
try:
    import jnana
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("jnana can be imported")

from transformers import AutoModelForImageTextToText, AutoProcessor
found = {}
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    found[folder] = ask(model, AutoProcessor.from_pretrained(folder, trust_remote_code=True))
print(json.dumps(found))
"""
)


def run(environment: str, script: str, folder: Path, *arguments: object) -> str:
    python = ENVIRONMENTS[environment][0] / "bin" / "python"
    variables = {**os.environ, "HF_MODULES_CACHE": str(folder / f"modules-{environment}"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-I", "-c", script, *map(str, arguments)],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{environment}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def same_answers(found: dict, expected: dict) -> bool:
    if (found["prompt"], found["answer"]) != (expected["prompt"], expected["answer"]):
        return False
    return torch.allclose(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), atol=1e-5, rtol=0)


@pytest.mark.skipif(
    bool(MISSING) and not REQUIRED, reason=f"no environment {', '.join(MISSING)}: make test-lowest test-newest"
)
def test_every_version_answers_the_same(tmp_path):
    from tests.modeling.pairs import save_text, save_vision
    from tests.tiny import tiny_image_processor, tiny_tokenizer

    assert not MISSING, f"no environment {MISSING}; `make test-lowest test-newest` builds them"
    backbones = tmp_path / "backbones"
    save_vision(backbones / "vision")
    tiny_image_processor().save_pretrained(backbones / "vision")
    save_text(backbones / "text")
    tiny_tokenizer().save_pretrained(backbones / "text")

    expected = {}
    for environment, (_, constraints) in ENVIRONMENTS.items():
        checkpoint = tmp_path / environment
        run(environment, SAVE, tmp_path, ROOT, backbones, checkpoint)
        expected[str(checkpoint)] = json.loads((checkpoint / "answers.json").read_text())
        adapter = tmp_path / f"{environment}-adapter"
        expected[str(adapter)] = json.loads((adapter / "answers.json").read_text())
        assert not same_answers(expected[str(adapter)], expected[str(checkpoint)])
        pinned = re.search(r"^transformers==(\S+)", constraints.read_text(), re.MULTILINE)
        assert expected[str(checkpoint)]["transformers"] == pinned[1]

    # Negative control: one changed weight of the projector changes the answers.
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "pinned", changed)
    weights = load_file(changed / "model.safetensors")
    name = "model.multi_modal_projector.linear_2.weight"
    save_file({**weights, name: weights[name] * 1.5}, changed / "model.safetensors", {"format": "pt"})
    for environment in ENVIRONMENTS:
        found = json.loads(run(environment, LOAD, tmp_path, *expected, changed).splitlines()[-1])
        for checkpoint, answers in expected.items():
            assert same_answers(found[checkpoint], answers), f"{checkpoint} under {environment}"
        assert not same_answers(found[str(changed)], expected[str(tmp_path / "pinned")])
