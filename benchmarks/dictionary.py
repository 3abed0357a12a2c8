"""Training dictionaries: lmmono from its store beside sae-lens, beside sparsify, beside the floor.

    python benchmarks/dictionary.py [--arch topk] [--d 512] [--expansion 4] [--k 32] [--steps 12]
        [--repeats 3] [--threads 2]
    python benchmarks/dictionary.py --parity

One GPT-2 of two blocks and width `--d` (weights as initialised), its `blocks.1.hook_resid_post` on
the planted corpus, batches of 4096 vectors. Arms run in turn, repeat after repeat:

- ours: `lm.SAE(...).fit(store.vectors(...))`, the vectors captured before.
- ours, sae-lens' step: the same with `sparse_step=False`.
- sae-lens, tensors: sae-lens' own `SAETrainer.fit`, fed from a list of tensors in memory.
- sae-lens, runner: its `LanguageModelSAETrainingRunner`, which runs the model as it trains.
- sparsify: forward, backward and Adam of its `SparseCoder` on the same tensors (topk only; its
  trainer needs a model, so its loop is written here as it is there). Needs `eai-sparsify`.

Prints medians over the repeats of the mean milliseconds per step, without the first three steps,
and the floor: the encoder's product, 2 * batch * d_in * d_sae operations, at the measured rate of
one matrix product of that shape, and Adam's 28 bytes per weight at the measured rate of a copy.

`--parity` prints how far weights are apart after equal steps: ours and sae-lens; sae-lens and
itself with the rows of every batch in another order, which is the same sum in another order.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import activation_store as astore
import lmmono as lm
from lmmono.dictionaries.architectures import sae_lens, trainer, training_sae
from lmmono.dictionaries.sparse import Scratch, SparseStep
from lmmono.dictionaries.vector_source import StoreVectors, VectorSource
from lmmono.interop.lens import to_hooked
from lmmono.recipe import Recipe
from lmmono.runs.folder import Run

HOOK, N_CTX, BATCH, WARM_UP_STEPS = "blocks.1.hook_resid_post", 128, 4096, 3
RECIPE = """
name: dictionaries
seed: 0
out: {folder}
data: {{corpus: {{kind: planted, n_documents: 3000}}, n_ctx: {n_ctx}}}
model: {{arch: gpt2, n_layers: 2, d_model: {d}, n_heads: 4}}
train: {{steps: 100}}
"""


class Enough(Exception):
    """Ends a training that has been timed."""


class Clock:
    """The moments at which a training asked for batches."""

    def __init__(self, steps: int) -> None:
        self.times: list[float] = []
        self.steps = steps

    def tick(self) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > self.steps:
            raise Enough

    def milliseconds(self) -> float:
        timed = self.times[WARM_UP_STEPS:]
        return 1e3 * (timed[-1] - timed[0]) / (len(timed) - 1)


class Timed(VectorSource):
    """Vectors that note when each batch is ready; the first step is not timed."""

    def __init__(self, source: VectorSource, clock: Clock) -> None:
        self._source, self._clock = source, clock
        self.widths, self.n_tokens = source.widths, source.n_tokens
        self.batch_tokens, self.digest, self.facts = source.batch_tokens, source.digest, {}

        self._passes = 0

    def _batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        self._passes += 1
        for batch in self._source._batches(start):
            if self._passes > 1:  # the first pass only measures the scale
                self._clock.tick()
            yield batch


class Bench:
    """A model, its captured vectors, and the settings of one comparison."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        file = folder / "recipe.yaml"
        file.write_text(RECIPE.format(folder=folder, d=options.d, n_ctx=N_CTX))
        run = Run.create(Recipe.load(file))
        self.rows = run.tokens("train").limit(BATCH * 20)
        vocabulary = len(run.corpus.tokenizer)
        self.model = lm.models.build_model(
            run.recipe.model, d_vocab=vocabulary, n_ctx=N_CTX, seed=0
        )
        with astore.open(folder / "store", "w") as store:
            lm.capture(self.model, self.rows, hooks=(), vectors=HOOK, into=store)
        self.store = astore.open(folder / "store")
        stream = self.store.vectors(HOOK, batch_tokens=BATCH, framework="torch")
        self.tensors = [x.clone() for x in stream if len(x) == BATCH]
        self.scale = float(options.d**0.5 / torch.cat(self.tensors).norm(dim=-1).mean())
        self.d_sae = options.d * options.expansion

    def settings(self, **more: Any) -> lm.SAE:
        options = self.options
        return lm.SAE(options.arch, d_sae=self.d_sae, k=options.k, steps=10_000, seed=0, **more)

    def ours(self, clock: Clock, **more: Any) -> None:
        stream = self.store.vectors(HOOK, batch_tokens=BATCH)
        self.settings(**more).fit(Timed(StoreVectors(stream), clock))

    def ours_lens_step(self, clock: Clock) -> None:
        self.ours(clock, sparse_step=False)

    def lens_tensors(self, clock: Clock) -> None:
        settings = self.settings().settings
        loop = trainer(settings, training_sae(settings, self.options.d, self.d_sae, 0, {}), BATCH)
        loop.activation_scaler.scaling_factor = self.scale

        def batches() -> Iterator[Tensor]:
            for x in itertools.cycle(self.tensors):
                clock.tick()
                yield x

        loop.data_provider = batches()
        loop.fit()

    def lens_runner(self, clock: Clock) -> None:
        from datasets import Dataset

        package, settings = sae_lens(), self.settings().settings
        loop = package.training.sae_trainer.SAETrainer
        sae = training_sae(settings, self.options.d, self.d_sae, 0, {})
        config = package.LanguageModelSAERunnerConfig(
            sae=sae.cfg,
            model_name="gpt2",
            hook_name=HOOK,
            dataset_path="planted",
            is_dataset_tokenized=True,
            streaming=False,
            context_size=N_CTX,
            prepend_bos=False,
            training_tokens=BATCH * 10_000,
            train_batch_size_tokens=BATCH,
            store_batch_size_prompts=BATCH // N_CTX,
            n_batches_in_buffer=8 * BATCH // N_CTX,
            lr=settings.lr,
            device="cpu",
            logger=package.LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=None,
            verbose=False,
        )
        data = Dataset.from_dict({"tokens": self.rows.ids.astype("int64").tolist()})
        step = loop.step

        def ticking(self: Any, batch: Tensor) -> Any:
            clock.tick()
            return step(self, batch)

        loop.step = ticking
        try:
            package.LanguageModelSAETrainingRunner(
                config, override_dataset=data, override_model=to_hooked(self.model)
            ).run()
        finally:
            loop.step = step

    def sparsify(self, clock: Clock) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        coder = SparseCoder(
            self.options.d, SparseCoderConfig(num_latents=self.d_sae, k=self.options.k)
        )
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
        for x in itertools.cycle(self.tensors):
            clock.tick()
            out = coder(x * self.scale)
            (out.fvu + out.auxk_loss).backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            coder.set_decoder_norm_to_unit_norm()

    def time(self, arm: Callable[[Clock], None]) -> float:
        clock = Clock(self.options.steps)
        try:
            arm(clock)
        except Enough:
            return clock.milliseconds()
        raise AssertionError("the training ended by itself")

    def floor(self) -> tuple[float, float]:
        """Return the milliseconds of the encoder's product and of Adam's traffic."""
        x, w = torch.randn(BATCH, self.options.d), torch.randn(self.options.d, self.d_sae)
        out = torch.empty(BATCH, self.d_sae)
        product = _fastest(lambda: torch.mm(x, w, out=out))
        source = torch.empty(2**25)
        target = torch.empty_like(source)
        copy = _fastest(lambda: target.copy_(source))  # reads and writes 128 MiB each
        return product, copy * 28 * 2 * w.numel() / (8 * source.numel())


def _fastest(call: Callable[[], object]) -> float:
    def once() -> float:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    return min(once() for _ in range(7))


def compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        arms = {
            "ours": bench.ours,
            "ours, sae-lens' step": bench.ours_lens_step,
            "sae-lens, tensors": bench.lens_tensors,
            "sae-lens, runner": bench.lens_runner,
        }
        if options.arch == "topk" and _has_sparsify():
            arms["sparsify"] = bench.sparsify
        bench.time(bench.ours)  # compiles the loops, where that has not been done
        found: dict[str, list[float]] = {name: [] for name in arms}
        floors: list[tuple[float, float]] = []
        for _ in range(options.repeats):
            floors.append(bench.floor())
            for name, arm in arms.items():
                found[name].append(bench.time(arm))
    product, adam = (statistics.median(column) for column in zip(*floors, strict=True))
    rate = 2 * BATCH * options.d * bench.d_sae / product / 1e6
    print(f"{options.arch}, d_in {options.d}, d_sae {bench.d_sae}, k {options.k}, batch {BATCH}")
    print(f"  floor: product {product:.1f} ms ({rate:.0f} GFLOP/s), Adam {adam:.1f} ms")
    ours = statistics.median(found["ours"])
    for name, times in found.items():
        middle = statistics.median(times)
        share = (product + adam) / middle
        print(
            f"  {name:22} {middle:8.1f} ms/step  {min(times):8.1f} to {max(times):.1f}  "
            f"{middle / ours:5.2f} x ours  floor/step {share:4.0%}"
        )
    own, peer = found["ours, sae-lens' step"], found["sae-lens, tensors"]
    over = statistics.median(a / b for a, b in zip(own, peer, strict=True)) - 1
    print(f"  our loop and store around sae-lens' step: {over:+.1%}")


def _has_sparsify() -> bool:
    try:
        import sparsify  # noqa: F401
    except ImportError:
        print("sparsify: not installed (pip install eai-sparsify natsort schedulefree)")
        return False
    return True


def parity(d: int = 256, d_sae: int = 1024, batch: int = 1024, k: int = 32) -> None:
    made = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2 * d, d, generator=made), dim=-1)

    def draw() -> Tensor:
        on = torch.rand(batch, 2 * d, generator=made) < 8 / d
        return (on * torch.rand(batch, 2 * d, generator=made)) @ directions * (d / 4) ** 0.5

    for arch, window in itertools.product(("topk", "batchtopk"), (500, 3)):
        settings = lm.SAE(arch, d_sae=d_sae, k=k, steps=1000, dead_window_steps=window).settings
        saes = [training_sae(settings, d, d_sae, 0, {}) for _ in range(3)]
        loops = [trainer(settings, sae, batch) for sae in saes]
        step = SparseStep(loops[1], Scratch())
        for number in range(1, 51):
            x = draw()
            loops[0].step(x)
            step.step(x)
            loops[2].step(x[torch.randperm(batch, generator=made)])
            for loop in loops:
                loop.n_training_steps = number
            if number in (10, 25, 50):
                ours, permuted = (_apart(saes[0], other) for other in saes[1:])
                dead = int(loops[0].dead_neurons.sum())
                print(f"{arch}, {number} steps, {dead} dead: ours {ours}; permuted rows {permuted}")


def _apart(a: Any, b: Any) -> str:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    gap = torch.cat([(p - q).detach().abs().flatten() for p, q in pairs]).double()
    return f"max {gap.max():.0e}, rms {gap.square().mean().sqrt():.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=("topk", "batchtopk"), default="topk")
    parser.add_argument("--parity", action="store_true")
    defaults = {"d": 512, "expansion": 4, "k": 32, "steps": 12, "repeats": 3, "threads": 2}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.parity:
        parity()
    else:
        compare(options)


if __name__ == "__main__":
    main()
