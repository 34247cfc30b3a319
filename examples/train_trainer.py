"""Hugging Face's Trainer on a run folder: stopped at any time, it goes on with the samples that come next.

    millstream pack stdlib: --out packed --seq-len 128 --eos
    python examples/train_trainer.py packed trained --steps 20
    python examples/train_trainer.py packed trained --steps 40     # goes on from the last checkpoint

All epochs are the dataset's (`epochs=`), and Trainer is told to take it in sequence, once.
"""

import argparse
import contextlib
import json
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from millstream.torch import PackedDataset, collate


class Losses(TrainerCallback):
    """A line for each step, with its loss to the last bit."""

    def __init__(self, path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **rest):
        if "loss" in logs:
            with open(self.path, "a") as file:
                file.write(json.dumps([state.global_step, logs["loss"].hex()]) + "\n")


def last_checkpoint(out):
    """The last one that is whole: a kill may leave half of one, and Trainer writes its own state last."""
    found = {}
    for path in out.glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError):
            found[json.loads((path / "trainer_state.json").read_text())["global_step"]] = str(path)
    return found[max(found)] if found else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()

    set_seed(0)
    data = PackedDataset(options.folder, seed=7, epochs=100)
    vocabulary = data.datasets[0].settings["tokenizer"]["vocab_size"]
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, attention_dropout=0.1, **size))
    arguments = TrainingArguments(
        str(options.out),
        max_steps=options.steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",  # the order is the dataset's; before 5.0, override _get_train_sampler
        dataloader_num_workers=options.workers,
        save_steps=options.every,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=options.device == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    losses = Losses(options.out / "losses.jsonl")
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data, callbacks=[losses])
    options.out.mkdir(exist_ok=True)
    trainer.train(resume_from_checkpoint=last_checkpoint(options.out))


if __name__ == "__main__":
    main()
