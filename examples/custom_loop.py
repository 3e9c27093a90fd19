"""Train the projector in a training loop of your own: jnana's model, processor and collator, without the Trainer.

    pip install -e ".[train]"        # once, in the clone
    python examples/custom_loop.py outputs/jnana/align captions.json outputs/custom --image_folder images

The arguments are a Jnana checkpoint, any data that `load_rows` reads, and the output directory. The script prints the
loss of every step, and saves a checkpoint that loads like any other.
"""

import argparse

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from jnana import JnanaCollator, load_model, load_rows
from jnana.modeling import available_device


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("model_name_or_path", "train_data", "output_dir"):
    parser.add_argument(name)
parser.add_argument("--image_folder")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--learning_rate", type=float, default=1e-3)
args = parser.parse_args()

device = available_device()
model, processor = load_model(args.model_name_or_path, device_map={"": device})
projector = model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
model.train()  # the loss is then fused with the head; frozen parts run without dropout all the same
optimizer = torch.optim.AdamW(projector.parameters(), lr=args.learning_rate)

rows = load_rows(args.train_data, image_folder=args.image_folder)
collator = JnanaCollator(processor, packing="shared_image")  # one packed row for each image and its conversations
for epoch in range(args.epochs):
    for step, batch in enumerate(DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collator)):
        loss = model(**send_to_device(batch, device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch}, step {step}: loss {loss.item():.4f}")

model.save_pretrained(args.output_dir)
processor.save_pretrained(args.output_dir)
