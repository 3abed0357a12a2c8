"""The training loop of lmmono beside a bare PyTorch loop: same model, batches, optimizer, clipping.

    python benchmarks/training_loop.py [--repeats 5] [--steps 60]

Prints tokens per second of both, interleaved, and the overhead as a ratio of medians. The floor is
the bare loop itself; what lmmono adds is Accelerate, logging, the loss watch and stop requests.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lmmono.data.batches import train_batches
from lmmono.models.build import build_model
from lmmono.pipeline import train
from lmmono.recipe import Recipe
from lmmono.runs.folder import Run
from lmmono.training.optimizer import build_optimizer, lr_at, set_lr

RECIPE = """
name: bench
seed: 0
out: {out}
data: {{corpus: {{kind: planted, n_documents: 6000}}, n_ctx: 128}}
model: {{arch: {arch}}}
train: {{steps: {steps}, batch_tokens: 8192, warmup_steps: 5, eval_every_steps: 100000,
  eval_tokens: 1024, precision: fp32}}
"""
WARM_UP_STEPS = 10  # also the rhythm in which lmmono reports


def lmmono_rate(recipe: Recipe) -> float:
    """Return tokens per second of `lmmono.train` between the first report and the last."""
    times: list[float] = []
    train(recipe, progress=lambda *_, **__: times.append(time.perf_counter()))
    timed = recipe.train.steps - WARM_UP_STEPS
    return timed * recipe.train.batch_tokens / (times[-1] - times[0])


def bare_rate(recipe: Recipe, run: Run) -> float:
    """Return tokens per second of the plainest loop that trains the same model."""
    settings, tokenizer = recipe.train, run.corpus.tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(
        recipe.model,
        d_vocab=len(tokenizer),
        n_ctx=recipe.data.n_ctx,
        seed=0,
        eos_token_id=tokenizer.eos_token_id,
    ).to(device)
    model.train()
    optimizer = build_optimizer(model, settings)
    batch_rows = settings.batch_tokens // recipe.data.n_ctx
    batches = train_batches(run.tokens("train"), batch_rows, recipe.seed)
    losses: list[torch.Tensor] = []
    started = 0.0
    for step in range(settings.steps):
        if step == WARM_UP_STEPS:
            started = _now(device)
        ids = torch.from_numpy(next(batches)).to(device)
        set_lr(optimizer, lr_at(step, settings))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return (settings.steps - WARM_UP_STEPS) * settings.batch_tokens / (_now(device) - started)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for arch in ("crate", "gpt2"):
            rates: dict[str, list[float]] = {"bare": [], "lmmono": []}
            for repeat in range(options.repeats):
                file = Path(folder) / f"{arch}{repeat}.yaml"
                out = Path(folder) / "runs"
                file.write_text(RECIPE.format(out=out, arch=arch, steps=options.steps))
                recipe = Recipe.load(file, f"name={arch}{repeat}")
                rates["lmmono"].append(lmmono_rate(recipe))
                rates["bare"].append(bare_rate(recipe, Run.create(recipe)))
            pairs = zip(rates["bare"], rates["lmmono"], strict=True)
            overhead = statistics.median(bare / ours for bare, ours in pairs) - 1
            bare, ours = (statistics.median(rates[name]) for name in ("bare", "lmmono"))
            print(f"{arch}: bare {bare:,.0f} tokens/s, lmmono {ours:,.0f}, {overhead:+.1%} time")


if __name__ == "__main__":
    main()
