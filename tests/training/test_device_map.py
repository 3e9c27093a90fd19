"""`device_map`: the split respects layers, and forward and backward move each tensor to the device that needs it.

No machine of the tests has several GPUs. torch's fake tensors have shapes and devices and no values; an operation on
two devices raises, as it does on GPUs. So the hooks of accelerate and our own code run here on three "devices" of a
CPU.
"""

import json

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainingArguments

from jnana.modeling import image_inputs_jnana, image_slots_jnana, modeling_jnana
from jnana.modeling.packed_layout_jnana import PackedLayout
from jnana.training.device_map import check_device_map, check_spread, spread_over_devices
from jnana.training.options.arguments import LoraArguments, ModelArguments
from jnana.training.stages import apply_stage
from tests.training.test_stages import LORA, batch, pair


SPLIT = {
    "model.vision_tower": "cpu:0",
    "model.multi_modal_projector": "cpu:0",
    "model.language_model.embed_tokens": "cpu:1",
    "model.language_model.rotary_emb": "cpu:1",
    "model.language_model.layers.0": "cpu:1",
    "model.language_model.layers.1": "cpu:2",
    "model.language_model.final_layernorm": "cpu:2",
    "lm_head": "cpu:2",
}
# The tower over two devices, its selected layers too.
SPLIT_TOWER = {
    **dict.fromkeys(SPLIT, "cpu:2"),
    "model.vision_tower.embeddings": "cpu:0",
    "model.vision_tower.pre_layrnorm": "cpu:0",
    "model.vision_tower.encoder.layers.0": "cpu:0",
    "model.vision_tower.encoder.layers.1": "cpu:1",
    "model.vision_tower.encoder.layers.2": "cpu:1",
    "model.vision_tower.post_layernorm": "cpu:1",
}
del SPLIT_TOWER["model.vision_tower"]


def place(model, device_map: dict[str, str]) -> None:
    """Give each weight and buffer its device; fake tensors cannot be moved in place."""
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                full = f"{name}.{key}"
                device = next(device for prefix, device in device_map.items() if full.startswith(f"{prefix}."))
                moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                if isinstance(tensor, torch.nn.Parameter):
                    moved = torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
                tensors[key] = moved


def layout_of_branches() -> PackedLayout:
    """Of two rows: a prefix of six tokens and two branches of three. Made of values, which fake tensors don't have."""
    branches = torch.tensor([[0] * 6 + [1] * 3 + [2] * 3] * 2)
    positions = torch.tensor([[*range(6), 6, 7, 8, 6, 7, 8]] * 2)
    return PackedLayout.from_ids(torch.zeros_like(branches), branches, positions)


LAYOUT = layout_of_branches()


def inputs(packed: bool) -> dict[str, torch.Tensor]:
    """On the first device, where the Trainer puts a batch."""
    ids = torch.zeros(2, 12, dtype=torch.long, device="cpu:0")
    given = {"input_ids": ids, "labels": ids, "pixel_values": torch.zeros(2, 3, 24, 24, device="cpu:0")}
    if packed:
        given |= {"segment_ids": ids, "branch_ids": ids, "position_ids": ids}
        given["packed_layout"] = LAYOUT
        given |= {
            "logit_positions": torch.tensor([3, 4, 15], device="cpu:0"),
            "shift_labels": ids,
            "skip_logits": True,
        }
        given["image_positions"] = torch.arange(8, device="cpu:0")
    return given


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors have no values, so counts can't be compared."""
    monkeypatch.setattr(image_inputs_jnana, "torch_compilable_check", lambda *args: None)


def train_once(
    device_map: dict[str, str], packed: bool = False, layer=-2, lora: LoraArguments | None = None, **fields
):
    """One forward and backward pass of a spread model; the devices of the trained weights.

    In a real run an adapter is added to the model after it is spread, and PEFT moves it; fake tensors can't be moved.
    """
    model = apply_stage(pair(layer=layer, **fields), "sft", lora, freeze_vision_tower=False)
    model.train()
    inner = model if lora is None else model.get_base_model()
    with FakeTensorMode(allow_non_fake_inputs=True):
        place(inner, device_map)
        dispatch_model(inner, device_map, main_device="cpu:0", skip_keys=inner._skip_keys_device_placement)
        loss = model(**inputs(packed), use_cache=False).loss
        assert loss.device == torch.device("cpu:0")
        loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.device == parameter.device for parameter in trained)
    return {str(parameter.device) for parameter in trained}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_a_step_on_three_devices(fake, packed, lora):
    assert train_once(SPLIT, packed, lora=lora) == {"cpu:0", "cpu:1", "cpu:2"}


def test_a_tower_on_two_devices_with_several_selected_layers(fake):
    assert train_once(SPLIT_TOWER, layer=[-1, -3]) == {"cpu:0", "cpu:1", "cpu:2"}


CROSS_ATTENTION = {
    "fusion": "cross_attention",
    "cross_layer_interval": 1,
    "projector_type": "perceiver",
    "projector_num_latents": 3,
    "projector_depth": 1,
}


@pytest.mark.parametrize("blocks", ["cpu:0", "cpu:2"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_cross_attention_on_three_devices(fake, monkeypatch, blocks, lora):
    """Its blocks get the text from the device of one layer, and hand it on to that of the next."""
    # The number of images in a row is read from the tensor, which here has no values.
    monkeypatch.setattr(image_slots_jnana, "find_positions", lambda mask, start, most, slots: mask[:, :most].long())
    first = "model.cross_attention" if lora else "model.cross_attention.layers.0"
    split = {**SPLIT, first: blocks, "model.cross_attention.layers.1": "cpu:1"}
    assert train_once(split, lora=lora, **CROSS_ATTENTION) == {"cpu:0", "cpu:1", "cpu:2"}


@pytest.mark.parametrize("fields", [{}, CROSS_ATTENTION], ids=["tokens", "cross_attention"])
def test_an_adapter_on_a_spread_model(fields):
    """PEFT copies the parts that train whole, accelerate's hooks in them too; each copy must compute with its own."""

    def gradients(spread: bool, seed: int = 2) -> dict[str, torch.Tensor]:
        model = pair(layer=-2, **fields)
        if spread:
            parts = [name for name, _ in model.model.named_children()]
            layers = {
                f"model.{name}.{child}": "cpu"
                for name in parts
                for child, _ in getattr(model.model, name).named_children()
            }
            dispatch_model(model, {**layers, "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
            assert hasattr(model.model.vision_tower.encoder, "_hf_hook")
        torch.manual_seed(1)
        model = apply_stage(model, "sft", LORA, freeze_vision_tower=False)
        model.train()
        torch.manual_seed(seed)
        inputs = batch()
        if fields:
            inputs["input_ids"][:, 2:5] = 7  # an image takes one token
        model(**inputs, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    spread, whole = gradients(True), gradients(False)
    assert spread.keys() == whole.keys() and any("modules_to_save" in name for name in whole)
    assert any("vision_tower" in name for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(spread[name], gradient, rtol=0, atol=0, msg=name)
    other = gradients(True, seed=3)  # the control: other images
    assert not all(torch.equal(other[name], gradient) for name, gradient in whole.items())


def test_without_moving_a_mask_it_fails(fake, monkeypatch):
    """The control: fake devices do differ."""
    stay = modeling_jnana.JnanaImageMixin.get_placeholder_mask

    def on_first(self, *args):
        return stay(self, *args).to("cpu:0")

    monkeypatch.setattr(modeling_jnana.JnanaImageMixin, "get_placeholder_mask", on_first)
    with pytest.raises(RuntimeError, match="same device"):
        train_once(SPLIT)


def test_the_split_keeps_layers_whole():
    """transformers and [`spread_over_devices`] ask accelerate with these names; without them a layer is cut."""
    model = pair()
    layers = {name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}
    assert len(layers) == 1 + 3 + 2  # CLIP's embeddings, its layers, and those of the language model
    sizes = dict.fromkeys((0, 1, 2), sum(parameter.nbytes for parameter in model.parameters()) * 9 // 20)
    found = infer_auto_device_map(model, sizes, no_split_module_classes=sorted(model._no_split_modules))
    assert set(found.values()) == {0, 1, 2}
    assert not [name for name in found for layer in layers if name.startswith(f"{layer}.")]
    cut = infer_auto_device_map(model, sizes, no_split_module_classes=[])
    assert [name for name in cut for layer in layers if name.startswith(f"{layer}.")]  # the control


def test_a_new_pair_is_spread_on_the_cpu_alone():
    """All that this machine can do: one device, whose model computes as before."""
    model = pair()
    ids = torch.full((1, 5), 7)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        spread = spread_over_devices(model, "auto")
        assert set(spread.hf_device_map.values()) == {"cpu"}
        torch.testing.assert_close(spread(input_ids=ids).logits, before, rtol=0, atol=0)


def arguments(folder) -> TrainingArguments:
    return TrainingArguments(output_dir=folder, report_to="none", use_cpu=True)


def test_refused_with_several_processes(tmp_path, monkeypatch):
    args, spread = arguments(tmp_path), ModelArguments(model_name_or_path="x", device_map="auto")
    check_device_map(spread, args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"device_map is 'auto', .* shards the model \(fsdp\); start .* `python`"):
        check_device_map(spread, args)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="this run has 2 processes; start the script with `python`"):
        check_device_map(spread, args)
    check_device_map(ModelArguments(model_name_or_path="x"), args)  # the control


def test_refused_where_quantised_weights_would_move(tmp_path):
    """All but a Jnana checkpoint is built on the CPU and then spread."""
    pair_args = ModelArguments(vision_model="clip", text_model="phi", device_map="balanced")
    checkpoint = ModelArguments(model_name_or_path=str(tmp_path), device_map="balanced")
    for model_type, args in ((None, pair_args), ("llava", checkpoint), ("jnana", checkpoint)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        check_device_map(args, arguments(tmp_path))
        if model_type == "jnana":  # the control
            check_device_map(args, arguments(tmp_path), "nf4")
            continue
        with pytest.raises(ValueError, match="device_map is 'balanced' and quantization 'nf4', which needs a Jnana"):
            check_device_map(args, arguments(tmp_path), "nf4")


def test_refused_if_layers_stay_outside_of_the_gpus(tmp_path, monkeypatch):
    args, model = arguments(tmp_path), pair()
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"1 modules stay outside of them \(lm_head, ...\), .*use more GPUs"):
        check_spread(model, args)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    check_spread(model, args)
    model.hf_device_map = {"": 0}
    check_spread(model, args)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)  # the Trainer would use DataParallel
    with pytest.raises(ValueError, match="device_map put the whole model on one of 2 GPUs; leave it out"):
        check_spread(model, args)
