"""What training needs of the model: graphs, gradients, checkpointing, precisions, attention kernels, processes."""

import math

import pytest
import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from tests.modeling.pairs import IMAGE, join, pictures, text_ids, with_images
from tests.tiny import VOCAB_ROWS, tiny_text_config, tiny_vision_config


def batch(num_tokens: int = 4):
    ids = with_images(text_ids(2, 12), num_tokens)
    return {"input_ids": ids, "pixel_values": pictures(2), "labels": ids.masked_fill(ids == IMAGE, -100)}


def freeze_all_but_projector(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name)
    return model.train()


def projector_gradients(model):
    model.zero_grad()
    model(**batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.model.multi_modal_projector.named_parameters()}


def test_a_frozen_tower_builds_no_graph(tmp_path):
    model = freeze_all_but_projector(join(tmp_path))
    outputs, features = model.model.get_vision_features(pictures(2))
    assert not features.requires_grad and outputs.last_hidden_state.grad_fn is None
    assert torch.cat(model.get_image_features(pictures(2)).pooler_output).requires_grad  # the projector's is there
    model.model.vision_tower.encoder.layers[0].mlp.fc1.bias.requires_grad_(True)
    assert model.model.get_vision_features(pictures(2))[1].requires_grad  # negative control: one trainable bias


@pytest.mark.parametrize("family", ["phi", "phi3", "gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_only_the_projector_training(tmp_path, family, use_reentrant):
    model = freeze_all_but_projector(join(tmp_path, family))
    expected = projector_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.model.language_model.modules())
    calls = []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = projector_gradients(model)
    assert len(calls) == 2  # the layer really ran again for the backward pass
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_with_input_gradients_for_adapters(tmp_path):
    """PEFT and reentrant checkpointing ask the embeddings for gradients; the frozen tower stays without a graph."""
    model = freeze_all_but_projector(join(tmp_path))
    expected = projector_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    actual = projector_gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)
    assert not model.model.get_vision_features(pictures(1))[1].requires_grad


@pytest.mark.parametrize(
    ("vision", "fields", "unused"),
    [
        ("clip", {}, {"post_layernorm"}),
        ("clip", {"vision_feature_layer": -2}, {"post_layernorm", "encoder.layers.2"}),
        ("clip", {"vision_feature_layer": [0, 1]}, {"post_layernorm", "encoder.layers.1", "encoder.layers.2"}),
        ("clip_full", {"vision_feature_select_strategy": "pooled"}, set()),
        ("siglip", {}, {"post_layernorm", "head"}),
    ],
)
def test_unused_vision_parameters_are_those_without_a_gradient(tmp_path, vision, fields, unused):
    model = join(tmp_path, vision=vision, **fields).train()
    names = set(model.model.unused_vision_parameters())
    model(**batch(model.config.num_image_tokens)).loss.backward()
    assert names == {name for name, p in model.model.named_parameters() if p.grad is None}
    assert all(any(name.startswith(f"vision_tower.{part}") for part in unused) for name in names)
    assert bool(names) == bool(unused)


@pytest.mark.parametrize("family", ["phi", "phi3", "gpt_neox", "llama", "qwen2"])
def test_attention_kernels_agree(tmp_path, family):
    model = join(tmp_path, family)
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :3] = 0
    logits = {}
    # Flex attention runs as written: compiling it for a CPU would take a minute.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for kernel in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(kernel)
            assert model.config.text_config._attn_implementation == kernel
            assert model.config.vision_config._attn_implementation == kernel
            logits[kernel] = model(**inputs, attention_mask=mask).logits[mask.bool()]
        other = model(**inputs).logits[mask.bool()]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits["flex_attention"], logits["eager"], atol=1e-4, rtol=1e-4)
    # Negative control: without the mask the padding in front is read.
    assert not torch.allclose(other, logits["flex_attention"], atol=1e-3)


def test_attention_kernel_is_chosen_when_joining(tmp_path):
    model = join(tmp_path, attn_implementation="eager")
    assert model.config.text_config._attn_implementation == "eager"
    model = join(tmp_path, attn_implementation={"vision_config": "eager", "text_config": "sdpa"})
    kernels = [model.config.vision_config._attn_implementation, model.config.text_config._attn_implementation]
    assert kernels == ["eager", "sdpa"]


def test_bfloat16(tmp_path):
    exact, rough = join(tmp_path), join(tmp_path, dtype=torch.bfloat16).train()
    loss = rough(**batch()).loss
    loss.backward()
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16} and loss.isfinite()
    assert abs(loss.item() - exact(**batch()).loss.item()) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert abs(exact(**batch()).loss.item() - loss.item()) < 0.1


@pytest.mark.parametrize("projector", ["linear", "mlp", "resblock"])
@pytest.mark.parametrize("family", ["phi", "gpt_neox", "qwen2"])
def test_a_random_start_sits_near_the_logarithm_of_the_vocabulary(projector, family):
    config = JnanaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config(family),
        image_token_id=IMAGE,
        projector_type=projector,
    )
    torch.manual_seed(0)
    model = JnanaForConditionalGeneration(config)
    assert abs(model(**batch()).loss.item() - math.log(VOCAB_ROWS)) < 0.1
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # negative control
    assert abs(model(**batch()).loss.item() - math.log(VOCAB_ROWS)) > 0.5


@pytest.mark.parametrize("projector", ["linear", "mlp", "resblock"])
@pytest.mark.parametrize("bias", [True, False])
def test_projectors(projector, bias):
    config = JnanaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config(),
        projector_type=projector,
        multimodal_projector_bias=bias,
        projector_num_blocks=3,
        projector_layer_norm=True,
        projector_hidden_act="silu",
    )
    module = JnanaForConditionalGeneration(config).model.multi_modal_projector
    linears = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    norms = [m for m in module.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert (len(linears), len(norms)) == {"linear": (1, 0), "mlp": (2, 1), "resblock": (7, 3)}[projector]
    assert all((linear.bias is not None) == bias for linear in linears)
    assert all(linear.weight.std() < 0.03 for linear in linears)
    silu = type(ACT2FN["silu"])
    assert any(isinstance(m, silu) for m in module.modules()) == (projector != "linear")
    assert module(torch.randn(2, 4, 32)).shape == (2, 4, 64)


def test_image_and_text_counts_must_agree(tmp_path):
    model = join(tmp_path)
    ids = with_images(text_ids(2), 4)
    for images, numbers in ((pictures(1), "8 image tokens .* 4 vectors"), (pictures(3), "8 image tokens .* 12 vec")):
        with pytest.raises(ValueError, match=f"{numbers}.*processor"):
            model(ids, pixel_values=images)
    with pytest.raises(ValueError, match="8 image tokens .* 0 vectors"):
        model(ids)  # images forgotten
    with pytest.raises(ValueError, match="0 image tokens .* 8 vectors"):
        model(text_ids(2), pixel_values=pictures(2))
    with pytest.raises(ValueError, match="only one of"):
        model(ids, pixel_values=pictures(2), image_features=torch.zeros(2, 4, 32))
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 24, 24\)"):
        model(ids, pixel_values=pictures(2).unsqueeze(1))
    with pytest.raises(ValueError, match="exactly one"):
        model(pixel_values=pictures(2))


def test_every_way_to_give_images_gives_the_same_logits(tmp_path):
    model = join(tmp_path, vision_feature_layer=[-2, -1])
    inputs = batch()
    ids, images = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad():
        expected = model(ids, pixel_values=images)
        features = model.model.get_vision_features(images)[1]
        encoded = model.get_image_features(images)
        stacked = type(encoded)(pooler_output=torch.stack(encoded.pooler_output))
        for given in (
            {"image_features": features},
            {"mm_encoder_outputs": {"image": encoded}},
            {"mm_encoder_outputs": {"image": stacked}},
        ):
            assert torch.equal(model(ids, **given).logits, expected.logits)
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds, pixel_values=images).logits, expected.logits)
        assert not torch.equal(model(ids, image_features=features.flip(0)).logits, expected.logits)
    assert torch.equal(expected.image_hidden_states, torch.cat(encoded.pooler_output))


def test_the_image_token_needs_no_row_in_the_embedding(tmp_path):
    model = join(tmp_path, image_token_id=VOCAB_ROWS + 7)
    ids = torch.where(batch()["input_ids"] == IMAGE, VOCAB_ROWS + 7, batch()["input_ids"])
    within = join(tmp_path)
    with torch.no_grad():
        expected = within(**batch()).logits
        assert torch.equal(model(ids, pixel_values=pictures(2)).logits, expected)
    answer = model.generate(input_ids=ids, pixel_values=pictures(2), max_new_tokens=3, pad_token_id=1)
    assert answer.shape[1] > ids.shape[1]


def test_losses_of_labels_shift_labels_and_kept_logits_agree(tmp_path):
    model = join(tmp_path)
    inputs = batch()
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, expected)
    keep = shifted != -100
    torch.testing.assert_close(
        model(**inputs, shift_labels=shifted[keep], logits_to_keep=keep).loss, expected, atol=1e-6, rtol=1e-6
    )
    count = keep.sum()
    summed = model(**inputs, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * summed, expected)
    assert model(**inputs, shift_labels=labels).loss != expected  # negative control: not shifted


def test_outputs_as_tuple_and_hidden_states(tmp_path):
    model = join(tmp_path)
    outputs = model(**batch(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(model(**batch(), return_dict=False)[0], outputs.loss)


def test_what_processors_may_add_is_accepted(tmp_path):
    model = join(tmp_path)
    inputs = batch()
    kinds = (inputs["input_ids"] == IMAGE).long()
    with torch.no_grad():
        assert torch.equal(model(**inputs, mm_token_type_ids=kinds).logits, model(**inputs).logits)
    del inputs["labels"]
    model.generate(**inputs, mm_token_type_ids=kinds, max_new_tokens=2, pad_token_id=1)


def test_compiles_as_one_graph(tmp_path):
    model = join(tmp_path)
    inputs = batch()
    model(**inputs)  # transformers hooks the tower's layers at the first call, under a lock that dynamo cannot trace
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs, use_cache=False).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5
        )


def test_a_process_without_images_in_its_batch_takes_part(tmp_path, monkeypatch):
    """DDP without a search for unused parameters: a batch of text only must still give the projector its gradient."""
    model = freeze_all_but_projector(join(tmp_path))
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_(True)
    text = {"input_ids": text_ids(2), "labels": text_ids(2)}
    alone = model(**text).loss
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            loss = wrapped(**text).loss
            loss.backward()
        assert torch.equal(loss, alone)
        gradients = [p.grad for p in model.model.multi_modal_projector.parameters()]
        assert all(gradient is not None and not gradient.any() for gradient in gradients)
        # Negative control: without it, DDP stops at the second batch.
        monkeypatch.setattr(type(model.model), "_touch_image_path", lambda self, *given: None)
        with pytest.raises(RuntimeError, match="finished reduction"):
            for _ in range(3):
                wrapped(**text).loss.backward()
    finally:
        torch.distributed.destroy_process_group()


def test_when_a_process_without_images_keeps_up_with_others(tmp_path, monkeypatch):
    """In evaluation and where generation begins, as in training; alone never. Logits stay what they are."""
    model = join(tmp_path).eval()
    text, none = text_ids(2), torch.empty(0, model.config.num_image_tokens, model.config.vision_feature_size)
    ran = []
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(model.model, part).register_forward_hook(lambda *given, part=part: ran.append(part))

    def run(**given) -> tuple[torch.Tensor, list[str]]:
        ran.clear()
        with torch.no_grad():
            return model(text, **given).logits, list(ran)

    def generate() -> tuple[torch.Tensor, list[str]]:
        ran.clear()
        ids = model.generate(text, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
        return ids, list(ran)

    logits, ids = run()[0], generate()[0]
    assert run()[1] == run(image_features=none)[1] == generate()[1] == []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for found, wanted, parts in (
            (run(), logits, ["vision_tower", "multi_modal_projector"]),
            (run(image_features=none), logits, ["multi_modal_projector"]),
            (generate(), ids, ["vision_tower", "multi_modal_projector"]),  # once, for the first of its steps
        ):
            assert torch.equal(found[0], wanted) and found[1] == parts
    finally:
        torch.distributed.destroy_process_group()


def test_is_what_the_ecosystem_looks_for(tmp_path):
    model = join(tmp_path)
    assert isinstance(model, PreTrainedModel) and model.can_generate()
    assert {"CLIPEncoderLayer", "PhiDecoderLayer"} <= set(model._no_split_modules)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert [name for name, _ in model.model.named_children()] == [
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    ]
