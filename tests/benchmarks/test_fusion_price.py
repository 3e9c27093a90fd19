"""The benchmark of the ways to show an image, at a tiny size: all arms read the same texts."""

import json

from benchmarks import fusion_price


def test_one_command_writes_figures(tmp_path):
    arguments = ["--device", "cpu", "--scale", "tiny", "--rounds", "2", "--steps", "1", "--cases", "sft-16"]
    result = fusion_price.main([*arguments, "--output", str(tmp_path / "price.json")])
    assert json.loads((tmp_path / "price.json").read_text())["cases"] == result["cases"]
    (case,) = result["cases"]
    arms = case["arms"]
    assert set(arms) == set(fusion_price.ARMS)
    # One image, shown once in its row: 16 patches, 64 latents, or one token.
    texts = {arms["tokens"]["tokens"] - 16, arms["perceiver"]["tokens"] - 64, arms["cross_attention"]["tokens"] - 1}
    assert len(texts) == 1
    assert arms["narrow"]["tokens"] == arms["cross_attention"]["tokens"]
    assert arms["narrow"]["parameters"] < arms["cross_attention"]["parameters"]
    assert arms["tokens"]["time_over_tokens"] == [1.0, 1.0, 1.0]
    assert len(fusion_price.table(result).splitlines()) == 1 + 4
