"""The model in training: graphs, gradients, checkpointing, precisions, attention kernels, processes."""

import copy
import math

import pytest
import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from jnana.modeling import CACHE_NAME, JnanaConfig, JnanaForConditionalGeneration
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


def _with_large_scores(model):
    """
    Adds the same 131,072, twice the largest float16 number, to all products of queries and keys: one dimension beyond
    the rotary half of each head becomes the constant 256 and 512. The softmax cancels it.
    """
    last = slice(model.config.text_config.hidden_size // model.config.text_config.num_attention_heads - 1, None, 16)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for projection, constant in ((layer.self_attn.q_proj, 256.0), (layer.self_attn.k_proj, 512.0)):
                projection.weight[last] = 0.0
                projection.bias[last] = constant
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_phis_attention_scores_do_not_overflow_in_float16(tmp_path, autocast):
    model = _with_large_scores(join(tmp_path))
    assert model.model.language_model.layers[0].self_attn.head_dim == 16
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(**inputs).logits
        if not autocast:
            model.half()
        for kernel in ("sdpa", "flex_attention"):
            model.set_attn_implementation(kernel)
            with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
                logits = model(**inputs).logits.float()
            assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
        model.set_attn_implementation("eager")
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            with pytest.raises(ValueError, match="'eager'.*Phi in float16.*attn_implementation='sdpa'"):
                model(**inputs)
            # Negative control: eager attention does overflow.
            embeds = model.get_input_embeddings()(text_ids(2))
            assert not model.model.language_model(inputs_embeds=embeds).last_hidden_state.isfinite().all()
        assert model.float()(**inputs).logits.isfinite().all()  # in float32 eager attention is allowed


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
    assert [vectors.shape for vectors in module(torch.randn(2, 4, 32))] == [(4, 64), (4, 64)]


def test_image_and_text_counts_must_agree(tmp_path):
    model = join(tmp_path)
    ids = with_images(text_ids(2), 4)
    for images, numbers in ((pictures(1), "8 image tokens .* 4 vectors"), (pictures(3), "8 image tokens .* 12 vec")):
        with pytest.raises(ValueError, match=f"{numbers}.*processor"):
            model(ids, pixel_values=images)
    with pytest.raises(ValueError, match="8 image tokens .* 0 vectors"):
        model(ids, labels=ids)  # images forgotten
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


def _in_two_processes(folder, function) -> list:
    """What `function(rank)` returns in each of two processes of one gloo group."""
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}", rank=rank, world_size=2)
        try:
            queue.put((rank, function(rank)))
        finally:
            torch.distributed.destroy_process_group()

    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [result for _, result in sorted(queue.get() for _ in processes)]


def test_a_process_without_images_in_its_batch_takes_part(tmp_path):
    """DDP without a search for unused parameters: a batch of text only must still give the projector its gradient."""
    model = freeze_all_but_projector(join(tmp_path))
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_(True)
    text = {"input_ids": text_ids(2), "labels": text_ids(2)}
    alone = model(**text).loss.item()

    def train(rank: int) -> tuple[float, bool, str]:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            loss = wrapped(**text).loss
            loss.backward()
        gradients = [p.grad for p in model.model.multi_modal_projector.parameters()]
        zero = all(gradient is not None and not gradient.any() for gradient in gradients)
        # Negative control: without it, DDP stops at the second batch.
        type(model.model)._encode_blank_image = lambda self, *given: torch.zeros(())
        try:
            for _ in range(3):
                wrapped(**text).loss.backward()
        except RuntimeError as error:
            return loss.item(), zero, str(error)
        return loss.item(), zero, "no error"

    for loss, zero, error in _in_two_processes(tmp_path / "rendezvous", train):
        assert loss == alone and zero and "finished reduction" in error


def test_when_a_batch_without_images_runs_the_tower(tmp_path):
    """
    Only where other processes wait for it: several processes in a training step, or sharded parameters. A server that
    runs one forward over a single token, without a cache and with `torch.distributed` initialised, encodes nothing.
    """
    model = join(tmp_path).eval()
    text, none = text_ids(2), torch.empty(0, model.config.num_image_tokens, model.config.vision_feature_size)
    ran = []
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(model.model, part).register_forward_hook(lambda *given, part=part: ran.append(part))

    def parts(run, *args, **given) -> list[str]:
        ran.clear()
        run(*args, **given)
        return list(ran)

    def generate() -> None:
        model.generate(text, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)

    def calls() -> dict[str, list[str]]:
        found = {
            "train": parts(model, text, labels=text),
            "features": parts(model, text, labels=text, image_features=none),
        }
        with torch.no_grad():
            found |= {"one token": parts(model, text[:, :1]), "evaluate": parts(model, text, labels=text)}
            found |= {"generate": parts(generate)}
        return found

    def sharded(rank: int) -> tuple[dict, dict, bool]:
        plain = calls()
        with torch.no_grad():
            logits = model(text).logits
        torch.distributed.fsdp.fully_shard(model.model.vision_tower.encoder.layers[0])
        with torch.no_grad():
            same = torch.equal(model(text).logits, logits)
        return plain, calls(), same

    nothing = {"train": [], "features": [], "one token": [], "evaluate": [], "generate": []}
    assert calls() == nothing
    both, projector = ["vision_tower", "multi_modal_projector"], ["multi_modal_projector"]
    for plain, shards, same in _in_two_processes(tmp_path / "rendezvous", sharded):
        assert plain == {**nothing, "train": both, "features": projector}
        # in generation once, for the first of its steps
        assert shards == {**dict.fromkeys(nothing, both), "features": projector}
        assert same


def test_the_cache_and_image_outputs_have_both_names(tmp_path):
    model = join(tmp_path)
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        cache = getattr(output, CACHE_NAME)
        assert torch.equal(output.image_outputs.pooler_output, output.image_hidden_states)
        next_ids = torch.full((2, 1), 7)
        expected = model(torch.cat([inputs["input_ids"], next_ids], 1), pixel_values=inputs["pixel_values"]).logits
        for name in ("past_key_values", "cache"):
            logits = model(next_ids, **{name: copy.deepcopy(cache)}).logits
            torch.testing.assert_close(logits, expected[:, -1:], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(next_ids).logits, expected[:, -1:], atol=1e-3)  # negative control
    with pytest.raises(ValueError, match="only one of `past_key_values` and `cache`"):
        model(next_ids, past_key_values=cache, cache=cache)
    longer = torch.cat([inputs["input_ids"], next_ids], 1)
    answers = [
        model.generate(longer, **{name: copy.deepcopy(cache)}, max_new_tokens=3, do_sample=False, pad_token_id=1)
        for name in ("past_key_values", "cache")
    ]
    assert torch.equal(*answers)


def _dropout_modules_in_training(model) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.training and m.p > 0}


def test_a_frozen_language_model_runs_without_dropout(tmp_path):
    """Also beside LoRA weights, which keep their own dropout, and under gradient checkpointing."""
    model = freeze_all_but_projector(join(tmp_path, text_changes={"resid_pdrop": 0.1, "attention_dropout": 0.1}))
    assert not _dropout_modules_in_training(model)
    model.gradient_checkpointing_enable()
    inputs = batch()
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)
    calls = []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**inputs).loss.backward()
    assert len(calls) == 2  # still checkpointed
    model.model.language_model.requires_grad_(True)  # negative control: trained, so regularised
    model.train()
    assert len(_dropout_modules_in_training(model)) > 0 and not torch.equal(model(**inputs).loss, model(**inputs).loss)


def test_frozen_layers_under_lora_run_without_dropout(tmp_path):
    peft = pytest.importorskip("peft")
    model = join(tmp_path, text_changes={"resid_pdrop": 0.1, "attention_dropout": 0.1})
    config = peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=r".*language_model.*\.q_proj")
    adapted = peft.get_peft_model(model, config).train()
    active = _dropout_modules_in_training(adapted)
    assert len(active) == 2 and all(".lora_dropout." in name for name in active)
    for parameter in model.model.language_model.layers[0].mlp.parameters():  # negative control
        parameter.requires_grad_(True)
    adapted.train()
    assert any("resid_dropout" in name for name in _dropout_modules_in_training(adapted))


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


def test_a_step_without_images_in_one_process(tmp_path):
    """Where only the projector trains, a batch of text alone gives it a gradient of zeros and no error."""
    model = join(tmp_path).requires_grad_(False).train()
    model.model.multi_modal_projector.requires_grad_(True)
    ids = text_ids(2)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all((p.grad == 0).all() for p in model.model.multi_modal_projector.parameters())
    assert torch.equal(loss, model.eval()(input_ids=ids, labels=ids).loss)
    model.model.language_model.requires_grad_(True)  # the control: nothing is encoded where other weights train
    model.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.model.multi_modal_projector.parameters())
