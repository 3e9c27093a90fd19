"""16 samples learnt by heart: greedy output equals the caption, stop token included."""

from jnana import run_sft
from jnana.processing.data import load_rows
from jnana.training.loading import load_model
from jnana.training.monitoring import samples_from_rows
from tests.scripts.conftest import align_options


def test_16_captions_by_heart(data, vision, pretrained, tmp_path):
    output = tmp_path / "heart"
    changes = {"max_steps": 120, "learning_rate": "3e-3", "per_device_train_batch_size": 16, "save_strategy": "no"}
    run_sft.main(align_options(data, vision, pretrained, output_dir=output, lora_r=0, optimizer="muon", **changes))
    model, processor = load_model(str(output))
    rows = load_rows(str(data / "captions.json"), image_folder=str(data / "images"))
    samples = samples_from_rows(rows, processor, 16)
    assert len({sample.truth for sample in samples}) == 16
    model.eval()
    for sample in samples:
        ids = model.generate(**sample.inputs, max_new_tokens=20, do_sample=False)[0]
        answer = ids[sample.inputs["input_ids"].shape[1] :].tolist()
        assert answer[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(answer[:-1]).strip() == sample.truth
