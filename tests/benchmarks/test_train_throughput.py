"""The throughput benchmark at a tiny size: the files it writes, and its checks of losses and gradients."""

import json
import logging

import pytest

from benchmarks import checkouts, train_throughput
from benchmarks.throughput_report import summarize, table
from benchmarks.workloads import HEIGHT, SCALES, WIDTH, make_processor


ARGUMENTS = ["--device", "cpu", "--scale", "tiny", "--rounds", "1", "--steps", "2"]


@pytest.fixture(autouse=True)
def log_levels():
    """The script silences loggers; other tests of the same process read what they say."""
    loggers = [logging.getLogger(name) for name in ("jnana.training.stages", "jnana.training.feature_cache")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_one_command_writes_figures_and_a_plot(tmp_path):
    arguments = ["--cases", "sft-4", "--profile", "--results", str(tmp_path), "--name", "tiny"]
    result = train_throughput.main([*ARGUMENTS, *arguments])
    assert json.loads((tmp_path / "tiny.json").read_text())["cases"] == result["cases"]
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "forward" in (tmp_path / "tiny_sft-4_shared_image.txt").read_text()
    assert result["machine"]["torch_threads"] >= 1 and result["machine"]["peak_flops_by_matmul"] > 0
    (case,) = result["cases"]
    assert case["largest_loss_difference"] < 1e-4
    arms = case["arms"]
    assert set(arms) == set(train_throughput.ARMS)
    assert arms["shared_image"]["tokens"] < arms["padded"]["tokens"] == arms["llava"]["tokens"]
    assert arms["feature_cache"]["flops_per_step"] < arms["shared_image"]["flops_per_step"]  # without the tower
    assert arms["shared_image"]["flops_per_step"] < arms["llava"]["flops_per_step"]
    assert len(table(result).splitlines()) == 2 + 4
    for shares in case["profile"].values():
        assert sum(shares.values()) == pytest.approx(1) and shares["matrix products"] > 0 and shares["collator"] > 0
    assert all(case["profile"][arm]["attention"] > 0 for arm in ("shared_image", "padded"))


@pytest.mark.parametrize("case", ["align-24", "sft-24"])
def test_tiles_are_compared_with_stock_llava_next(tmp_path, case):
    result = train_throughput.main([*ARGUMENTS, "--cases", case, "--results", str(tmp_path)])
    (found,) = result["cases"]
    assert found["largest_loss_difference"] < 1e-4
    differences = [arm["gradient_difference"] for arm in found["arms"].values()]
    assert max(differences) < 1e-4 and max(differences) > 0
    assert found["arms"]["llava"]["tokens"] - found["arms"]["shared_image"]["tokens"] >= 4 * 24 - 20


def test_the_case_of_llava_1_6_has_2340_tokens_an_image(tmp_path):
    for scale in (SCALES["small"], SCALES["phi2"]):
        processor = make_processor(scale, scale.tiles)
        assert scale.tiles == processor.count_image_tokens((HEIGHT, WIDTH)) == 2340
    assert make_processor(SCALES["tiny"], 24).count_image_tokens((HEIGHT, WIDTH)) == 24


def test_several_images_a_row(tmp_path):
    """`sft-16-x3`: three images in fewer rows, compared with stock LLaVA as the others are."""
    result = train_throughput.main([*ARGUMENTS, "--cases", "sft-16-x3", "--results", str(tmp_path)])
    (found,) = result["cases"]
    assert found["largest_loss_difference"] < 1e-4 and found["samples_per_step"] >= 3 * 4
    assert found["arms"]["shared_image"]["rows"] < 3 and found["arms"]["llava"]["rows"] >= 3 * 4  # images: 3
    assert train_throughput.parse([]).cases[-2:] == ["sft-576-x3", "align-2340"]


def test_two_checkouts_take_turns(tmp_path, monkeypatch):
    """Each side runs in its own directory, and the order is swapped from round to round."""
    other = tmp_path / "before"
    (other / "benchmarks").mkdir(parents=True)
    (other / "benchmarks" / "train_throughput.py").write_text("")
    turns = []

    def run_side(checkout, case, args, profiled):
        turns.append((checkout, profiled))
        speed = (1 if checkout == other else 3) * len(turns)
        arms = {arm: {"samples_per_second": {"median": speed * rate}} for arm, rate in (("llava", 1), ("padded", 2))}
        return {"machine": {}, "cases": [{"arms": arms, **({"profile": {}} if profiled else {})}]}

    monkeypatch.setattr(checkouts, "run_side", run_side)
    arguments = [*ARGUMENTS[:4], "--rounds", "2", "--cases", "sft-4", "--against", str(other), "--profile"]
    result = train_throughput.main([*arguments, "--results", str(tmp_path), "--name", "x"])
    new = checkouts.HERE
    assert turns == [(new, False), (other, False), (other, True), (new, True)]
    (case,) = result["cases"]
    assert case["new_over_old"]["padded"]["rounds"] == [1.5, 4.0]  # 3 x 1 / 2, 3 x 4 / 3
    assert case["over_llava"]["padded"]["old"]["median"] == 2 and set(case["profile"]) == {"old", "new"}
    assert json.loads((tmp_path / "x_against.json").read_text()) == result
    with pytest.raises(SystemExit, match="there is no benchmarks/train_throughput.py in it"):
        train_throughput.main([*arguments[:-2], str(tmp_path), "--results", str(tmp_path)])


def test_a_side_runs_the_code_of_its_checkout(tmp_path):
    """Its result is read, and its error is shown."""
    script = tmp_path / "benchmarks" / "train_throughput.py"
    script.parent.mkdir()
    script.write_text(
        "import json, os, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--results') + 1])\n"
        "said = [os.environ['PYTHONPATH'], *sys.argv[1:]]\n"
        "(folder / 'side.json').write_text(json.dumps(said))\n"
    )
    args = train_throughput.parse(ARGUMENTS)
    said = checkouts.run_side(tmp_path, "sft-4", args, True)
    assert said[0] == str(tmp_path) and said[1:5] == ["--cases", "sft-4", "--rounds", "1"] and "--profile" in said
    script.write_text("raise RuntimeError('it broke')")
    with pytest.raises(SystemExit, match=r"sft-4 failed in [^:]*:(.|\n)*it broke"):
        checkouts.run_side(tmp_path, "sft-4", args, False)


def test_a_wrong_result_is_not_measured(tmp_path, monkeypatch):
    """The controls: a collator that drops a label is an error, in the gradient and in the loss."""
    original = train_throughput.JnanaCollator.__call__

    def dropping(self, items):
        batch = original(self, items)
        name = "labels" if "labels" in batch else "shift_labels"
        place = (batch[name] != -100).nonzero()[0]
        batch[name][tuple(place)] = -100
        if "shift_labels" not in batch:
            place[1] -= 1
        dropped = place[0] * batch[name].shape[1] + place[1]
        batch["logit_positions"] = batch["logit_positions"][batch["logit_positions"] != dropped]
        return batch

    monkeypatch.setattr(train_throughput.JnanaCollator, "__call__", dropping)
    arguments = [*ARGUMENTS, "--cases", "align-4", "--results", str(tmp_path)]
    with pytest.raises(RuntimeError, match="align-4: the projector's gradient in padded differs from stock LLaVA's"):
        train_throughput.main(arguments)
    turns = {arm: {"losses": [3.0, 2.0]} for arm in train_throughput.ARMS}
    case = train_throughput.Case("align-4", "align", [], None, {})
    assert train_throughput.compare_losses(case, turns, train_throughput.SCALES["tiny"].dtype) == 0
    turns["padded"] = {"losses": [3.0, 2.001]}
    with pytest.raises(RuntimeError, match="the loss in padded differs from stock LLaVA's by 5.0e-04"):
        train_throughput.compare_losses(case, turns, train_throughput.SCALES["tiny"].dtype)


def test_ratios_are_taken_within_a_round():
    """A machine half as fast in the second round changes no ratio."""

    def turn(seconds: float) -> dict:
        rates = {"samples_per_second": 10 / seconds, "supervised_tokens_per_second": 100 / seconds}
        return {"seconds": seconds, "wall_seconds": seconds, "peak_memory_bytes": None, "losses": [1.0, 1.0], **rates}

    facts = {
        "arms": {arm: {"flops_per_step": 100, "tokens": tokens} for arm, tokens in (("a", 30), ("shared_image", 10))}
    }
    rounds = [{"a": turn(4 * slow), "shared_image": turn(slow)} for slow in (1, 2)]
    summary = summarize("case", facts, rounds, ("a", "shared_image"), peak=100)
    assert summary["ratios"] == {"shared_image/a": {"median": 4, "min": 4, "max": 4, "rounds": [4, 4]}}
    assert summary["ratio_by_token_count"] == 3
    assert summary["arms"]["shared_image"]["share_of_peak_flops"]["rounds"] == [1, 0.5]


def test_unknown_cases_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_throughput.parse([*ARGUMENTS, "--cases", "align-5"])
    known = "align-4, align-16, sft-4, sft-16, sft-16-x3, align-24, sft-24"
    assert f"--cases align-5: scale tiny has {known}" in capsys.readouterr().err
