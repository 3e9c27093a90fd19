"""Generation beyond greedy decoding, offloaded weights and quantised layers: tokens equal stock LLaVA's."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForImageTextToText, QuantoConfig, TorchAoConfig


@pytest.fixture
def expected(stock, ours) -> list[int]:
    answer = stock.answer()
    assert ours.answer() == answer
    other = ours.inputs()
    other["pixel_values"] = -other["pixel_values"]  # negative control: the answer depends on the image
    assert ours.model.generate(**other, max_new_tokens=8, do_sample=False)[0, -8:].tolist() != answer
    return answer


@pytest.mark.client("generate: static cache", note="")
def test_a_static_cache(stock, ours, expected):
    assert stock.answer(cache_implementation="static") == ours.answer(cache_implementation="static") == expected


@pytest.mark.client("generate: quantised cache", note="optimum-quanto, HQQ")
@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_a_quantised_cache(stock, ours, backend, package):
    pytest.importorskip(package)
    settings = {"backend": backend, "nbits": 4, "q_group_size": 8, "residual_length": 4}
    settings |= {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    answers = [
        side.answer(cache_implementation="quantized", cache_config=settings, max_new_tokens=16)
        for side in (stock, ours)
    ]
    assert answers[0] == answers[1]


@pytest.mark.client("generate: beam search", note="")
def test_beam_search(stock, ours):
    assert stock.answer(num_beams=3) == ours.answer(num_beams=3)


@pytest.mark.client("generate: assisted decoding", note="the assistant model encodes the image by itself")
def test_the_assistant_model_sees_the_image(stock, ours, expected):
    """Stock's assistant reads the image tokens' own embeddings. Ours proposes what the model would answer."""
    draft = copy.deepcopy(ours.model)
    seen = []
    draft.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    assert stock.answer(assistant_model=copy.deepcopy(stock.model)) == expected
    assert ours.answer(assistant_model=draft) == expected
    inputs = ours.inputs()
    ids = inputs["input_ids"][0]
    places = ids == ours.model.config.image_token_id
    vectors = ours.model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    prompt = seen[0][0][: len(ids)]
    torch.testing.assert_close(prompt[places], vectors)
    # Negative control: the image token's own embedding is another vector.
    assert not torch.allclose(prompt[places], ours.model.get_input_embeddings()(ids[places]))


def test_an_assistant_and_chunks_of_the_prompt_are_refused_together(ours):
    with pytest.raises(ValueError, match="`prefill_chunk_size` and an `assistant_model` that sees images"):
        ours.answer(assistant_model=copy.deepcopy(ours.model), prefill_chunk_size=3)


@pytest.mark.client("generate: prompt lookup", note="")
def test_prompt_lookup(ours, expected):
    assert ours.answer(prompt_lookup_num_tokens=2) == expected


@pytest.mark.client("generate: custom_generate directory", note="needs trust_remote_code")
def test_a_local_custom_generate(stock, ours, expected, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, input_ids=None, pixel_values=None, **kwargs):\n"
        "    return model(input_ids=input_ids, pixel_values=pixel_values).logits[:, -1].argmax(-1)\n"
    )
    settings = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    for side in (stock, ours):
        assert side.model.generate(**side.inputs(), **settings).tolist() == expected[:1]


@pytest.mark.client("forward: text alone", note="as exporters call it; with labels, images are required")
def test_image_tokens_without_images_keep_their_own_embeddings(stock, ours):
    inputs = ours.inputs()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [side.model(**text).logits for side in (stock, ours)]
        torch.testing.assert_close(*logits)
        # Negative control: with its image the text has other logits.
        assert not torch.allclose(logits[1], ours.model(**inputs).logits)
    with pytest.raises(ValueError, match="the images give 0 vectors"):  # it would train on a text without its image
        ours.model(**text, labels=text["input_ids"])
    with pytest.raises(ValueError, match="the images give 0 vectors"):
        ours.model.generate(**text, max_new_tokens=1)


@pytest.mark.client("accelerate: cpu_offload, disk_offload", note="")
def test_accelerate_offload(stock, ours, expected, tmp_path):
    for side in (stock, ours):
        name = type(side.model).__name__
        assert side.answer(cpu_offload(copy.deepcopy(side.model), execution_device="cpu")) == expected
        offloaded = disk_offload(copy.deepcopy(side.model), tmp_path / name, execution_device="cpu")
        assert side.answer(offloaded) == expected


@pytest.mark.client("from_pretrained: device_map with disk offload", note="shards larger than max_memory")
def test_a_sharded_checkpoint_larger_than_memory(stock, ours, expected, tmp_path):
    for side in (stock, ours):
        folder = tmp_path / type(side.model).__name__
        side.model.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        memory = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 3 // 4
        model = AutoModelForImageTextToText.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload" / folder.name
        )
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        assert side.answer(model) == expected


@pytest.mark.client("torch.ao: dynamic quantisation", note="")
def test_dynamic_quantisation(stock, ours):
    quantised = [
        torch.ao.quantization.quantize_dynamic(copy.deepcopy(side.model), {torch.nn.Linear}, dtype=torch.qint8)
        for side in (stock, ours)
    ]
    projector = quantised[1].model.multi_modal_projector
    assert not any(weight.is_floating_point() for weight in projector.parameters())
    assert stock.answer(quantised[0]) == ours.answer(quantised[1])


@pytest.mark.client("from_pretrained: torchao, quanto", note="weights of the language model in 8 bits")
@pytest.mark.parametrize("method", ["torchao", "quanto"])
def test_quantised_at_loading(stock, ours, method):
    """The logits of both sides are equal, and differ from those of the unquantised weights."""
    pytest.importorskip({"quanto": "optimum.quanto"}.get(method, method))
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = QuantoConfig(weights="int8")
    found = []
    for side in (stock, ours):
        model = AutoModelForImageTextToText.from_pretrained(
            side.folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        inputs = side.inputs()
        with torch.no_grad():
            found.append(model(**inputs).logits)
            assert not torch.equal(found[-1], side.model(**inputs).logits)
        assert len(side.answer(model)) == 8
    torch.testing.assert_close(*found)


@pytest.mark.client("vLLM-like forward: inputs_embeds", note="vLLM itself is not tested")
def test_no_tower_call_while_decoding(ours):
    calls = []
    ours.model.model.vision_tower.register_forward_hook(lambda *arguments: calls.append(1))
    ours.answer()
    assert calls == [1]
    embeds = ours.model.get_input_embeddings()(torch.tensor([[5]]))
    ours.model(inputs_embeds=embeds)
    assert calls == [1]
