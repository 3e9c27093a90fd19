"""Loading: 4-bit products that are the same on every CPU, the default device, and records of an adapter's base."""

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from jnana.modeling import (
    JnanaForConditionalGeneration,
    available_device,
    held_dtype,
    quantization_config,
    read_base_reference,
)
from jnana.processing import JnanaProcessor
from jnana.training.adapters import base_reference, complete_adapter_folder
from jnana.training.loading import load_model
from jnana.training.model_setup import build_pair
from jnana.training.options.arguments import LoraArguments, ModelArguments
from jnana.training.stages import apply_stage
from tests.packed_kernel import KERNELS, force_kernel
from tests.tiny import save_tiny_text, save_tiny_vision


NF4 = {"quantization": "nf4"}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
NARROW = {"hidden_size": 32, "intermediate_size": 32}  # below bitsandbytes' block of 64


def save_pair(folder, kind: str, **changes) -> str:
    """A full checkpoint and its processor; `folder` also keeps the two backbones."""
    backbones = str(save_tiny_vision(folder / "clip")), str(save_tiny_text(folder / "text", kind, **changes))
    processor = JnanaProcessor.from_vision_text_pretrained(*backbones)
    build_pair(*backbones, processor, vision_feature_layer=-1).save_pretrained(folder / "pair")
    processor.save_pretrained(folder / "pair")
    return str(folder / "pair")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> str:
    return save_pair(tmp_path_factory.mktemp("phi"), "phi", **WIDTHS)


@pytest.fixture(scope="module")
def llama_pair(tmp_path_factory) -> str:
    return save_pair(tmp_path_factory.mktemp("llama"), "llama", **WIDTHS)


def save_adapter(pair: str, folder, **arguments) -> str:
    """An adapter as run_sft leaves it, every weight of it random and in float32."""
    args = ModelArguments(model_name_or_path=pair, dtype=arguments.pop("dtype", "float32"))
    lora = LoraArguments(lora_r=2, **arguments)
    reference = base_reference(args, lora)
    model, processor = load_model(pair, quantization=reference["quantization"], dtype=args.dtype)
    model.model.multi_modal_projector.float()
    torch.manual_seed(0)
    model = apply_stage(model, "sft", lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.get_base_model().generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    complete_adapter_folder(model, reference, folder)
    return str(folder)


def image_inputs(model) -> dict[str, torch.Tensor]:
    image = model.config.image_token_id
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[image] * 4 + list(range(5, 25))]), "pixel_values": pixels}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**image_inputs(model)).logits


def gradients_of(model) -> list[torch.Tensor]:
    """The projector's, through the quantised language model in training mode."""
    projector = model.model.multi_modal_projector.float().requires_grad_(True)
    inputs = image_inputs(model)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [parameter.grad.clone() for parameter in projector.parameters()]
    model.zero_grad()
    return gradients


def allow_packed_kernel(model) -> None:
    """Undo what loading does; the rest is bitsandbytes' own behaviour."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True


def load_joined(pair: str) -> JnanaForConditionalGeneration:
    folder = pair.removesuffix("pair")
    return JnanaForConditionalGeneration.from_vision_text_pretrained(
        folder + "clip", folder + "text", image_token_id=300, quantization_config=quantization_config(NF4)
    )


LOADERS = {
    "load_model": lambda pair: load_model(pair, quantization="nf4")[0],
    "from_pretrained": lambda pair: JnanaForConditionalGeneration.from_pretrained(
        pair, quantization_config=quantization_config(NF4)
    ),
    "with loading info": lambda pair: JnanaForConditionalGeneration.from_pretrained(
        pair, quantization_config=quantization_config(NF4), output_loading_info=True
    )[0],
    "saved in 4 bits": lambda pair: saved_in_four_bits(pair),
}


def saved_in_four_bits(pair: str) -> JnanaForConditionalGeneration:
    load_model(pair, quantization="nf4")[0].save_pretrained(f"{pair}_nf4")
    return JnanaForConditionalGeneration.from_pretrained(f"{pair}_nf4")


@pytest.mark.parametrize("kernel", KERNELS)
class TestPackedKernel:
    """What a 4-bit model computes does not depend on whether the CPU has AVX512-BF16."""

    @pytest.mark.parametrize("loader", LOADERS)
    def test_logits(self, pair, kernel, loader, monkeypatch):
        with monkeypatch.context() as off:
            force_kernel("off", off.setattr)
            expected = logits_of(LOADERS[loader](pair))
        force_kernel(kernel, monkeypatch.setattr)
        model = LOADERS[loader](pair)
        assert torch.equal(logits_of(model), expected)
        assert torch.equal(logits_of(model), expected)  # once more: the first forward is the one that repacks
        if kernel != "off":  # the control
            allow_packed_kernel(model)
            assert 1e-4 < (logits_of(model) - expected).abs().max() < 0.1

    def test_a_pair_joined_in_four_bits(self, pair, kernel, monkeypatch):
        force_kernel(kernel, monkeypatch.setattr)
        torch.manual_seed(0)
        model = load_joined(pair)
        first = logits_of(model)
        torch.manual_seed(0)
        again = load_joined(pair).dequantize()
        torch.testing.assert_close(first, logits_of(again), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", ["llama_pair", "pair"])
    def test_gradients_after_an_evaluation(self, request, kind, kernel, monkeypatch):
        force_kernel(kernel, monkeypatch.setattr)
        model, _ = load_model(request.getfixturevalue(kind), quantization="nf4")
        before = gradients_of(model)
        logits_of(model)
        after = gradients_of(model)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if kernel == "off":
            return
        allow_packed_kernel(model)  # the control: gradients that miss most of what the layers pass back
        logits_of(model)
        if kernel == "native" and kind == "pair":  # Phi's layers have biases, which the native kernel adds in place
            with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
                gradients_of(model)
            return
        assert gradients_of(model)[0].norm() < before[0].norm() / 2

    def test_layers_narrower_than_a_block(self, tmp_path, kernel, monkeypatch):
        pair = save_pair(tmp_path, "phi", **NARROW)
        with monkeypatch.context() as off:
            force_kernel("off", off.setattr)
            expected = logits_of(load_model(pair, quantization="nf4")[0])
        force_kernel(kernel, monkeypatch.setattr)
        model, _ = load_model(pair, quantization="nf4")
        assert torch.equal(logits_of(model), expected)
        if kernel != "off":  # the control
            allow_packed_kernel(model)
            with pytest.raises(RuntimeError, match=r"shape '\[32, 0\]' is invalid"):
                logits_of(model)

    def test_an_adapter(self, pair, kernel, tmp_path, monkeypatch):
        with monkeypatch.context() as off:
            force_kernel("off", off.setattr)
            folder = save_adapter(pair, tmp_path / "sft", quantization="nf4")
            expected = logits_of(load_model(folder)[0])
        force_kernel(kernel, monkeypatch.setattr)
        for model in (load_model(folder)[0], AutoModelForImageTextToText.from_pretrained(folder)):
            assert torch.equal(logits_of(model), expected)


def test_a_bitsandbytes_without_the_kernel(pair, monkeypatch):
    """Older and newer versions: their layers have no such attribute, and loading adds none."""
    from bitsandbytes.nn import Linear4bit

    original = Linear4bit.__init__

    def without(self, *args, **kwargs):
        original(self, *args, **kwargs)
        vars(self).pop("support_avx512bf16_for_cpu", None)

    monkeypatch.setattr(Linear4bit, "__init__", without)
    model, _ = load_model(pair, quantization="nf4")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and not any(hasattr(layer, "support_avx512bf16_for_cpu") for layer in layers)


class TestAvailableDevice:
    @pytest.mark.parametrize(("present", "device"), [(False, "cpu"), (True, "cuda")])
    def test_a_build_that_knows_cuda(self, present, device, monkeypatch):
        """torch names cuda on every CUDA build; whether there is a GPU is another question."""
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: present)
        assert torch.accelerator.current_accelerator() == torch.device("cuda")  # the control
        assert available_device() == torch.device(device)

    def test_a_build_for_cpus_only(self, monkeypatch):
        monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: None)
        assert available_device() == torch.device("cpu")

    def test_a_gpu_that_is_not_wanted(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        assert available_device() == torch.device("cpu")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
        assert available_device() == torch.device("cuda")  # the control


class TestBothLoaders:
    """`load_model` and `from_pretrained` give the same model of the same folder."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
    def test_of_an_adapter(self, pair, tmp_path, dtype, quantization):
        folder = save_adapter(pair, tmp_path / "sft", dtype=dtype, quantization=quantization)
        ours, theirs = load_model(folder)[0], AutoModelForImageTextToText.from_pretrained(folder)
        assert isinstance(ours, PeftModel) and isinstance(theirs, JnanaForConditionalGeneration)
        assert torch.equal(logits_of(ours), logits_of(theirs))
        assert ours.dtype == theirs.dtype == getattr(torch, dtype)
        adapter = {p.dtype for m in (ours, theirs) for name, p in m.named_parameters() if "lora_" in name}
        assert adapter == {torch.float32}
        inner = ours.get_base_model()
        assert inner.generation_config.to_dict() == theirs.generation_config.to_dict()
        assert inner.generation_config.max_new_tokens == 7  # the control: of the adapter's folder, not the base's
        with ours.disable_adapter():
            assert not torch.allclose(logits_of(ours), logits_of(theirs), atol=1e-3)  # the control

    def test_of_a_full_checkpoint(self, pair):
        ours, theirs = load_model(pair)[0], AutoModelForImageTextToText.from_pretrained(pair)
        assert torch.equal(logits_of(ours), logits_of(theirs))
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
        assert ours.generation_config.max_new_tokens is None

    def test_in_another_dtype_than_the_training(self, pair, tmp_path):
        folder = save_adapter(pair, tmp_path / "sft")
        ours = load_model(folder, dtype="bfloat16")[0]
        theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        assert torch.equal(logits_of(ours), logits_of(theirs)) and ours.dtype == theirs.dtype == torch.bfloat16
        assert not torch.equal(logits_of(ours), logits_of(load_model(folder)[0]))  # the control

    def test_of_an_adapter_in_a_subfolder(self, pair, tmp_path):
        """As of a Hub repository that holds several; the base's relative path starts in the subfolder."""
        folder = save_adapter(pair, tmp_path / "repository" / "adapters" / "sft")
        expected = logits_of(load_model(folder)[0])
        place = {"subfolder": "adapters/sft"}
        repository = str(tmp_path / "repository")
        ours, processor = load_model(repository, **place)
        theirs = AutoModelForImageTextToText.from_pretrained(repository, **place)
        assert torch.equal(logits_of(ours), expected) and torch.equal(logits_of(theirs), expected)
        assert theirs.generation_config.max_new_tokens == 7
        assert processor.image_token_id == ours.config.image_token_id
        with pytest.raises(ValueError, match="is not a Jnana checkpoint: it has no processor_config.json"):
            load_model(repository)  # the control


class TestAdapterFiles:
    def test_nothing_trains_and_the_adapter_can_be_switched_off(self, pair, tmp_path):
        folder = save_adapter(pair, tmp_path / "sft")
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
        assert not info["missing_keys"] and not info["unexpected_keys"]
        adapted = logits_of(model)
        for module in model.modules():  # `disable_adapters` of transformers 5.24 demands a newer PEFT than there is
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        assert not torch.allclose(logits_of(model), adapted, atol=1e-3)

    @pytest.mark.parametrize("part", ["lora_B", "multi_modal_projector"])
    def test_weights_that_are_missing(self, pair, tmp_path, part):
        folder = save_adapter(pair, tmp_path / "sft")
        file = f"{folder}/adapter_model.safetensors"
        weights = load_file(file)
        dropped = next(name for name in weights if part in name)
        save_file({name: tensor for name, tensor in weights.items() if name != dropped}, file)
        with pytest.raises(ValueError, match=f"the adapter .* lacks weights: .*{part}.*; save it again"):
            AutoModelForImageTextToText.from_pretrained(folder)


class TestBaseReference:
    @pytest.fixture
    def folder(self, pair, tmp_path):
        return save_adapter(pair, tmp_path / "sft")

    def rewrite(self, folder, **changes) -> None:
        file = f"{folder}/jnana_base.json"
        record = {**json.loads(open(file).read()), **changes}
        with open(file, "w") as stream:
            json.dump({name: value for name, value in record.items() if value is not None}, stream)

    def test_the_format_is_written(self, folder):
        assert json.loads(open(f"{folder}/jnana_base.json").read())["format"] == 1
        assert "format" not in read_base_reference(folder)

    def test_one_without_a_format_is_read(self, folder):
        expected = read_base_reference(folder)
        self.rewrite(folder, format=None)
        assert read_base_reference(folder) == expected
        load_model(folder)

    def test_a_newer_one_is_refused(self, folder):
        self.rewrite(folder, format=2)
        message = r"jnana_base.json of the adapter '.*sft' has format 2, and .* reads formats up to 1: update jnana"
        for load in (load_model, AutoModelForImageTextToText.from_pretrained):
            with pytest.raises(ValueError, match=message):
                load(folder)


class TestSafetensorsOnly:
    """Pickled weights are never read, whichever half of a pair they are of."""

    @pytest.mark.parametrize("part", ["vision", "text"])
    def test_a_backbone_with_pickled_weights_only(self, tmp_path, part):
        folders = {"vision": save_tiny_vision(tmp_path / "vision"), "text": save_tiny_text(tmp_path / "text")}
        JnanaForConditionalGeneration.from_vision_text_pretrained(*map(str, folders.values()), image_token_id=120)
        file = folders[part] / "model.safetensors"
        torch.save(load_file(file), folders[part] / "pytorch_model.bin")
        file.unlink()
        with pytest.raises(OSError, match=rf"{part} has no weights in safetensors, and pickled ones .* convert them"):
            JnanaForConditionalGeneration.from_vision_text_pretrained(*map(str, folders.values()), image_token_id=120)

    def test_another_error_is_left_as_it_is(self, tmp_path):
        with pytest.raises(OSError) as raised:
            JnanaForConditionalGeneration.from_vision_text_pretrained(
                str(tmp_path / "none"), str(tmp_path / "none"), image_token_id=120
            )
        assert "pickled" not in str(raised.value)


def test_float16_is_held_in_bfloat16():
    assert held_dtype(torch.float16) == torch.bfloat16
    assert held_dtype(torch.float32) == torch.float32 and held_dtype(None) is None
