"""Options of single parts that make no sense are refused from the arguments alone; which dtype `auto` stands for."""

import json

import pytest
from peft import PeftModel
from transformers import TrainingArguments

from jnana.training.model_setup import frozen_dtype
from jnana.training.options.arguments import DataArguments, LoraArguments, ModelArguments, PartArguments
from jnana.training.options.part_checks import check_parts, tower_of_adapter
from jnana.training.stages import apply_stage
from tests.training.test_stages import LORA, pair


ON_TOWER = LoraArguments(lora_r=2, lora_target_modules=["q_proj"], lora_vision_target_modules=["q_proj"])


def check(folder, lora=None, adapter=None, cache=None, **options):
    training_args = TrainingArguments(output_dir=folder, report_to="none", use_cpu=True)
    check_parts(PartArguments(**options), training_args, DataArguments(feature_cache=cache), lora, adapter)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    """Adapters whose tower was frozen, trained whole, or had an adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    ways = {"frozen": (LORA, True), "whole": (LORA, False), "lora": (ON_TOWER, True)}
    for name, (lora, freeze) in ways.items():
        model = apply_stage(pair(), "sft", lora, freeze_vision_tower=freeze)
        assert isinstance(model, PeftModel)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ways}


@pytest.mark.parametrize("options", [{"vision_learning_rate": 2e-6}, {"vision_lr_scheduler_type": "constant"}])
def test_a_rate_for_a_frozen_tower(options, adapters, tmp_path):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"{name} is '?{value}'?, .* is frozen; .*freeze_vision_tower: false\)"):
        check(tmp_path, **options)  # run_align
    with pytest.raises(ValueError, match=r"freeze_vision_tower: false, or lora_vision_target_modules\)"):
        check(tmp_path, LORA, **options)
    with pytest.raises(ValueError, match="to continue was trained on a frozen vision tower; leave it out"):
        check(tmp_path, LoraArguments(), adapters["frozen"], **options)
    # the controls: the tower trains in one of the ways
    check(tmp_path, freeze_vision_tower=False, **options)
    check(tmp_path, LORA, freeze_vision_tower=False, **options)
    check(tmp_path, ON_TOWER, **options)
    check(tmp_path, LoraArguments(), adapters["whole"], **options)
    check(tmp_path, LoraArguments(), adapters["lora"], **options)


def test_whole_and_by_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"freeze_vision_tower is false, but lora_vision_target_modules is \['q_proj"):
        check(tmp_path, ON_TOWER, freeze_vision_tower=False)


def test_an_adapter_on_a_frozen_tower_does_not_train_it_whole(adapters, tmp_path):
    for name in ("frozen", "lora"):
        with pytest.raises(ValueError, match="freeze_vision_tower is false, but the adapter .* merge that adapter"):
            check(tmp_path, LoraArguments(), adapters[name], freeze_vision_tower=False)
    check(tmp_path, LoraArguments(), adapters["whole"], freeze_vision_tower=False)


def test_stored_features_of_a_tower_that_trains(adapters, tmp_path):
    check(tmp_path, LORA, cache="features")  # the control
    for lora, adapter, options in (
        (None, None, {"freeze_vision_tower": False}),
        (ON_TOWER, None, {}),
        (LoraArguments(), adapters["whole"], {}),
        (LoraArguments(), adapters["lora"], {}),
    ):
        with pytest.raises(ValueError, match="feature_cache is 'features', but the vision tower trains"):
            check(tmp_path, lora, adapter, cache="features", **options)


def test_what_an_adapter_holds(adapters):
    found = {name: tower_of_adapter(path) for name, path in adapters.items()}
    assert found == {"frozen": (False, False), "whole": (True, False), "lora": (False, True)}


def test_a_further_round_trains_the_tower_as_the_first(adapters):
    for name in ("whole", "frozen"):
        first = apply_stage(pair(), "sft", LORA, freeze_vision_tower=name == "frozen")
        again = apply_stage(PeftModel.from_pretrained(pair(), adapters[name], is_trainable=True), "sft")
        trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (first, again)]
        assert trained[0] == trained[1]
        assert any("vision_tower" in n for n in trained[0]) == (name == "whole")


class TestDtypeAuto:
    def checkpoint(self, folder, fields: dict) -> ModelArguments:
        (folder / "config.json").write_text(json.dumps({"model_type": "jnana", **fields}))
        return ModelArguments(model_name_or_path=str(folder), dtype="auto")

    @pytest.mark.parametrize(
        ("fields", "held"),
        [
            ({"dtype": "float16"}, "bfloat16"),
            ({"torch_dtype": "float16"}, "bfloat16"),  # as transformers 4 wrote it: llava-hf's checkpoints
            ({"text_config": {"torch_dtype": "float16"}}, "bfloat16"),
            ({"dtype": "bfloat16"}, "bfloat16"),
            ({"dtype": "float32"}, "float32"),
            ({}, "float32"),
        ],
    )
    def test_a_checkpoint(self, tmp_path, fields, held):
        assert frozen_dtype(self.checkpoint(tmp_path, fields)) == held

    def test_float16_only_if_asked_for(self, tmp_path):
        args = self.checkpoint(tmp_path, {"dtype": "float16"})
        args.dtype = "float16"
        assert frozen_dtype(args) == "float16"

    def test_a_pair_is_held_as_its_language_model(self, tmp_path):
        self.checkpoint(tmp_path, {"dtype": "float16"})
        assert frozen_dtype(ModelArguments(vision_model="clip", text_model=str(tmp_path), dtype="auto")) == "bfloat16"

    def test_an_adapter_keeps_its_bases(self, tmp_path, adapters):
        record = {"names": {"model": "org/base"}, "relative_paths": {}, "dtype": "float16", "projector_fields": {}}
        path = adapters["frozen"]
        with open(f"{path}/jnana_base.json", "w") as stream:
            json.dump({**record, "quantization": {"quantization": "none"}}, stream)
        assert frozen_dtype(ModelArguments(model_name_or_path=path, dtype="auto")) == "bfloat16"
