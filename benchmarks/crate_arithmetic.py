"""CRATE's arithmetic beside the released code's and beside GPT-2 of the same width, in training.

    python benchmarks/crate_arithmetic.py [--device cuda] [--repeats 15]

The released ISTA multiplies by the dictionary five times in its two steps, because it computes
x W_D^T twice; ours four times. Two tables, each with medians over interleaved repeats and the
median ratio to ours (with its range):

- the dictionary layer alone, forward and backward, beside the bare matrix products it cannot
  avoid: 4 forward and 8 backward of [tokens, d_model] with [d_model, d_mlp]. That is the floor.
- one training step of a whole model (loss, backward, AdamW). "ideal" is the speed that the
  matrix-product FLOP per token alone would give; the vocabulary takes most of every arm's.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmmono.models.build import build_model
from lmmono.models.crate import CrateIsta
from lmmono.recipe.sections import CrateModel, Gpt2Model

D_MODEL, N_LAYERS, N_HEADS, N_CTX, BATCH, D_VOCAB = 128, 2, 4, 128, 64, 4096
TOKENS = N_CTX * BATCH
D_MLP = 4 * D_MODEL


class ReleasedIsta(CrateIsta):
    """The same layer with the arithmetic of the released code."""

    def encode(self, x: Tensor) -> Tensor:
        """Take two steps, computing D^T x in each."""
        d, step, lam = self.dictionary, self.config.step_size, self.config.sparsity
        first = F.relu(step * F.linear(x, d) - step * lam)
        reconstructed = F.linear(F.linear(first, d.t()), d)
        return F.relu(first + step * (F.linear(x, d) - reconstructed) - step * lam)


def crate(device: str) -> nn.Module:
    section = CrateModel(arch="crate", n_layers=N_LAYERS, d_model=D_MODEL, n_heads=N_HEADS)
    return build_model(section, d_vocab=D_VOCAB, n_ctx=N_CTX, seed=0).to(device).train()


def released(device: str) -> nn.Module:
    model = crate(device)
    for module in model.modules():
        if isinstance(module, CrateIsta):
            module.__class__ = ReleasedIsta
    return model


def gpt2(device: str) -> nn.Module:
    section = Gpt2Model(arch="gpt2", n_layers=N_LAYERS, d_model=D_MODEL, n_heads=N_HEADS)
    return build_model(section, d_vocab=D_VOCAB, n_ctx=N_CTX, seed=0).to(device).train()


def step_of(model: nn.Module, device: str) -> Callable[[], object]:
    """Return a function that trains one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(D_VOCAB, (BATCH, N_CTX), device=device)

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def layer_of(model: nn.Module, device: str) -> Callable[[], object]:
    """Return a function that runs the first dictionary layer forward and backward."""
    layer = next(module for module in model.modules() if isinstance(module, CrateIsta))
    x = torch.randn(BATCH, N_CTX, D_MODEL, device=device, requires_grad=True)
    gradient = torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(x), [x, layer.dictionary], gradient)


def bare_products(device: str) -> Callable[[], object]:
    """Return a function that does the 12 products of the four-product layer and nothing else."""
    x = torch.randn(TOKENS, D_MODEL, device=device)
    dictionary = torch.randn(D_MLP, D_MODEL, device=device)
    code = torch.randn(TOKENS, D_MLP, device=device)

    def products() -> None:
        for _ in range(2):  # forward
            torch.mm(x, dictionary.t())
            torch.mm(code, dictionary)
        for _ in range(2):  # backward: to the inputs, and to the dictionary
            torch.mm(code, dictionary)
            torch.mm(x, dictionary.t())
            torch.mm(code.t(), x)
            torch.mm(code.t(), x)

    return products


def timed(
    arms: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Return seconds per call of every arm, interleaved so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 2):
        for name, run in arms.items():
            start = now(device)
            run()
            if repeat >= 2:  # the first calls warm up caches and allocators
                seconds[name].append(now(device) - start)
    return seconds


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def show(title: str, seconds: dict[str, list[float]], mflop: dict[str, float]) -> None:
    ours = seconds["CRATE, 4 products"]
    print(f"\n{title}")
    print(
        f"{'arm':<24}{'ms':>9}{'best ms':>9}{'tokens/s':>11}{'speed to ours':>20}"
        f"{'Mflop/token':>13}{'ideal':>7}"
    )
    for name, values in seconds.items():
        ratios = [mine / other for mine, other in zip(ours, values, strict=True)]
        median = statistics.median(values)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        ideal = mflop["CRATE, 4 products"] / mflop[name]
        print(
            f"{name:<24}{1e3 * median:>9.1f}{1e3 * min(values):>9.1f}{TOKENS / median:>11,.0f}"
            f"{spread:>20}{mflop[name]:>13.2f}{ideal:>7.2f}"
        )


def step_mflop(in_block: float) -> float:
    """Return Mflop per token of a training step: matrix products forward, twice that backward."""
    attention = 2 * 2 * N_CTX * D_MODEL / 2  # scores and values over half the positions
    forward = N_LAYERS * (2 * in_block + attention) + 2 * D_MODEL * D_VOCAB
    return 3 * forward / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = options.device
    torch.manual_seed(0)
    models = {"CRATE, 4 products": crate(device), "released, 5 products": released(device)}
    ids = torch.randint(D_VOCAB, (2, N_CTX), device=device)
    four, five = (model(ids).logits for model in models.values())
    torch.testing.assert_close(four, five)  # one function, two ways to compute it
    print(
        f"d_model {D_MODEL}, d_mlp {D_MLP}, {N_LAYERS} layers, {N_HEADS} heads, n_ctx {N_CTX},"
        f" batch {BATCH}, d_vocab {D_VOCAB}, fp32, {device}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}, median of {options.repeats}"
    )

    layers = {name: layer_of(model, device) for name, model in models.items()}
    layers["bare products (floor)"] = bare_products(device)
    product = 3 * 2 * D_MODEL * D_MLP / 1e6
    flop = dict(zip(layers, (4 * product, 5 * product, 4 * product), strict=True))
    show("dictionary layer, forward and backward", timed(layers, options.repeats, device), flop)

    models["GPT-2"] = gpt2(device)
    steps = {name: step_of(model, device) for name, model in models.items()}
    square = D_MODEL * D_MODEL
    flop = dict(zip(steps, map(step_mflop, (18 * square, 22 * square, 12 * square)), strict=True))
    show("training step of the whole model", timed(steps, options.repeats, device), flop)


if __name__ == "__main__":
    main()
