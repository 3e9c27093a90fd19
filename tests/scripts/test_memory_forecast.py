"""The training scripts log a forecast of their memory before they read weights."""

from jnana import run_pretrain, run_sft
from tests.scripts.conftest import PRETRAIN, options, sft_options


def test_the_scripts_log_it(aligned, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jnana.training.profiling.forecast.FEWEST_WEIGHTS", 0)
    run_pretrain.main(
        options(**{**PRETRAIN, "max_steps": 1}, train_data=data / "corpus.txt", output_dir=tmp_path / "text")
    )
    said = capsys.readouterr().out
    assert said.index("memory forecast, 8 row(s) of 32 tokens") < said.index("{'loss'")
    changes = {"quantization": "nf4", "packing": "shared_image", "max_row_tokens": 64, "max_steps": 1}
    run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "sft", **changes))
    said = capsys.readouterr().out
    assert "no forecast" not in said
    table = said[said.index("memory forecast") :]
    assert all(part in table for part in ("weights nf4", "adapter float32", "optimizer", "activations", "which fits"))
