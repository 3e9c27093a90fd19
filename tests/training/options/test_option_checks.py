"""Options that the run's sharding, precision or kernels can't follow: refused from the arguments alone, by name."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from jnana.training.distributed import sharding_of
from jnana.training.options.arguments import ModelArguments, TextModelArguments
from jnana.training.options.computation_checks import check_computation
from jnana.training.options.recipes import parse_arguments
from tests.tiny import save_tiny_text


PAIR = ModelArguments(vision_model="clip", text_model="phi")


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(output_dir=folder, report_to="none", use_cpu=True, **changes)


@pytest.fixture
def shard(monkeypatch):
    """Makes arguments look as under one of the files of recipes/accelerate."""

    def shard(args: TrainingArguments, how: str | None) -> TrainingArguments:
        if how == "fsdp":
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        elif how is not None:
            args.deepspeed_plugin = SimpleNamespace(zero_stage=int(how[-1]))
        assert sharding_of(args) == how
        return args

    return shard


class TestMixedPrecision:
    """`accelerate launch` gives it in the environment, and the Trainer follows it."""

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_a_contradiction(self, tmp_path, monkeypatch, precision):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        with pytest.raises(ValueError, match=f"{precision} is false, but mixed_precision is '{precision}'"):
            check_computation(arguments(tmp_path), PAIR, "stock")

    def test_what_agrees(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        check_computation(arguments(tmp_path, bf16=True), PAIR, "stock")
        check_computation(arguments(tmp_path, fp16=True), PAIR, "stock")  # the run's own option wins
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        check_computation(arguments(tmp_path), PAIR, "stock")


class TestSharding:
    @pytest.mark.parametrize("how", [None, "fsdp"])
    def test_muon_is_taken(self, shard, tmp_path, how):
        check_computation(shard(arguments(tmp_path), how), PAIR, "muon")

    @pytest.mark.parametrize("how", ["zero1", "zero2", "zero3"])
    def test_muon_is_refused(self, shard, tmp_path, how):
        args = shard(arguments(tmp_path), how)
        check_computation(args, PAIR, "stock")  # the control
        with pytest.raises(ValueError, match="optimizer is 'muon', .* ZeRO flattens all weights; start with .*fsdp2"):
            check_computation(args, PAIR, "muon")

    def test_int8_with_fsdp(self, shard, tmp_path):
        args = shard(arguments(tmp_path), "fsdp")
        for allowed in ("none", "nf4"):
            check_computation(args, PAIR, "stock", allowed)
        with pytest.raises(ValueError, match="quantization is 'int8', whose weights FSDP cannot shard; set .*nf4"):
            check_computation(args, PAIR, "stock", "int8")

    def test_int8_without(self, shard, tmp_path):
        check_computation(shard(arguments(tmp_path), None), PAIR, "stock", "int8")


class TestFlashAttention:
    @pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
    def test_in_float32(self, tmp_path, name):
        model_args = ModelArguments(attn_implementation=name)
        with pytest.raises(ValueError, match=f"attn_implementation is '{name}', .* dtype is 'float32', and bf16 and"):
            check_computation(arguments(tmp_path), model_args, "stock")

    def test_of_a_language_model_that_trains(self, tmp_path):
        """Its weights are float32 whatever `dtype` says."""
        model_args = ModelArguments(attn_implementation="flash_attention_2", dtype="bfloat16")
        check_computation(arguments(tmp_path), model_args, "stock")  # the control: frozen, in bfloat16
        with pytest.raises(ValueError, match="the language model trains, so it is held in float32"):
            check_computation(arguments(tmp_path), model_args, "stock", trains_language_model=True)

    @pytest.mark.parametrize("name", [None, "sdpa", "eager", "flex_attention"])
    def test_others_are_taken(self, tmp_path, name):
        check_computation(arguments(tmp_path), ModelArguments(attn_implementation=name), "stock")

    def test_under_autocast(self, tmp_path):
        model_args = ModelArguments(attn_implementation="flash_attention_2")
        check_computation(arguments(tmp_path, bf16=True), model_args, "stock", trains_language_model=True)


class TestEagerAttentionInFloat16:
    """The attention scores of Phi overflow there; the model itself would raise in its first step."""

    PHI = TextModelArguments(attn_implementation="eager", text_config='{"model_type": "phi"}')

    def test_phi(self, tmp_path):
        with pytest.raises(ValueError, match="attn_implementation is 'eager', .* Phi in float16.*sdpa"):
            check_computation(arguments(tmp_path, fp16=True), self.PHI, "stock", trains_language_model=True)

    def test_others_and_other_precisions(self, tmp_path):
        llama = TextModelArguments(attn_implementation="eager", text_config='{"model_type": "llama"}')
        check_computation(arguments(tmp_path, fp16=True), llama, "stock", trains_language_model=True)
        check_computation(arguments(tmp_path, bf16=True), self.PHI, "stock", trains_language_model=True)
        check_computation(arguments(tmp_path), self.PHI, "stock", trains_language_model=True)

    def test_the_family_of_a_pair_and_of_a_checkpoint(self, tmp_path):
        save_tiny_text(tmp_path / "phi")
        pair = ModelArguments(vision_model="clip", text_model=str(tmp_path / "phi"), attn_implementation="eager")
        (tmp_path / "jnana").mkdir()
        (tmp_path / "jnana" / "config.json").write_text(
            '{"model_type": "jnana", "text_config": {"model_type": "phi"}}'
        )
        whole = ModelArguments(
            model_name_or_path=str(tmp_path / "jnana"), attn_implementation="eager", dtype="float16"
        )
        for model_args in (pair, whole):
            with pytest.raises(ValueError, match="Phi in float16"):
                check_computation(arguments(tmp_path, fp16=True), model_args, "stock")
        with pytest.raises(ValueError, match="Phi in float16"):
            check_computation(arguments(tmp_path), whole, "stock")


class TestDispatchBatches:
    def parse(self, folder, *words) -> TrainingArguments:
        return parse_arguments([TrainingArguments], [f"--output_dir={folder}", "--use_cpu=true", *words])[0]

    def test_another_option_does_not_drop_ours(self, tmp_path):
        args = self.parse(tmp_path, '--accelerator_config={"non_blocking": true}')
        assert args.accelerator_config.dispatch_batches is None  # the control: what the Trainer would be given
        check_computation(args, PAIR, "stock")
        assert args.accelerator_config.dispatch_batches is False and args.accelerator_config.non_blocking is True

    def test_the_default(self, tmp_path):
        args = self.parse(tmp_path)
        check_computation(args, PAIR, "stock")
        assert args.accelerator_config.dispatch_batches is False

    def test_a_contradiction(self, tmp_path):
        args = self.parse(tmp_path, '--accelerator_config={"dispatch_batches": true}')
        check_computation(args, TextModelArguments(), "stock")  # rows of text may be dispatched
        assert args.accelerator_config.dispatch_batches is True
        with pytest.raises(ValueError, match="accelerator_config: dispatch_batches is true, with which .*; leave it"):
            check_computation(args, PAIR, "stock")


class TestLiger:
    def test_with_our_model(self, tmp_path, monkeypatch):
        monkeypatch.setattr("jnana.training.options.computation_checks.is_liger_kernel_available", lambda: True)
        on_cpu = arguments(tmp_path, use_liger_kernel=True)
        with pytest.raises(ValueError, match="use_liger_kernel is true, but this run is on 'cpu' .*; leave it out"):
            check_computation(on_cpu, PAIR, "stock")
        monkeypatch.setattr(type(on_cpu), "device", torch.device("cuda"))
        check_computation(on_cpu, PAIR, "stock")  # the control
        on_cpu.liger_kernel_config = {"rms_norm": True, "fused_linear_cross_entropy": True}
        with pytest.raises(ValueError, match="liger_kernel_config names rms_norm, .* only fused_linear_cross_entropy"):
            check_computation(on_cpu, PAIR, "stock")

    def test_that_is_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setattr("jnana.training.options.computation_checks.is_liger_kernel_available", lambda: False)
        model_args = TextModelArguments(text_config='{"model_type": "llama"}')
        with pytest.raises(ValueError, match="liger-kernel is not installed: `pip install liger-kernel`"):
            check_computation(arguments(tmp_path, use_liger_kernel=True), model_args, "stock")

    def test_with_a_bare_language_model(self, tmp_path, monkeypatch):
        """Liger itself needs a GPU; of it only the table of families is read."""
        table = ModuleType("liger_kernel.transformers.monkey_patch")
        table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, table.__name__, table)
        monkeypatch.setattr("jnana.training.options.computation_checks.is_liger_kernel_available", lambda: True)
        args = arguments(tmp_path, use_liger_kernel=True)
        check_computation(args, TextModelArguments(text_config='{"model_type": "llama"}'), "stock")
        with pytest.raises(ValueError, match="Liger has no kernels for model_type 'phi'; leave it out"):
            check_computation(args, TextModelArguments(text_config='{"model_type": "phi"}'), "stock")
