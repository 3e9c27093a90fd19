"""The three scripts one after the other: what each folder holds, what loads, what changed."""


def test_each_stage_leaves_a_complete_checkpoint(pretrained, aligned, tuned):
    for folder in (pretrained, aligned, tuned):
        for name in ("README.md", "loss_curve.png", "trainer_state.json", "tokenizer.json"):
            assert (folder / name).is_file(), (folder.name, name)
