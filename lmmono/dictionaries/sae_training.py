"""Training sae-lens' SAEs on vectors: one loop over one or many, exact to resume, safe to stop.

Batch k depends only on the vectors and k, and every SAE takes one step on each batch. So an SAE
that is trained next to others gets the bits it gets alone, and one that resumes from a checkpoint
gets the bits of one that never stopped (same machine, same number of threads).

    folder/checkpoint.safetensors   weights, Adam's moments and firing counters as tensors, the rest
                                    as JSON in its header; written atomically, read without pickle
           metrics.parquet          loss, L0, FVU and dead share by step
"""

import json
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmmono.dictionaries.architectures import trainer, training_sae
from lmmono.dictionaries.sparse import Scratch, SparseStep, StepResult
from lmmono.dictionaries.vector_source import VectorSource
from lmmono.errors import DictionaryError, TrainingStopped
from lmmono.files.atomic import atomic_file
from lmmono.files.signals import stop_requests
from lmmono.registry.metrics import METRICS
from lmmono.stats.formulas import fvu
from lmmono.types import Progress

LOG_ROWS = 100
"""Rows of each curve; more would slow a GPU down, since reading a loss waits for the device."""
WINDOW_ROWS = 20
"""Rows of a curve in each window of the rule to stop by: FVU of a batch varies by a few per cent,
their mean by a quarter of that."""
SCALING_BATCHES = 16
"""Batches, from the first on, that decide the scale of the input."""
MOST_EPOCHS = 1_000
"""A fit that would see each vector more often is refused: the vectors are too few, by mistake."""
CHECKPOINT = "checkpoint.safetensors"
CURVES = "metrics.parquet"

_COUNTERS = ("act_freq_scores", "n_forward_passes_since_fired")
_NUMBERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
"""State of sae-lens' trainer that a checkpoint holds: tensors and numbers."""


@dataclass(frozen=True)
class FitPlan:
    """Everything that decides the weights of one SAE, besides the vectors themselves."""

    name: str
    """What progress and errors call it."""
    settings: Any
    """One of `lmmono.recipe.dictionary_settings.Sae`, or `DenseAutoencoder`."""
    seed: int
    """Seed of the initial weights."""
    hook: str
    """Which of the vectors it is trained on."""
    d_in: int
    """Width of the hook's vectors."""
    d_sae: int
    """Number of latents."""
    digest: str
    """Hash of settings, seed, hook and vectors; a checkpoint of another one is refused."""
    about: dict[str, Any]
    """Metadata of the SAELens folder."""
    folder: Path | None
    """Where checkpoints and curves go; None keeps nothing."""


class SaeFit:
    """One SAE under training: sae-lens' trainer, the input's scale, and how far it is.

    Attributes:
        plan: What decides its weights.
        sae: The sae-lens `TrainingSAE`, in scaled units until `fold`.
        scale: The input is multiplied by this number.
        seconds: Time spent in steps.
        curves: What was logged.
    """

    def __init__(
        self,
        plan: FitPlan,
        batch_tokens: int,
        scale: float,
        *,
        device: str = "cpu",
        scratch: Scratch | None = None,
    ) -> None:
        self.plan, self.scale = plan, scale
        self.sae = training_sae(plan.settings, plan.d_in, plan.d_sae, plan.seed, plan.about)
        self.sae.to(device)
        self._trainer = trainer(plan.settings, self.sae, batch_tokens)
        self._trainer.activation_scaler.scaling_factor = scale
        is_sparse = SparseStep.supports(plan.settings, device)
        self._sparse = SparseStep(self._trainer, scratch or Scratch()) if is_sparse else None
        self.seconds, self.curves = 0.0, Curves()
        self._log_every = max(1, plan.settings.steps // LOG_ROWS)
        if plan.settings.stop_gain is not None:
            window = plan.settings.stop_window_steps
            self._log_every = max(1, min(self._log_every, window // WINDOW_ROWS))
        self._window = min(plan.settings.dead_window_steps, plan.settings.steps)
        self.settled_step: int | None = None
        """Step at which FVU fell no further by the rule of the settings; None while it does."""

    @property
    def step(self) -> int:
        """Steps taken; also the number of the batch that comes next."""
        return self._trainer.n_training_steps

    @property
    def n_tokens(self) -> int:
        """Vectors seen, repeated ones counted again."""
        return self._trainer.n_training_samples

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self._end

    @property
    def _end(self) -> int:
        """The last step: that of the settings, or earlier where FVU has settled."""
        settings = self.plan.settings
        if self.settled_step is None:
            return settings.steps
        return min(settings.steps, self.settled_step + self._decay_steps)

    @property
    def _decay_steps(self) -> int:
        """Steps from the settled one to the end: `decay_fraction` of all steps then."""
        assert self.settled_step is not None
        share = min(self.plan.settings.decay_fraction, 0.9)  # 1 would never end
        return max(1, round(self.settled_step * share / (1 - share)))

    @property
    def dead_fraction(self) -> float:
        """Share of latents that did not fire in the last `dead_window_steps` steps, or so far."""
        window = min(self._window, self.step)
        return float((self._trainer.n_forward_passes_since_fired >= window).float().mean())

    def _falling_lr(self) -> float:
        """Return the learning rate of the next step once FVU has settled: on its way to zero."""
        assert self.settled_step is not None
        left = (self._end - self.step) / max(1, self._end - self.settled_step)
        return float(self.plan.settings.lr) * min(1.0, left)

    def take_step(self, x: Float[Tensor, "n d_in"], progress: Progress) -> None:
        """Take one step on a batch in the hook's own units.

        Raises:
            DictionaryError: The loss became NaN or infinite.
        """
        began = time.monotonic()
        if self.settled_step is not None:  # sae-lens' schedule knows nothing of it
            self._trainer.optimizer.param_groups[0]["lr"] = self._falling_lr()
        if self.step == max(self._end - self._window, self.settled_step or 0):
            # sae-lens reports the L0 of what these count, so they count the last window alone
            self._trainer.act_freq_scores.zero_()
            self._trainer.n_frac_active_samples = 0
        # forward, loss, backward and Adam: `SparseStep.step`, or sae-lens' own `_train_step`
        output = self._sparse.step(x) if self._sparse else self._trainer.step(x)
        self._trainer.n_training_steps += 1
        self.seconds += time.monotonic() - began
        if self.step % self._log_every == 0 or self.is_done:
            self._log(output if isinstance(output, StepResult) else _measured(output), progress)
            self._watch_fvu()

    def _watch_fvu(self) -> None:
        """See whether FVU has settled, which ends the fit after its learning rate has fallen."""
        settings = self.plan.settings
        if settings.stop_gain is None or self.settled_step is not None:
            return
        window = settings.stop_window_steps
        if self.step < 2 * window + settings.warmup_steps:
            return
        now, before = (
            self.curves.mean("fvu", self.step - (i + 1) * window, self.step - i * window)
            for i in (0, 1)
        )
        if now > (1 - settings.stop_gain) * before:
            self.settled_step = self.step

    def _log(self, result: StepResult, progress: Progress) -> None:
        n = len(result.x)
        values = {
            "loss": result.loss,
            "l0": result.n_active / n,
            "fvu": fvu(result.squared_error, variation(result.x)),
            "dead_fraction": self.dead_fraction,
        }
        if not math.isfinite(values["loss"]):
            raise DictionaryError(
                f"{self.plan.name}: the loss became {values['loss']} by step {self.step}; lower lr "
                f"(now {self.plan.settings.lr:g}) or raise warmup_steps "
                f"(now {self.plan.settings.warmup_steps})"
            )
        lr = self._trainer.optimizer.param_groups[0]["lr"]
        if self.settled_step is not None:
            lr = self._falling_lr()
        self.curves.add(self.step, {**values, "lr": lr}, n, self.seconds)
        progress(f"fit {self.plan.name}", self.step, self.plan.settings.steps, **values)

    def fold(self) -> None:
        """Fold the scale into the weights, so that they take vectors in the hook's own units."""
        self._trainer.set_final_sae_metadata()
        if self._sparse:  # it keeps the encoder transposed in memory
            self.sae.W_enc.data = self.sae.W_enc.data.contiguous()
        self.sae.fold_activation_norm_scaling_factor(self.scale)
        self._trainer.activation_scaler.scaling_factor = None

    def save(self) -> None:
        """Write checkpoint and curves, where the plan has a folder.

        Raises:
            RunError: The disk refuses; the checkpoint before this one is still there.
        """
        folder, state = self.plan.folder, self._trainer
        if folder is None:
            return
        moments = {
            f"adam/{name}/{key}": value
            for name, parameter in self.sae.named_parameters()
            for key, value in state.optimizer.state[parameter].items()
        }
        counters = {f"trainer/{name}": getattr(state, name) for name in _COUNTERS}
        weights = {f"weights/{k}": v for k, v in self.sae.state_dict().items()}
        facts = {
            "digest": self.plan.digest,
            "scale": self.scale,
            "seconds": self.seconds,
            "settled_step": self.settled_step,
            "lr": state.optimizer.param_groups[0]["lr"],
            "lr_scheduler": state.lr_scheduler.state_dict(),
            "coefficients": {k: v.state_dict() for k, v in state.coefficient_schedulers.items()},
            **{name: getattr(state, name) for name in _NUMBERS},
        }
        # the curves first: rows past the checkpoint are dropped when it is resumed
        write_curves(folder, self.curves.table())
        tensors = {**weights, **moments, **counters}
        content = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        with atomic_file(folder / CHECKPOINT) as temporary:
            save_file(content, temporary, metadata={"facts": json.dumps(facts)})

    @torch.no_grad()
    def resume(self) -> None:
        """Resume from the checkpoint in the plan's folder, if there is one.

        Raises:
            DictionaryError: It is damaged, or of another fit.
        """
        path = None if self.plan.folder is None else self.plan.folder / CHECKPOINT
        if path is None or not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                facts = json.loads((file.metadata() or {})["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = facts["digest"]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise _cannot_resume(path, error) from error
        if digest != self.plan.digest:
            raise DictionaryError(
                f"{path}: was made with other settings, another seed or other vectors; restore "
                "them, choose another folder, or remove the file to start again"
            )
        try:
            self._restore(tensors, facts)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _cannot_resume(path, error) from error
        self.curves.resume(path.parent, self.step)

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        state, device = self._trainer, self.sae.device
        named = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.sae.load_state_dict(
            {k.removeprefix("weights/"): v for k, v in named.items() if k.startswith("weights/")}
        )
        for name, parameter in self.sae.named_parameters():
            moments = {k: named[f"adam/{name}/{k}"] for k in ("exp_avg", "exp_avg_sq")}
            state.optimizer.state[parameter] = {
                "step": tensors[f"adam/{name}/step"],  # on the CPU wherever the SAE is
                # laid out in memory as their parameter is, or Adam's sums would round otherwise
                **{k: torch.empty_like(parameter).copy_(v) for k, v in moments.items()},
            }
        for name in _COUNTERS:
            setattr(state, name, named[f"trainer/{name}"])
        for name in _NUMBERS:
            setattr(state, name, facts[name])
        state.lr_scheduler.load_state_dict(facts["lr_scheduler"])
        for name, schedule in facts["coefficients"].items():
            state.coefficient_schedulers[name].load_state_dict(schedule)
        state.optimizer.param_groups[0]["lr"] = facts["lr"]
        self.scale = state.activation_scaler.scaling_factor = facts["scale"]
        self.seconds, self.settled_step = facts["seconds"], facts.get("settled_step")


def _cannot_resume(path: Path, error: Exception) -> DictionaryError:
    return DictionaryError(
        f"{path}: cannot resume from this checkpoint ({error}); remove it to start again"
    )


@torch.no_grad()
def _measured(output: Any) -> StepResult:
    """Return what sae-lens' own step says of its batch."""
    error = float((output.sae_in - output.sae_out).double().square().sum())
    n_active = int(output.feature_acts.count_nonzero())
    return StepResult(output.sae_in, float(output.loss), error, n_active)


def train_all(
    fits: Sequence[SaeFit],
    source: VectorSource,
    *,
    checkpoint_every_steps: int | None,
    progress: Progress,
) -> dict[str, DictionaryError]:
    """Take every step that is left of every fit, in one pass over the vectors.

    A fit whose loss breaks is dropped and the others are trained to their end.

    Returns:
        What broke, by the name of the plan.

    Raises:
        DictionaryError: A batch holds NaN or infinite values.
        TrainingStopped: SIGTERM arrived; what has a folder is saved.
        KeyboardInterrupt: Ctrl-C arrived; what has a folder is saved.
    """
    broken: dict[str, DictionaryError] = {}
    left = [fit for fit in fits if not fit.is_done]
    if not left:
        return broken
    first = min(fit.step for fit in left)  # the one that is furthest behind
    with stop_requests() as request:
        for number, batch in enumerate(source.batches(first), start=first):
            for fit in [fit for fit in left if fit.step == number]:
                try:
                    fit.take_step(batch[fit.plan.hook], progress)
                except DictionaryError as error:
                    broken[fit.plan.name] = error
                    left.remove(fit)
            left = [fit for fit in left if not fit.is_done]
            stop = request.signal if left else None
            if stop or (checkpoint_every_steps and (number + 1) % checkpoint_every_steps == 0):
                for fit in left:
                    if fit.step == number + 1:
                        fit.save()
            if stop == signal.SIGINT:
                raise KeyboardInterrupt
            if stop:
                kept = all(fit.plan.folder for fit in left)
                raise TrainingStopped(
                    f"fit: stopped by SIGTERM after step {number + 1}; "
                    + (
                        "everything is saved, the same call resumes from here"
                        if kept
                        else "nothing is saved, because no folder was given"
                    )
                )
            if not left:
                break
    return broken


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint that a finished fit no longer needs."""
    for name in (CHECKPOINT, CHECKPOINT + ".tmp"):
        (folder / name).unlink(missing_ok=True)


class Curves:
    """What a fit logs: rows in memory, of which `write_curves` makes a complete file."""

    schema = pa.schema(
        [
            ("step", pa.int64()),
            ("metric", pa.string()),
            ("metric_version", pa.int16()),
            ("value", pa.float64()),
            ("n_tokens", pa.int64()),
            ("seconds", pa.float64()),
        ]
    )

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []

    def add(self, step: int, values: dict[str, float], n_tokens: int, seconds: float) -> None:
        """Append what was measured after a step on `n_tokens` vectors; NaN is left out."""
        for name, value in values.items():
            if not math.isnan(value):
                self._rows.append(
                    {
                        "step": step,
                        "metric": name,
                        "metric_version": METRICS[name].version,
                        "value": value,
                        "n_tokens": n_tokens,
                        "seconds": seconds,
                    }
                )

    def mean(self, name: str, after: int, until: int) -> float:
        """Return the mean of what was logged after one step and until another; NaN for nothing."""
        values = [
            float(str(row["value"]))
            for row in self._rows
            if row["metric"] == name and after < int(str(row["step"])) <= until
        ]
        return sum(values) / len(values) if values else math.nan

    def table(self) -> pa.Table:
        """Return all rows as a table."""
        return pa.Table.from_pylist(self._rows, schema=self.schema)

    def resume(self, folder: Path, step: int) -> None:
        """Take over the rows that an earlier process wrote up to a step; later ones are dropped."""
        table = read_curves(folder)
        if table is not None:
            self._rows = [row for row in table.to_pylist() if row["step"] <= step]


def read_curves(folder: Path) -> pa.Table | None:
    """Return the curves in a folder, or None where there are none.

    Raises:
        DictionaryError: They are damaged.
    """
    path = folder / CURVES
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        return table.cast(Curves.schema)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DictionaryError(
            f"{path}: no curves that can be read ({error}); remove it: the dictionary needs it not"
        ) from error


def write_curves(folder: Path, table: pa.Table) -> None:
    """Write `metrics.parquet` atomically."""
    with atomic_file(folder / CURVES) as temporary:
        pq.write_table(table, temporary)


@dataclass(frozen=True)
class FirstBatches:
    """What the first batches say, before any step is taken."""

    scales: dict[str, float]
    """By hook: sqrt(d_in) over the mean norm."""
    probes: dict[str, Tensor]
    """By hook: the first batch, on which a finished fit is checked."""


def read_first_batches(source: VectorSource) -> FirstBatches:
    """Read the first batches of the seeded order.

    Raises:
        DictionaryError: All vectors of a hook are zero, NaN or infinite.
    """
    n_batches = min(SCALING_BATCHES, -(-source.n_tokens // source.batch_tokens))
    sums, n = dict.fromkeys(source.widths, 0.0), 0
    probes: dict[str, Tensor] = {}
    for number, batch in enumerate(source.batches()):
        if number == n_batches:
            break
        probes = probes or {hook: x.clone() for hook, x in batch.items()}
        n += len(next(iter(batch.values())))
        for hook, x in batch.items():
            sums[hook] += float(x.norm(dim=-1).double().sum())
    for hook, total in sums.items():
        if total == 0.0:
            raise DictionaryError(f"{hook or 'vectors'}: the first {n} vectors are all zero")
    scales = {hook: math.sqrt(d) * n / sums[hook] for hook, d in source.widths.items()}
    return FirstBatches(scales, probes)


def check_enough(source: VectorSource, name: str, steps: int, d_sae: int) -> None:
    """Check that there are vectors enough to learn from.

    Raises:
        DictionaryError: There are fewer than one per latent, or the steps repeat each more than
            `MOST_EPOCHS` times.
    """
    n, wanted = source.n_tokens, steps * source.batch_tokens
    if n < d_sae:
        raise DictionaryError(
            f"{name}: {n:,} different vectors for {d_sae:,} latents; want at least one per latent: "
            "capture more tokens, or lower d_sae"
        )
    if wanted > MOST_EPOCHS * n:
        raise DictionaryError(
            f"{name}: {steps:,} steps of {source.batch_tokens:,} vectors go {wanted / n:,.0f} "
            f"times over the {n:,} vectors there are (one epoch); want at most {MOST_EPOCHS:,} "
            "epochs: capture more tokens, or take at most "
            f"{MOST_EPOCHS * n // source.batch_tokens:,} steps"
        )


def fit_result(
    name: str,
    settings: Any,
    x: Float[Tensor, "n d_in"],
    acts: Float[Tensor, "n d_sae"],
    reconstruction: Float[Tensor, "n d_in"],
    dead_fraction: float,
) -> dict[str, float]:
    """Return what a finished fit makes of a batch in the hook's own units: l0, fvu, dead share.

    Raises:
        DictionaryError: All latents are dead, or the reconstruction is worse than the mean vector.
    """
    values = {
        "l0": float(acts.count_nonzero()) / len(acts),
        "fvu": fvu(float((x - reconstruction).double().square().sum()), variation(x)),
        "dead_fraction": dead_fraction,
    }
    fault = None
    if values["dead_fraction"] == 1.0 or values["l0"] == 0.0:
        fault = "all latents are dead"
    elif not values["fvu"] <= 1.0:
        fault = f"FVU is {values['fvu']:.3g}: worse than the mean vector"
    if fault is None:
        return values
    advice = [f"more steps (now {settings.steps:,})", f"another lr (now {settings.lr:g})"]
    if getattr(settings, "coefficient", None):
        advice.append(f"a smaller coefficient (now {settings.coefficient:g})")
    if getattr(settings, "k", None):
        advice.append(f"a larger k (now {settings.k})")
    if getattr(settings, "target_l0", None):
        advice.append(f"a larger target_l0 (now {settings.target_l0:g})")
    if settings.scaling == "none":
        advice.append("scaling='norm'")
    raise DictionaryError(f"{name}: after the fit {fault}; try {', '.join(advice)}")


def variation(x: Float[Tensor, "n d"]) -> float:
    """Return the sum of the squared distances of vectors from their mean."""
    exact = x.double()
    return float((exact - exact.mean(0)).square().sum())
