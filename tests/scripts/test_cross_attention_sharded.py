"""Cross-attention on two processes: the same run as one process, also where one of the two lacks an image."""

import pytest

from jnana.training.loading import load_model
from tests.scripts.test_sharded import (  # noqa: F401  # `start` and `one` are fixtures
    ADAPTER,
    assert_one_lacked_an_image,
    assert_same_run,
    needs_deepspeed,
    one,
    start,
)


@pytest.fixture(scope="module")
def aligned(crossed):
    """What the fixtures of test_sharded.py fine-tune."""
    return crossed


@pytest.mark.parametrize("how", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_two_processes_are_one(start, one, how, tmp_path):  # noqa: F811
    assert_one_lacked_an_image(start(tmp_path / how, how), sharded=how != "ddp")
    assert_same_run(tmp_path / how, one)
    model, _ = load_model(str(tmp_path / how))
    assert model.config.fusion == "cross_attention"


def test_fsdp2_with_an_adapter(start, tmp_path):  # noqa: F811
    for how in ("one", "fsdp2"):
        start(tmp_path / how, how, **ADAPTER, gradient_checkpointing="true")
    assert_same_run(tmp_path / "fsdp2", tmp_path / "one", "adapter_model.safetensors")
    load_model(str(tmp_path / "fsdp2"))
