"""A tiny GPT, trained from a run folder: kill it whenever you like, start it again, and no loss changes.

    millstream pack stdlib: --out packed --seq-len 128 --eos
    python examples/train_gpt.py packed trained --steps 100

Several ranks: start it once for each, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as torchrun does. A run
may go on with another number of ranks or of workers: each step takes the same samples.

On a GPU, with --device cuda, that holds on one and the same kind of GPU.

trained/rank-0.txt has a line a step: its number, the loss in hexadecimal, and a checksum of each sample.
"""

import argparse
import contextlib
import os
import zlib
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional

from millstream.torch import PackedDataset


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x, mask):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    def __init__(self, vocabulary, seq_len, width=32, heads=2, layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids, position_ids, labels):
        document = (position_ids == 0).cumsum(1)  # a position of 0 begins one
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        mask = (document[:, None, :, None] == document[:, None, None, :]) & causal
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x, mask)
        logits = self.norm(x) @ self.tokens.weight.T
        # Labels are not shifted: the output at one place is compared with the label at the next.
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def save(path, state):
    """All of it or nothing: a kill in the middle leaves the checkpoint before it."""
    with open(f"{path}.part", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


def train(options):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)  # sums come in another order on another number of threads
    torch.use_deterministic_algorithms(True)  # and on a GPU in any, if nobody says so
    torch.manual_seed(options.seed)
    data = PackedDataset(options.folders, weights=options.weights, seed=options.seed, epochs=options.epochs)
    loader = data.loader(options.batch // world, workers=options.workers)  # the rank is found by itself
    model = GPT(data.datasets[0].settings["tokenizer"]["vocab_size"], data.seq_len).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, checkpoint = 0, options.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=options.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["data"])
        step = state["step"]
    trained = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    with open(options.out / f"rank-{rank}.txt", "a") as log:
        for batch in loader:
            if step >= options.steps:
                break
            # Random numbers by step and rank, so that there is no state of theirs to keep.
            torch.manual_seed((options.seed * 1_000_003 + step) * 4096 + rank)
            inputs = (batch[name].to(options.device) for name in ("input_ids", "position_ids", "labels"))
            loss = trained(*inputs)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            sums = [zlib.crc32(row.numpy()) for row in batch["input_ids"]]
            print(step, loss.item().hex(), *sums, file=log, flush=True)
            step += 1
            if rank == 0 and (step % options.every == 0 or step == options.steps):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save(checkpoint, {**state, "data": loader.state_dict(), "step": step})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="RUN", help="run folders of millstream pack")
    parser.add_argument("out", type=Path, help="where the checkpoint and the losses go")
    parser.add_argument("--weights", type=lambda text: [float(one) for one in text.split(",")], help="one a folder")
    parser.add_argument("--batch", type=int, default=8, help="samples in a step, over all ranks")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            distributed.init_process_group("gloo")
            stack.callback(distributed.destroy_process_group)
        train(options)


if __name__ == "__main__":
    main()
