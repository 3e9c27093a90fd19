"""DDP, FSDP2 and ZeRO on two processes: the same run as one process, also where one of the two lacks an image."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from jnana.training.loading import load_model
from tests.scripts.conftest import align_options, sft_options
from tests.scripts.forked import run_forked, succeed
from tests.scripts.sharding import CONFIGURED, launch_environment, shard_on_cpu, use_deepspeed, watch_imageless
from tests.tiny import save_tiny_llava


SIZES = {
    "max_steps": 4,
    "save_steps": 2,
    "independent_turns": "false",
    "adam_epsilon": "1e-3",
    "learning_rate": "1e-2",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 1,
    "max_eval_rows": 4,
}

# They name the number of processes, or the files of weights, which FSDP writes in one
OF_THE_RUN = (
    "recipe_record.json",
    "trainer_state.json",
    "checkpoint_manifest.json",
    "model.safetensors.index.json",
)
ADAPTER = {"lora_r": 4, "max_steps": 2}
UNFUSED = "the loss computes all logits of a batch at once"  # logged where it is not fused with the head
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed"
)


@pytest.fixture(scope="module")
def start(tmp_path_factory, data, aligned):
    """Fine-tunes on records of which every second has no image."""
    folder = tmp_path_factory.mktemp("mixed")
    records = json.loads((data / "instruct.json").read_text())
    for record in records[1::2]:
        del record["image"]
        record["conversations"][0]["value"] = "what is the top?"
    (folder / "instruct.json").write_text(json.dumps(records))

    def start(output, how: str, environment: dict[str, str] | None = None, **changes) -> list[str]:
        processes = 1 if how == "one" else 2
        changes = {**SIZES, "lora_r": 0, "per_device_train_batch_size": 2 // processes, **changes}
        changes = {"train_data": folder / "instruct.json", "eval_data": folder / "instruct.json", **changes}
        words = sft_options(data, aligned, output_dir=output, **changes)
        options = {"processes": processes, "prepare": watch_imageless}
        if how == "fsdp2":
            words.append(CONFIGURED)
            variables = launch_environment("fsdp2.yaml", processes) | (environment or {})
            options |= {"prepare": shard_on_cpu, "environment": variables}
        if how.startswith("zero"):
            words.append("--ddp_backend=gloo")  # or accelerate counts one process where there is no GPU
            environment = launch_environment(f"{how}.yaml", processes) | {"ACCELERATE_USE_CPU": "false"}
            options |= {"prepare": use_deepspeed, "environment": environment}
        ended = run_forked("run_sft", words, tmp_path_factory.mktemp("log"), **options)
        succeed(ended)
        return [each.output for each in ended]

    return start


@pytest.fixture(scope="module")
def one(tmp_path_factory, start):
    output = tmp_path_factory.mktemp("one") / "run"
    start(output, "one")
    return output


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, start):
    output = tmp_path_factory.mktemp("fsdp2") / "run"
    return output, start(output, "fsdp2")


def history(folder, name: str) -> torch.Tensor:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry[name] for entry in entries if name in entry], dtype=torch.float64)


def assert_same_run(folder, reference, weights="model.safetensors") -> None:
    """The same losses, in training and evaluation, gradient norms and final weights."""
    for name in ("loss", "eval_loss", "grad_norm"):
        assert len(history(folder, name))
        torch.testing.assert_close(history(folder, name), history(reference, name), rtol=2e-5, atol=0)
    ours, theirs = load_file(folder / weights), load_file(reference / weights)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=5e-6, msg=name)


def assert_same_folder(folder, reference) -> None:
    """The same code and config go with the weights, so that others load it the same."""
    ours, theirs = ({file.name for file in path.iterdir() if file.is_file()} for path in (folder, reference))
    travelling = {name for name in theirs if name.endswith((".py", ".json", ".jinja")) and name not in OF_THE_RUN}
    assert {"modeling_jnana.py", "processing_jnana.py", "config.json"} <= travelling
    assert {name for name in ours if name.endswith((".py", ".jinja"))} <= travelling <= ours
    for name in travelling:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


def assert_one_lacked_an_image(outputs: list[str], sharded: bool) -> None:
    counts = [output.count("a batch without an image") for output in outputs]
    assert max(counts) > 0 and min(counts) < SIZES["max_steps"], counts
    # In evaluation the second process gets every second record, which has none. It encodes a blank image only if the
    # other process waits for its part of the parameters.
    assert [output.count("evaluated without an image") > 0 for output in outputs] == [False, sharded]


def test_ddp_is_one_process(start, one, tmp_path):
    assert_one_lacked_an_image(start(tmp_path / "run", "ddp"), sharded=False)
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").is_file()
    assert_same_run(tmp_path / "run", one)


def test_fsdp2_is_one_process(one, sharded):
    """accelerate's FSDP2 ran (its files say so), and what it leaves is an ordinary checkpoint in safetensors."""
    folder, outputs = sharded
    assert_one_lacked_an_image(outputs, sharded=True)
    assert f"{UNFUSED}: the head is a FSDPLinear" in outputs[0]  # accelerate shards it by itself
    names = {path.name for path in (folder / "checkpoint-4").iterdir()}
    assert {"pytorch_model_fsdp.bin", "optimizer.bin", "model.safetensors"} <= names and "optimizer.pt" not in names
    assert_same_run(folder, one)
    assert_same_folder(folder, one)
    assert_same_folder(folder / "checkpoint-4", one / "checkpoint-4")
    model, processor = load_model(str(folder))
    reference, _ = load_model(str(one))
    text = processor.tokenizer("what is the top?", return_tensors="pt")
    torch.testing.assert_close(model(**text).logits, reference(**text).logits, rtol=1e-4, atol=1e-4)


def test_fsdp2_with_a_feature_cache(start, one, tmp_path):
    """No process runs the tower while it trains or evaluates, the one without an image neither: all wait for all."""
    assert_one_lacked_an_image(start(tmp_path / "run", "fsdp2", feature_cache=tmp_path / "cache"), sharded=True)
    assert_same_run(tmp_path / "run", one)


def test_fsdp2_resumes(start, sharded, tmp_path):
    """To the byte; the two steps that it makes do change the weights."""
    folder, _ = sharded
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-4", "model.safetensors"))
    shutil.copy(folder / "checkpoint-2" / "model.safetensors", tmp_path / "run" / "checkpoint-2")
    assert f"resuming from {tmp_path}/run/checkpoint-2 " in start(tmp_path / "run", "fsdp2")[0]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() != (folder / "checkpoint-2" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, start):
    output = tmp_path_factory.mktemp("adapter") / "run"
    start(output, "one", **ADAPTER)
    return output


def test_fsdp2_with_an_adapter(start, adapter, tmp_path):
    start(tmp_path / "fsdp2", "fsdp2", **ADAPTER)
    assert (tmp_path / "fsdp2" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()
    assert_same_run(tmp_path / "fsdp2", adapter, "adapter_model.safetensors")
    assert_same_folder(tmp_path / "fsdp2", adapter)
    load_model(str(tmp_path / "fsdp2"))


def test_muon_under_fsdp2(start, tmp_path):
    """The matrices are sharded by rows; torch gathers them for the products. It resumes to the byte, too."""
    changes = {"optimizer": "muon", "learning_rate": "1e-3", "max_steps": 2, "save_steps": 1, "eval_steps": 1}
    for how in ("one", "fsdp2"):
        start(tmp_path / how, how, **changes)
    folder = tmp_path / "fsdp2"
    assert_same_run(folder, tmp_path / "one")
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "model.safetensors").unlink()
    assert f"resuming from {folder}/checkpoint-1 " in start(folder, "fsdp2", **changes)[0]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "checkpoint-1" / "model.safetensors").read_bytes() != weights  # the control


TOWER = {"freeze_vision_tower": "false", "vision_learning_rate": "1e-3", "max_steps": 2}
BOTH = {**ADAPTER, "lora_vision_target_modules": "q_proj", "vision_learning_rate": "1e-3"}


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        (TOWER, "model.safetensors"),
        ({**TOWER, **ADAPTER}, "adapter_model.safetensors"),
        (BOTH, "adapter_model.safetensors"),
    ],
    ids=["whole", "whole, with an adapter", "by an adapter"],
)
def test_a_tower_that_trains(start, how, changes, weights, tmp_path):
    """DDP need not search for unused parameters, and waits for none that a process without images lacks."""
    for each in ("one", how):
        start(tmp_path / each, each, **changes)
    assert_same_run(tmp_path / how, tmp_path / "one", weights)
    name = "vision_tower_learning_rate"
    assert history(tmp_path / how, name).tolist() == history(tmp_path / "one", name).tolist() == [1e-3, 5e-4]
    losses = history(tmp_path / "one", "loss")
    assert (losses[0] - losses[1]).abs() > 1e-3  # the control: training did change something


def test_fsdp2_reads_a_checkpoint_once(start, adapter, tmp_path):
    """`fsdp_cpu_ram_efficient_loading: true`: the second process gets its shards from the first."""
    start(tmp_path / "run", "fsdp2", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, **ADAPTER)
    assert_same_run(tmp_path / "run", adapter, "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("how", "changes"),
    [("ddp", {**TOWER, **ADAPTER}), ("fsdp2", BOTH)],
    ids=["ddp, whole tower", "fsdp2, adapters"],
)
def test_a_published_llava_checkpoint(start, how, changes, tmp_path):
    """LLaVA-1.6's tiles and `image_newline`; under FSDP2 the first process reads transformers' checkpoint."""
    start_from = {"model_name_or_path": save_tiny_llava(tmp_path / "llava"), "chat_template": "jnana"}
    start(tmp_path / "one", "one", **{**changes, **start_from})
    start(tmp_path / how, how, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, **{**changes, **start_from})
    assert_same_run(tmp_path / how, tmp_path / "one", "adapter_model.safetensors")


def test_a_bfloat16_base_under_fsdp2(start, tmp_path):
    """FSDP2 wants one dtype of all that trains: float32, also where the frozen weights around it are bfloat16."""
    for each in ("one", "fsdp2"):
        start(tmp_path / each, each, **{**BOTH, "dtype": "bfloat16"})
    torch.testing.assert_close(
        history(tmp_path / "fsdp2", "loss"), history(tmp_path / "one", "loss"), rtol=1e-2, atol=0
    )
    tensors = load_file(tmp_path / "fsdp2" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@needs_deepspeed
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_zero_is_one_process(start, one, how, tmp_path):
    """DeepSpeed ran (its files say so), resumes to the byte, and leaves an ordinary checkpoint in safetensors."""
    folder = tmp_path / how
    outputs = start(folder, how)
    assert_one_lacked_an_image(outputs, sharded=how == "zero3")
    assert (f"{UNFUSED}: ZeRO-3 partitions the weight of the head" in outputs[0]) == (how == "zero3")
    states = sorted(path.name for path in (folder / "checkpoint-4" / "global_step4").glob("*optim_states.pt"))
    assert [name.split("_mp_rank")[0] for name in states] == [f"zero_pp_rank_{rank}" for rank in range(2)]
    assert_same_run(folder, one)
    assert_same_folder(folder, one)
    load_model(str(folder))
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    assert f"resuming from {folder}/checkpoint-2 " in start(folder, how)[0]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "checkpoint-2" / "model.safetensors").read_bytes() != weights
    (folder / "model.safetensors").unlink()
    assert (
        "is the end of this run: nothing is trained" in start(folder, how)[0]
    )  # the files of checkpoint-4 are copied
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.fixture(scope="module")
def second_round(tmp_path_factory, start, adapter):
    changes = {**ADAPTER, "model_name_or_path": adapter, "lora_r": 0}
    output = tmp_path_factory.mktemp("second") / "run"
    start(output, "one", **changes)
    return output, changes


@needs_deepspeed
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_zero_with_an_adapter(start, second_round, how, tmp_path):
    """One that exists: ZeRO-3 loads a model in another way and would draw other random numbers for a new one."""
    reference, changes = second_round
    start(tmp_path / how, how, **changes)
    assert (tmp_path / how / "checkpoint-2" / "global_step2").is_dir()
    assert_same_run(tmp_path / how, reference, "adapter_model.safetensors")
    load_model(str(tmp_path / how))


@pytest.fixture(scope="module")
def join(tmp_path_factory, data, vision, pretrained):
    """Trains a pair that is joined from two backbones."""

    def join(output, how: str, script: str, **changes) -> None:
        sizes = {"max_steps": 2, "save_steps": 2, "adam_epsilon": "1e-3", "learning_rate": "1e-2"}
        evaluation = {"eval_data": data / "captions.json", "eval_strategy": "steps", "eval_steps": 2}
        sizes |= {"per_device_train_batch_size": 4 // (1 if how == "one" else 2), **evaluation}
        words = align_options(data, vision, pretrained, output_dir=output, **{**sizes, **changes})
        options = {"processes": 1 if how == "one" else 2}
        if how != "one":
            words.append("--ddp_backend=gloo")
            environment = launch_environment(f"{how}.yaml", 2) | {"ACCELERATE_USE_CPU": "false"}
            options |= {"prepare": use_deepspeed, "environment": environment}
        succeed(run_forked(script, words, tmp_path_factory.mktemp("log"), **options))

    return join


@needs_deepspeed
@pytest.mark.parametrize(
    ("script", "changes", "weights"),
    [
        ("run_align", {}, "model.safetensors"),
        ("run_sft", {"lora_r": 0}, "model.safetensors"),
        ("run_sft", {"lora_r": 4, "merge_adapter": "true"}, "adapter_model.safetensors"),
    ],
    ids=["align", "sft", "sft with a new adapter"],
)
def test_zero3_joins_two_backbones(join, script, changes, weights, tmp_path):
    """The model is whole until training starts: the projector, and a new adapter, get one process's random numbers."""
    for how in ("one", "zero3"):
        join(tmp_path / how, how, script, **changes)
    assert sorted((tmp_path / "zero3" / "checkpoint-2" / "global_step2").glob("*optim_states.pt"))
    assert_same_run(tmp_path / "zero3", tmp_path / "one", weights)
    losses = history(tmp_path / "one", "loss")
    assert (losses[0] - losses[1]).abs() > 1e-3  # the control: training did change something
    load_model(str(tmp_path / "zero3"))
    if "merge_adapter" in changes:  # by the first process alone, while DeepSpeed is still configured
        ours, theirs = (load_file(tmp_path / how / "merged" / "model.safetensors") for how in ("zero3", "one"))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=5e-6, msg=name)


@pytest.mark.parametrize(
    ("how", "changes", "message"),
    [
        pytest.param("zero2", {"optimizer": "muon"}, "optimizer is 'muon', .* ZeRO flattens", marks=needs_deepspeed),
        ("fsdp2", {"quantization": "int8", **ADAPTER}, "quantization is 'int8', whose weights FSDP cannot shard"),
    ],
    ids=["muon with ZeRO", "int8 with FSDP2"],
)
def test_refused_before_a_model_is_loaded(start, how, changes, message, tmp_path):
    with pytest.raises(AssertionError, match=message) as error:
        start(tmp_path / "run", how, **changes)
    assert "trained parameters" not in str(error.value)


@pytest.mark.parametrize("how", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_new_adapter_on_four_bits(start, how, tmp_path):
    changes = {**ADAPTER, "quantization": "nf4"}
    for each in ("one", how):
        start(tmp_path / each, each, **changes)
    assert_same_run(tmp_path / how, tmp_path / "one", "adapter_model.safetensors")
    losses = history(tmp_path / "one", "loss")
    assert (losses[0] - losses[1]).abs() > 1e-3  # the control
