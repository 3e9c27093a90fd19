"""Bad input raises an error before a model is loaded, with field, value and remedy in the message."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, TrainingArguments

from jnana import run_align, run_merge, run_pretrain, run_sft
from tests.scripts.conftest import PRETRAIN, align_options, options, sft_options
from tests.tiny import save_tiny_text


@pytest.fixture
def no_model(monkeypatch):
    """Loading or building any model fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the check")

    for script in (run_align, run_sft):
        monkeypatch.setattr(script, "prepare_model", refuse)
    monkeypatch.setattr(run_pretrain, "prepare_text_model", refuse)


@pytest.mark.parametrize("script", [run_align, run_sft])
def test_the_record_names_the_library_that_resizes(no_model, data, vision, pretrained, tmp_path, monkeypatch, script):
    """torchvision is preferred, and transformers has no such class for this image processor: Pillow resizes."""
    monkeypatch.setattr("jnana.training.model_setup.is_torchvision_available", lambda: True)
    monkeypatch.setattr("jnana.processing.image_geometry_jnana.backend_class", lambda name, backend: None)
    recorded = []
    real = script.recipe_options
    monkeypatch.setattr(script, "recipe_options", lambda *given: recorded.append(real(*given)) or recorded[0])
    with pytest.raises(AssertionError, match="a model was loaded before the check"):
        script.main(align_options(data, vision, pretrained, output_dir=tmp_path))
    assert recorded[0]["image_backend"] == "pil"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": "missing/captions.json"}, "train_data 'missing/captions.json' does not exist"),
        ({"image_folder": "missing"}, "image_folder 'missing' is not a directory"),
        ({"eval_strategy": "steps"}, "eval_strategy is 'steps' but eval_data is not set"),
        ({"sample_steps": 5}, "sample_steps is 5 but eval_data is not set"),
        ({"streaming": "true", "max_steps": -1}, "streaming is true but max_steps is -1"),
        (
            {"train_sampling_strategy": "group_by_length", "streaming": "true"},
            "train_sampling_strategy is 'group_by_length' but streaming is true",
        ),
        ({"output_dir": "/proc/nowhere"}, "output_dir '/proc/nowhere' cannot be written to"),
        ({"feature_cache": "/proc/nowhere"}, "feature_cache '/proc/nowhere' cannot be written to"),
        ({"feature_cache": "c", "streaming": "true", "max_steps": 2}, "feature_cache is 'c' but streaming is true"),
        ({"feature_cache_dtype": "bfloat16"}, "feature_cache_dtype is 'bfloat16' but feature_cache is not set"),
        ({"model_name_or_path": "somewhere"}, "exclude each other"),
        ({"text_model": "outputs/tiny/pretrain"}, "text_model 'outputs/tiny/pretrain' does not exist"),
        ({"vision_model": "./clip"}, "vision_model './clip' does not exist"),
        ({"chat_template": "nonsense"}, "chat_template='nonsense' is neither"),
        ({"max_length": 3}, "max_length=3"),
        ({"max_train_rows": 0}, "max_train_rows is 0; it must be at least 1"),
        ({"save_minutes": 0}, "save_minutes is 0.0; it must be above 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but the Trainer would smooth"),
        (
            {"attn_implementation": "flash_attention_2", "packing": "rows"},
            "attn_implementation is 'flash_attention_2', which computes in 16 bits only, but dtype is 'float32'",
        ),
    ],
)
def test_align_refuses(no_model, data, vision, pretrained, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_align.main(align_options(data, vision, pretrained, **{"output_dir": tmp_path, **changes}))


def test_a_feature_cache_under_zero_3(no_model, data, vision, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("jnana.training.options.option_checks.is_deepspeed_zero3_enabled", lambda: True)
    options = {"output_dir": tmp_path, "feature_cache": tmp_path / "cache"}
    with pytest.raises(ValueError, match="feature_cache is .*, but ZeRO-3 partitions .*fsdp2.yaml.* leave it out"):
        run_align.main(align_options(data, vision, pretrained, **options))


def test_half_a_pair(no_model, data, vision, tmp_path):
    arguments = {"vision_model": vision, "train_data": data / "captions.json", "output_dir": tmp_path}
    with pytest.raises(ValueError, match="text_model is None; give both"):
        run_align.main(options(**arguments))


def test_no_jnana_checkpoint(no_model, data, vision, tmp_path):
    with pytest.raises(ValueError, match="is not a Jnana checkpoint: it has no processor_config.json"):
        run_sft.main(sft_options(data, vision, output_dir=tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 0, "merge_adapter": "true"}, "merge_adapter is true but lora_r is 0"),
        ({"lora_r": -4}, "lora_r is -4"),
        ({"lora_dropout": 1.5}, "lora_dropout 1.5"),
        (
            {"attn_implementation": "flash_attention_2", "packing": "shared_image"},
            "attn_implementation is 'flash_attention_2', which computes in 16 bits only, but dtype is 'float32'",
        ),
    ],
)
def test_sft_refuses(no_model, data, aligned, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_sft.main(sft_options(data, aligned, **{"output_dir": tmp_path, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 16}, "lora_r is 16, but the adapter .* to continue has 4"),
        ({"lora_alpha": 5}, "lora_alpha is 5.0, but the adapter .* to continue has 8"),
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1, but the adapter .* to continue has 0.0"),
        (
            {"lora_target_modules": "dense"},
            r"lora_target_modules names 2 layers \(dense\), but .* is on 12 \(dense, fc1",
        ),
        ({"lora_vision_target_modules": "fc1"}, "lora_vision_target_modules names 3 layers .*, but .* is on 0"),
        ({"quantization": "nf4"}, "quantization is 'nf4', but the adapter .* was trained with 'none'; leave it out"),
    ],
)
def test_another_adapter_than_the_one_to_continue(no_model, data, tuned, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_sft.main(sft_options(data, tuned, output_dir=tmp_path, **{"lora_r": 0, **changes}))


def test_quantising_without_bitsandbytes(no_model, data, aligned, tmp_path, monkeypatch):
    monkeypatch.setattr("jnana.training.options.computation_checks.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="quantization is 'nf4', which needs bitsandbytes, .* `quantization: none`"):
        run_sft.main(sft_options(data, aligned, output_dir=tmp_path, quantization="nf4"))


def test_merging_what_is_no_adapter(aligned, tmp_path):
    with pytest.raises(ValueError, match="is not an adapter; give a directory that run_sft wrote with lora_r > 0"):
        run_merge.main([f"--model_name_or_path={aligned}", f"--output_dir={tmp_path}"])


def test_many_gpus_in_one_process(no_model, data, vision, pretrained, tmp_path, monkeypatch):
    """DataParallel would split `pixel_values` and `input_ids` at different rows."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process sees 2 GPUs, .* `accelerate launch --num_processes 2`"):
        run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_type": "linear"}, "checkpoint-6 was trained with projector_type 'mlp', this run has 'linear'"),
        ({"vision_feature_layer": -2}, "checkpoint-6 was trained with vision_feature_layer -1, this run has -2"),
    ],
)
def test_resuming_align_with_another_projector(data, vision, pretrained, aligned, tmp_path, changes, message):
    """A run of a version that recorded no options."""
    shutil.copytree(aligned, tmp_path / "run", ignore=shutil.ignore_patterns("recipe_record.json"))
    with pytest.raises(ValueError, match=message):
        run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "run", max_steps=8, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "checkpoint-6 was trained with r 4, this run has 8"),
        ({"lora_r": 0}, r"checkpoint-6 holds an adapter, but this run trains a whole model \(lora_r\)"),
    ],
)
def test_resuming_sft_with_another_adapter(data, aligned, tuned, tmp_path, changes, message):
    """A run of a version that recorded no options."""
    shutil.copytree(tuned, tmp_path / "run", ignore=shutil.ignore_patterns("recipe_record.json"))
    with pytest.raises(ValueError, match=message):
        run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "run", **{"max_steps": 8, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "checkpoint-6 was trained with lora_r 4, this run has 8"),
        ({"lora_r": 0}, "checkpoint-6 was trained with lora_r 4, this run has 0"),
        ({"lora_target_modules": "fc1"}, r"trained with lora_target_modules not given, this run has \['fc1'\]"),
        ({"optimizer": "muon"}, "trained with optimizer 'stock', this run has 'muon'"),
        ({"projector_learning_rate": "1e-4"}, "trained with projector_learning_rate not given, this run has 0.0001"),
    ],
)
def test_resuming_sft_with_another_recipe(no_model, data, aligned, tuned, tmp_path, changes, message):
    shutil.copytree(tuned, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "run", **{"max_steps": 8, **changes}))


def test_a_changed_recipe_is_refused_before_the_model_is_loaded(no_model, data, vision, pretrained, aligned, tmp_path):
    shutil.copytree(aligned, tmp_path / "align")
    shutil.rmtree(tmp_path / "align" / "checkpoint-6")
    changes = {"learning_rate": "7e-3", "freeze_vision_tower": "false"}
    message = r"checkpoint-4 was trained with freeze_vision_tower True, this run has False; learning_rate .* has 0.007"
    with pytest.raises(ValueError, match=message):
        run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "align", **changes))


def test_another_tower_with_a_feature_cache(no_model, data, vision, pretrained, aligned, tmp_path):
    """The projector would go on with the features of the new tower, and be saved beside the old one."""
    shutil.copytree(aligned, tmp_path / "align")
    shutil.rmtree(tmp_path / "align" / "checkpoint-6")
    shutil.copytree(vision, tmp_path / "other")
    changes = {"vision_model": tmp_path / "other", "feature_cache": tmp_path / "cache"}
    with pytest.raises(ValueError, match=f"was trained with vision_model '{vision}', this run has '.*other"):
        run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "align", **changes))


def test_align_on_an_adapter(no_model, data, tuned, tmp_path):
    arguments = {"model_name_or_path": tuned, "train_data": data / "captions.json", "output_dir": tmp_path}
    with pytest.raises(ValueError, match="is an adapter; align from a full checkpoint"):
        run_align.main(options(**arguments, image_folder=data / "images"))


def test_another_projector_than_the_checkpoints(data, aligned, tmp_path):
    with pytest.raises(ValueError, match="projector_type is 'linear', but the checkpoint .* has 'mlp'"):
        run_sft.main(sft_options(data, aligned, output_dir=tmp_path, projector_type="linear"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_name_or_path": "somewhere"}, "exactly one must be set"),
        ({"tokenizer_name_or_path": "somewhere"}, "exclude each other"),
        ({"text_config": '{"model_type": "fi"}'}, "model_type is 'fi'"),
        ({"text_config": '{"hidden_size": 64}'}, "model_type is None"),
        ({"train_data": "missing.txt"}, "train_data 'missing.txt' does not exist"),
        ({"block_size": 100000}, "shorter than one block"),
    ],
)
def test_pretrain_refuses(no_model, data, tmp_path, changes, message):
    arguments = {**PRETRAIN, "train_data": data / "corpus.txt", "output_dir": tmp_path, **changes}
    with pytest.raises(ValueError, match=message):
        run_pretrain.main(options(**arguments))


def test_a_vocabulary_larger_than_the_embedding(data, tmp_path):
    fields = {**json.loads(PRETRAIN["text_config"]), "vocab_size": 200}
    arguments = {**PRETRAIN, "text_config": json.dumps(fields), "train_data": data / "corpus.txt"}
    with pytest.raises(ValueError, match="vocab_size is 200, but the tokenizer has 2[0-9]+ entries"):
        run_pretrain.main(options(**arguments, output_dir=tmp_path))


class TestForeignTokenizer:
    """A language model joined or continued with another vocabulary than its own; the error names both."""

    @pytest.fixture
    def foreign(self, tmp_path):
        """The same number of entries, two of them swapped, which no other check would detect."""
        folder = save_tiny_text(tmp_path / "foreign")
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    def test_joining_with_our_own_fingerprint(self, no_model, data, vision, pretrained, foreign, tmp_path):
        arguments = align_options(
            data, vision, pretrained, output_dir=tmp_path / "out", tokenizer_name_or_path=foreign
        )
        with pytest.raises(ValueError, match=f"{foreign}.* is not the one that {pretrained} was trained with"):
            run_align.main(arguments)

    def test_joining_with_what_the_checkpoint_ships(self, no_model, data, vision, foreign, tmp_path):
        text = save_tiny_text(tmp_path / "hub")
        arguments = align_options(data, vision, text, output_dir=tmp_path / "out", tokenizer_name_or_path=foreign)
        with pytest.raises(ValueError, match=f"{foreign}.* is not the one that {text} was trained with"):
            run_align.main(arguments)

    def test_its_own_tokenizer_from_elsewhere_is_taken(self, data, vision, pretrained, tmp_path):
        """The control: the same vocabulary in another directory is accepted."""
        AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path / "copy")
        changes = {"tokenizer_name_or_path": tmp_path / "copy", "max_steps": 1, "save_strategy": "no"}
        run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "out", **changes))

    def test_files_exchanged_in_a_checkpoint(self, no_model, data, aligned, foreign, tmp_path):
        shutil.copytree(aligned, tmp_path / "align", ignore=shutil.ignore_patterns("checkpoint-*"))
        content = json.loads((tmp_path / "align" / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (tmp_path / "align" / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"is not the one that .*align was trained with"):
            run_sft.main(sft_options(data, tmp_path / "align", output_dir=tmp_path / "out"))

    def test_continuing_stage_0(self, no_model, data, pretrained, foreign, tmp_path):
        arguments = {"model_name_or_path": pretrained, "tokenizer_name_or_path": foreign, "block_size": 32}
        with pytest.raises(ValueError, match=f"{foreign}.* is not the one that {pretrained} was trained with"):
            run_pretrain.main(options(**arguments, train_data=data / "corpus.txt", output_dir=tmp_path / "out"))

    def test_resuming_with_a_tokenizer_from_another_corpus(self, no_model, data, pretrained, tmp_path):
        shutil.copytree(pretrained, tmp_path / "run")
        (tmp_path / "other.txt").write_text("quite other words in a text of its own, again and again\n\n" * 80)
        arguments = {**PRETRAIN, "train_data": tmp_path / "other.txt", "output_dir": tmp_path / "run"}
        arguments["allow_changed"] = "train_data"
        with pytest.raises(ValueError, match="tokenizer trained on train_data .* is not the one that .*checkpoint-12"):
            run_pretrain.main(options(**arguments))


class TestBadSamples:
    """Either one error with all problems before training, or the rows are skipped and listed."""

    @pytest.fixture
    def spoilt(self, data, tmp_path):
        shutil.copytree(data / "images", tmp_path / "images")
        (tmp_path / "images" / "red_blue.png").unlink()
        (tmp_path / "images" / "blue_red.png").write_bytes(b"no image")
        return tmp_path

    def test_raise(self, no_model, data, vision, pretrained, spoilt):
        arguments = align_options(data, vision, pretrained, output_dir=spoilt / "out", image_folder=spoilt / "images")
        with pytest.raises(ValueError, match="2 of 16 rows can't be used") as error:
            run_align.main(arguments)
        assert "red_blue.png" in str(error.value) and "captions.json, image" in str(error.value)

    def test_skip(self, data, vision, pretrained, spoilt, capsys):
        changes = {"on_bad_sample": "skip", "max_steps": 2, "save_strategy": "no"}
        arguments = align_options(data, vision, pretrained, output_dir=spoilt / "out", **changes)
        run_align.main([*arguments, f"--image_folder={spoilt / 'images'}"])
        assert "14 of 16 rows, 14 conversations" in capsys.readouterr().out
        assert len((spoilt / "out" / "bad_samples.jsonl").read_text().splitlines()) == 2
