"""Preferences (DPO) with TRL's own trainer: goes on from run_sft's adapter, the frozen adapter is the reference.

    pip install -e ".[train,clients]"        # once, in the clone
    python examples/preferences/train_dpo.py outputs/jnana/sft preferences.json outputs/dpo --image_folder images

The data is a JSON list of `{"image": "1.png", "question": "...", "chosen": "...", "rejected": "..."}`. The output
directory is an adapter on the same base: run_merge, run_export, run_evaluate and app.py take it. What it costs: in a
step both answers of a pair have the image in front, and policy and reference read both, so the tower encodes an image
four times and the language model reads its tokens four times. (TRL can't ask the reference once before training where
there are images, and Jnana's packing, which reads an image once for all answers, is not used here.)
"""

import argparse
import json
from pathlib import Path

import trl
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value

from jnana import load_model
from jnana.training.adapters import adapter_reference, complete_adapter_folder


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("adapter", "preferences", "output_dir"):
    parser.add_argument(name)
parser.add_argument("--image_folder", default=".")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch_size", type=int, default=4, help="pairs in a step of one device")
parser.add_argument("--learning_rate", type=float, default=5e-6)
parser.add_argument("--beta", type=float, default=0.1, help="how strongly the policy is held to the reference")
args = parser.parse_args()

if Path(args.output_dir).is_dir() and any(Path(args.output_dir).iterdir()):
    parser.error(f"output_dir {args.output_dir!r} is not empty; give a new directory")

# 1. The pairs in TRL's columns: images are opened when their batch is made
records = json.loads(Path(args.preferences).read_text(encoding="utf-8"))
turns = {"prompt": ("user", "question"), "chosen": ("assistant", "chosen"), "rejected": ("assistant", "rejected")}
columns = {
    column: [[{"role": role, "content": record[key]}] for record in records] for column, (role, key) in turns.items()
}
columns["images"] = [[str(Path(args.image_folder) / record["image"])] for record in records]
message = List({"role": Value("string"), "content": Value("string")})
data = Dataset.from_dict(columns, Features({**dict.fromkeys(turns, message), "images": List(Image())}))

# 2. The adapter, which trains on (its projector, too), around its frozen base
device = PartialState().device  # of this process
model, processor = load_model(args.adapter, trainable_adapter=True, device_map={"": device})

# 3. Training. TRL copies the adapter under the name `ref` and never changes the copy
settings = trl.DPOConfig(
    output_dir=args.output_dir,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.learning_rate,
    beta=args.beta,
    max_length=None,  # image tokens must not be cut off
    bf16=device.type == "cuda",
    use_cpu=device.type == "cpu",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
trainer = trl.DPOTrainer(model, args=settings, train_dataset=data, processing_class=processor)
trainer.train()

# 4. The trained adapter alone, with what it needs to load as any other of run_sft
model.save_pretrained(args.output_dir, selected_adapters=["default"])
processor.save_pretrained(args.output_dir)
complete_adapter_folder(model, adapter_reference(args.adapter), args.output_dir)
