"""Between the start of forward and the end of backward nothing of this package reads a value from the device.

On a GPU every such read waits until all queued work is done. On a CPU the operations that would read are recorded;
with a GPU torch itself raises at each of them.
"""

import traceback

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.processing import JnanaProcessor, add_jnana_tokens, read_chat_template
from jnana.processing.data import JnanaCollator
from tests.tiles import rows_of, save_pictures, tile_pair
from tests.tiny import PATCH_SIZE, tiny_image_processor, tiny_text_config, tiny_tokenizer, tiny_vision_config


READING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select"),
    *("masked_scatter_backward", "bincount", "unique_consecutive", "_unique2", "unique_dim", "histc"),
}
CROSS_ATTENTION = {
    "fusion": "cross_attention",
    "cross_layer_interval": 1,
    "projector_type": "perceiver",
    "projector_num_latents": 3,
    "projector_depth": 1,
}


class Reads(TorchDispatchMode):
    """Records, for each operation that reads a value or counts a mask, its name and the file that called it."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def record(self, name: str) -> None:
        frames = [frame.filename for frame in traceback.extract_stack()[:-1]]
        own = [file for file in frames if "/torch/" not in file and file != __file__]
        self.found.append((name, own[-1] if own else ""))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
        masks = masks and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        counts = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in READING or masks or counts:
            self.record(name)
        return function(*args, **kwargs)


def reads_of_a_step(model, batch, monkeypatch) -> list[tuple[str, str]]:
    """What one forward and backward pass reads."""
    with Reads() as reads, monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu", "__int__", "__float__"):
            original = getattr(torch.Tensor, name)

            def reading(self, *args, name=name, original=original, **kwargs):
                reads.record(name)
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, reading)
        model(**batch).loss.backward()
    return reads.found


def make_pair(folder, kind: str) -> tuple[JnanaForConditionalGeneration, JnanaProcessor]:
    if kind == "tiles":
        return tile_pair(folder)
    fields = CROSS_ATTENTION if kind == "cross_attention" else {"projector_type": "mlp"}
    tokenizer = tiny_tokenizer()
    add_jnana_tokens(tokenizer)
    processor = JnanaProcessor(
        tiny_image_processor(),
        tokenizer,
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
        chat_template=read_chat_template("jnana"),
        tokens_per_view=1 if kind == "cross_attention" else None,
    )
    config = JnanaConfig.from_vision_text_configs(
        tiny_vision_config("clip"), tiny_text_config("phi"), image_token_id=processor.image_token_id, **fields
    )
    torch.manual_seed(0)
    return JnanaForConditionalGeneration(config), processor


def trained(model, how: str):
    """As the stages do: the projector alone, with LoRA, or all, checkpointed."""
    if how == "all":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()
    model.requires_grad_(False)
    if how == "lora":
        config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|fc1|up_proj)")
        model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name or "cross_attention" in name:
            parameter.requires_grad_(True)
    return model.train()


@pytest.mark.parametrize(("packing", "how"), [("none", "all"), ("rows", "projector"), ("shared_image", "lora")])
@pytest.mark.parametrize("kind", ["tokens", "cross_attention", "tiles"])
def test_a_batch_of_our_collator(tmp_path, monkeypatch, kind, packing, how):
    model, processor = make_pair(tmp_path / "pair", kind)
    paths = save_pictures(tmp_path / "pictures")
    model, collator = trained(model, how), JnanaCollator(processor, packing=packing)
    batches = [collator(rows_of(paths))]
    batches.append(JnanaCollator(processor, packing=packing, normalize_on_device=True)(rows_of(paths)))
    if how != "projector":  # or nothing depends on what trains
        batches.append(collator(rows_of(paths)[4:5]))  # without an image
    for batch in batches:
        assert batch["skip_logits"] and model(**batch).logits is None
        reads = reads_of_a_step(model, batch, monkeypatch)
        # transformers looks whether a padding mask masks anything; packed rows have none
        ours = [(name, file) for name, file in reads if packing != "none" or not file.endswith("masking_utils.py")]
        assert not ours


@pytest.mark.parametrize("kind", ["tokens", "cross_attention", "tiles"])
def test_any_other_batch_is_checked_once(tmp_path, monkeypatch, kind):
    """The control, too: what the collator would have counted is counted by the model, in forward and once."""
    model, processor = make_pair(tmp_path / "pair", kind)
    paths = save_pictures(tmp_path / "pictures")
    batch = JnanaCollator(processor, packing="shared_image")(rows_of(paths))
    model = trained(model, "all")
    del batch["image_positions"], batch["max_row_image_tokens"]
    names = [name for name, _ in reads_of_a_step(model, batch, monkeypatch)]
    # The gradient of `masked_scatter` counts the mask. Cross-attention also reads the most images of a row.
    expected = ["_local_scalar_dense"]
    expected.append("_local_scalar_dense" if kind == "cross_attention" else "masked_scatter_backward")
    assert [name for name in names if name not in ("__int__", "item")] == expected, names
    with pytest.raises(ValueError, match="image tokens .* but the images"):
        model(**{**batch, "image_indices": batch["image_indices"][:-1]})
    del batch["logit_positions"]
    batch["logits_to_keep"] = batch["shift_labels"] != -100
    assert "nonzero" in [name for name, _ in reads_of_a_step(model, batch, monkeypatch)]


@pytest.mark.parametrize("kind", ["tokens", "cross_attention", "tiles"])
def test_levels_that_are_not_normalised_are_floats_for_the_model(tmp_path, kind):
    """Of an image processor without `do_rescale` and `do_normalize`: bytes with a table, or floats, train alike."""
    model, processor = make_pair(tmp_path / "pair", kind)
    processor.image_processor.do_rescale = processor.image_processor.do_normalize = False
    rows = rows_of(save_pictures(tmp_path / "pictures"))
    floats = JnanaCollator(processor)(rows)
    held = JnanaCollator(processor, normalize_on_device=True)(rows)
    assert floats["pixel_values"].max() > 100 and held["pixel_values"].dtype == torch.uint8
    losses = [trained(model, "all")(**batch).loss for batch in (floats, held)]
    assert losses[0].isfinite() and torch.equal(*losses)
    losses[0].backward()
    del held["pixel_table"]  # the control
    with pytest.raises(ValueError, match="`pixel_values` are bytes"):
        model(**held)


def test_positions_that_do_not_fit_the_images_raise(tmp_path):
    model, processor = make_pair(tmp_path / "pair", "tokens")
    batch = JnanaCollator(processor)(rows_of(save_pictures(tmp_path / "pictures")))
    with pytest.raises(ValueError, match=r"The text has 75 image tokens .* but the images give 76 vectors"):
        model(**{**batch, "image_positions": batch["image_positions"][1:]})
    text = {name: value for name, value in batch.items() if name not in ("pixel_values", "image_indices")}
    with pytest.raises(ValueError, match="The text has 76 image tokens .* but the images give 0 vectors"):
        model(**text)


@pytest.mark.parametrize("kind", ["tokens", "cross_attention", "tiles"])
def test_images_normalised_by_the_model(tmp_path, kind):
    """Loss and gradients are those of the image processor's floats, to the last bit."""
    model, processor = make_pair(tmp_path / "pair", kind)
    rows, results = rows_of(save_pictures(tmp_path / "pictures")), []
    model = trained(model, "all")
    for name, weight in model.named_parameters():
        if "gate" in name:  # closed at first, so that nothing would depend on images
            weight.data.fill_(0.5)
    for on_device in (False, True):
        batch = JnanaCollator(processor, packing="shared_image", normalize_on_device=on_device)(rows)
        assert (batch["pixel_values"].dtype == torch.uint8) == on_device
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, [weight.grad for weight in model.parameters() if weight.grad is not None]))
    (loss, gradients), (same_loss, same_gradients) = results
    assert torch.equal(loss, same_loss) and len(gradients) == len(same_gradients) > 10
    assert all(map(torch.equal, gradients, same_gradients))
    brighter = {**batch, "pixel_values": batch["pixel_values"] ^ 1}
    assert not torch.equal(model(**brighter).loss, loss)  # the control
    del batch["pixel_table"]
    with pytest.raises(ValueError, match="`pixel_values` are bytes. Give them to `forward` or `generate` with"):
        model(**batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "cross_attention", "tiles"])
def test_on_a_gpu(tmp_path, kind, on_device):
    model, processor = make_pair(tmp_path / "pair", kind)
    model = trained(model, "lora").cuda()
    collator = JnanaCollator(processor, packing="shared_image", normalize_on_device=on_device)
    batch = collator(rows_of(save_pictures(tmp_path / "pictures")))
    batch = send_to_device(batch, "cuda")
    model(**batch).loss.backward()  # libraries are loaded
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="synchroniz"):  # the control
        del batch["image_positions"], batch["max_row_image_tokens"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
