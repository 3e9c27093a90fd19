"""The processor: saving, loading without the package, counting image tokens, and the call of LLaVA's processor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoTokenizer, LlavaProcessor, SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

from jnana.modeling import configuration_jnana
from jnana.processing import JnanaProcessor, chat_template_names, image_geometry_jnana, read_chat_template
from jnana.processing.chat_encoding_jnana import BREAK
from jnana.processing.chat_formats_jnana import FORMATS
from jnana.processing.data.packing import measure_conversation
from tests.tiny import save_tiny_vision, tiny_image_processor, tiny_tokenizer, tiny_vision_config


PICTURE = Image.new("RGB", (30, 24), "red")
LOADER = """
import sys
from transformers import AutoProcessor
first, second = sys.argv[1:]
for _ in range(2):
    processor = AutoProcessor.from_pretrained(first, trust_remote_code=True)
    assert "jnana" not in sys.modules, "the package itself was imported"
    assert type(processor).__name__ == "JnanaProcessor"
    processor.save_pretrained(second)
    first, second = second, second + "_again"
from PIL import Image
picture = Image.new("RGB", (30, 24))
chat = [
    {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "<image>?"}]},
    {"role": "assistant", "content": "yes"},
]
out = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
print(out["input_ids"][0], out["assistant_masks"][0], processor.image_token_id, processor.tokenizer.pad_token)
"""


def test_a_saved_folder_loads_in_a_fresh_interpreter_and_saves_again(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    saved = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert saved == [
        "chat_encoding_jnana.py",
        "chat_formats_jnana.py",
        "chat_template.jinja",
        "image_geometry_jnana.py",
        "processing_jnana.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    # `-I` and another working folder: the repository is not on the path; the script checks that no installed copy is
    # used
    result = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, str(tmp_path / "saved"), str(tmp_path / "second")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    chat = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "<image>?"}]},
        {"role": "assistant", "content": "yes"},
    ]
    here = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    expected = f"{here['input_ids'][0]} {here['assistant_masks'][0]} {processor.image_token_id} <|pad|>"
    assert result.stdout.strip().splitlines()[-1] == expected
    assert (tmp_path / "second_again" / "chat_template.jinja").read_text() == processor.chat_template


def test_copied_code_imports_nothing_of_this_project():
    """Remote code is read as text: relative imports of neighbours, torch, transformers, the standard library."""
    folder = Path(__file__).parents[2] / "processing"
    neighbours = ("chat_encoding_jnana", "chat_formats_jnana", "image_geometry_jnana")
    allowed = {"collections", "re", "functools", "typing", "pathlib", "torch", "transformers"} | {
        f".{n}" for n in neighbours
    }
    for name in ("processing_jnana.py", *(f"{neighbour}.py" for neighbour in neighbours)):
        modules = {
            line.split()[1].split(".")[0] if not line.split()[1].startswith(".") else line.split()[1]
            for line in (folder / name).read_text().splitlines()
            if line.startswith(("import ", "from "))
        }
        assert modules <= allowed


def test_file_names_are_unique_over_the_packages_that_are_copied_flat():
    root = Path(__file__).parents[2]
    names = [path.name for folder in ("modeling", "processing") for path in (root / folder).glob("*.py")]
    assert len(names) - names.count("__init__.py") == len(set(names) - {"__init__.py"})


def test_all_templates_are_shipped(tmp_path):
    systems = {"era_capstone", "idefics", "idefics_instruct", "jnana", "llava_chess", "phi35_pooled", "visualize_this"}
    assert chat_template_names() == sorted(systems | set(FORMATS))
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    assert read_chat_template(str(tmp_path / "mine.jinja")) == "{{ messages[0].content }}"


def test_raw_calls_behave_as_llavas(backbones, processor):
    llava = LlavaProcessor(
        tiny_image_processor(),
        processor.tokenizer,
        patch_size=12,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    text = ["USER: <image>\nwhat is it", "two <image> and <image> here", "none"]
    images = [[PICTURE], [PICTURE, PICTURE], []]
    for kwargs in ({"padding": True, "return_tensors": "pt"}, {"padding": False}):
        ours, theirs = processor(images=images, text=text, **kwargs), llava(images=images, text=text, **kwargs)
        for name in ("input_ids", "attention_mask"):
            assert (
                torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name]))
                if kwargs["padding"]
                else (ours[name] == theirs[name])
            )
    assert torch.equal(
        processor(images=PICTURE, text="<image>", return_tensors="pt")["pixel_values"],
        llava(images=PICTURE, text="<image>", return_tensors="pt")["pixel_values"],
    )
    with pytest.raises(ValueError, match="number of images"):
        processor(images=[PICTURE], text="no place for it")


@pytest.mark.parametrize(
    "strategy, additional, expected", [("default", 1, 4), ("full", 1, 5), ("pooled", 1, 1), ("default", 0, 4)]
)
def test_image_tokens_by_strategy(backbones, strategy, additional, expected):
    processor = JnanaProcessor.from_vision_text_pretrained(
        *backbones, vision_feature_select_strategy=strategy, num_additional_image_tokens=additional
    )
    ids = processor(images=PICTURE, text="<image> a", return_tensors="pt")["input_ids"]
    assert (ids == processor.image_token_id).sum() == expected
    data = processor._get_num_multimodal_tokens(image_sizes=[[30, 24], [480, 640]])
    assert data.num_image_tokens == [expected, expected] and data.num_image_patches == [1, 1]
    chat = [{"role": "user", "content": [{"type": "image", "image": PICTURE}]}, {"role": "assistant", "content": "a"}]
    (ids,), (mask,) = processor.encode_chats([chat])
    size = measure_conversation(ids, mask, processor.image_token_id, [expected])
    row = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert size.length == len(row["input_ids"][0])
    assert size.first_label == row["assistant_masks"][0].index(1)
    assert size.images_end == expected


@pytest.mark.parametrize("kind, additional", [("clip", 1), ("clip_full", 1), ("siglip", 0), ("dinov2", 1)])
def test_the_towers_prefix_and_patches_are_known(backbones, tmp_path, kind, additional):
    vision = save_tiny_vision(tmp_path, kind)
    processor = JnanaProcessor.from_vision_text_pretrained(vision, backbones[1])
    assert (processor.patch_size, processor.num_additional_image_tokens) == (12, additional)


def test_model_and_processor_know_the_same_towers():
    """Neither may import the other, so each has the table."""
    assert image_geometry_jnana.TOWER_CLS_TOKENS == configuration_jnana.TOWER_CLS_TOKENS
    for model_type in image_geometry_jnana.TOWER_CLS_TOKENS:
        vision_config = CONFIG_MAPPING[model_type]()
        config = configuration_jnana.JnanaConfig(vision_config=vision_config)
        assert config.num_prefix_tokens == image_geometry_jnana.count_prefix_tokens(vision_config)
    with pytest.raises(ValueError, match="'swin'.*num_additional_image_tokens.*or choose one of clip_vision_model"):
        image_geometry_jnana.count_prefix_tokens(CONFIG_MAPPING["swin"]())


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("strategy", ["default", "full", "pooled"])
def test_the_processor_writes_as_many_tokens_as_the_config_says(backbones, tmp_path, kind, strategy):
    vision = save_tiny_vision(tmp_path, kind)
    processor = JnanaProcessor.from_vision_text_pretrained(
        vision, backbones[1], vision_feature_select_strategy=strategy
    )
    config = configuration_jnana.JnanaConfig(
        vision_config=tiny_vision_config(kind), vision_feature_select_strategy=strategy
    )
    assert processor._get_num_multimodal_tokens([[30, 24]]).num_image_tokens == [config.image_seq_length]


def test_batches_are_made_for_generation(processor, tmp_path):
    """A batch padded on the right would be continued behind its padding."""
    processor.save_pretrained(tmp_path)
    for made in (processor, JnanaProcessor.from_pretrained(tmp_path)):
        mask = made(text=["a", "a white king and a rook"], padding=True, return_tensors="pt")["attention_mask"]
        assert mask[0, 0] == 0 and mask[:, -1].tolist() == [1, 1]


def test_a_processor_that_resizes_to_a_fixed_size_needs_no_crop(processor):
    siglip = JnanaProcessor(
        SiglipImageProcessorPil(size={"height": 24, "width": 36}), processor.tokenizer, patch_size=12
    )
    assert siglip._get_num_multimodal_tokens([[1, 1]]).num_image_tokens == [6]
    assert siglip(images=PICTURE, text="<image>")["input_ids"][0].count(siglip.image_token_id) == 6


def test_mm_token_type_ids_mark_image_tokens(processor):
    chat = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "<image>?"}]}]
    out = processor.apply_chat_template(
        [chat], tokenize=True, return_dict=True, processor_kwargs={"return_mm_token_type_ids": True}
    )
    expected = [int(index == processor.image_token_id) for index in out["input_ids"][0]]
    assert out["mm_token_type_ids"] == [expected] and sum(expected) == 4
    raw = processor(images=PICTURE, text="<image> a", return_mm_token_type_ids=True)
    assert sum(raw["mm_token_type_ids"][0]) == 4


def test_added_tokens_change_no_id(backbones, processor):
    before = AutoTokenizer.from_pretrained(backbones[1])
    after = processor.tokenizer
    assert after.get_vocab().items() >= before.get_vocab().items()
    assert processor.image_token_id == len(before) and after.pad_token_id == len(before) + 1
    assert after.pad_token_id != after.eos_token_id


def test_a_pad_token_of_its_own_is_kept(backbones, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<mypad>"})
    tokenizer.save_pretrained(tmp_path)
    processor = JnanaProcessor.from_vision_text_pretrained(backbones[0], tmp_path)
    assert processor.tokenizer.pad_token == "<mypad>"
    assert len(processor.tokenizer) == len(tokenizer) + 1


def test_arguments_that_cannot_work_are_refused(processor):
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    with pytest.raises(ValueError, match="vision_feature_select_strategy='cls' must be one of default, full, pooled"):
        JnanaProcessor(image_processor, tokenizer, patch_size=12, vision_feature_select_strategy="cls")
    with pytest.raises(ValueError, match="patch_size=None"):  # not before an image needs it
        JnanaProcessor(image_processor, tokenizer).count_image_tokens()
    with pytest.raises(ValueError, match="'<image>' is .* tokens"):
        JnanaProcessor(image_processor, tiny_tokenizer(), patch_size=12)
    with pytest.raises(ValueError, match="gives images of different sizes"):
        JnanaProcessor(
            type(image_processor)(size={"shortest_edge": 24}, do_center_crop=False), tokenizer, patch_size=12
        )._get_num_multimodal_tokens([[1, 1]])


def test_without_torchvision_the_pil_image_processors_serve(processor):
    is_pil = type(processor.image_processor).__name__.endswith("Pil")
    assert is_pil != is_torchvision_available()


def test_only_the_neutralised_passage_is_marked(processor):
    chat = [{"role": "user", "content": "an ordinary question"}]
    assert BREAK not in processor.apply_chat_template(chat)
