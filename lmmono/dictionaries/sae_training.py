"""Training sae-lens' SAEs on `Vectors`: one loop over one or many, exact to resume, safe to stop.

Batch k depends only on the vectors and k, and every SAE takes one step on each batch. So an SAE
that is trained beside others gets the bits it gets alone, and one that goes on from a checkpoint
gets the bits of one that never stopped (same machine, same number of threads).
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lmmono.dictionaries.architectures import trainer, training_sae
from lmmono.dictionaries.curves import Curves
from lmmono.dictionaries.fit_checkpoint import load_checkpoint, save_checkpoint
from lmmono.dictionaries.soundness import variation
from lmmono.dictionaries.sparse_step import Scratch, SparseStep, StepResult
from lmmono.dictionaries.vector_source import Vectors
from lmmono.errors import DictionaryError, TrainingStopped
from lmmono.files.signals import StopRequest, stop_requests
from lmmono.stats.formulas import fvu
from lmmono.types import Progress

LOG_ROWS = 100
"""Rows of each curve; reading a loss waits for the device."""


@dataclass(frozen=True)
class Plan:
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


class Training:
    """One SAE under training: sae-lens' trainer, the input's scale, and how far it has come.

    Attributes:
        sae: The sae-lens `TrainingSAE`, in scaled units until `fold`.
        scale: The input is multiplied by this number.
        step: Steps taken.
        seconds: Time spent in steps.
        curves: What was logged.
    """

    def __init__(
        self,
        plan: Plan,
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
        is_sparse = getattr(plan.settings, "sparse_step", False) and device == "cpu"
        self._sparse = SparseStep(self._trainer, scratch or Scratch()) if is_sparse else None
        self.seconds, self.curves = 0.0, Curves()
        self._log_every = max(1, plan.settings.steps // LOG_ROWS)

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
        return self.step >= self.plan.settings.steps

    def take_step(self, x: Float[Tensor, "n d_in"], progress: Progress) -> None:
        """Take one step on a batch in the hook's own units.

        Raises:
            DictionaryError: The loss became NaN or infinite.
        """
        began, settings = time.monotonic(), self.plan.settings
        if self.step == settings.steps - self._window:  # sae-lens reports L0 of this last window
            self._trainer.act_freq_scores.zero_()
            self._trainer.n_frac_active_samples = 0
        output = self._sparse.take(x) if self._sparse else self._trainer.step(x)
        self._trainer.n_training_steps += 1
        self.seconds += time.monotonic() - began
        if self.step % self._log_every == 0 or self.is_done:
            self._log(output if isinstance(output, StepResult) else _measured(output), progress)

    @property
    def _window(self) -> int:
        return min(self.plan.settings.dead_window_steps, self.plan.settings.steps)

    @property
    def dead_fraction(self) -> float:
        """Share of latents that did not fire in the last `dead_window_steps` steps, or so far."""
        window = min(self._window, self.step)
        return float((self._trainer.n_forward_passes_since_fired >= window).float().mean())

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
        self.curves.add(self.step, {**values, "lr": lr}, n, self.seconds)
        progress(f"fit {self.plan.name}", self.step, self.plan.settings.steps, **values)

    def save(self) -> None:
        """Write checkpoint and curves, where the plan has a folder."""
        if self.plan.folder is not None:
            self.curves.save(self.plan.folder)  # first: rows past the checkpoint are dropped again
            save_checkpoint(self.plan.folder, self._tensors(), self._facts())

    def resume(self) -> None:
        """Go on from the checkpoint in the plan's folder, if there is one.

        Raises:
            DictionaryError: It is damaged, or of another fit.
        """
        if self.plan.folder is None:
            return
        found = load_checkpoint(self.plan.folder, self.plan.digest)
        if found is not None:
            self._restore(*found)
            self.curves.resume(self.plan.folder, self.step)

    def fold(self) -> None:
        """Fold the scale into the weights, so that they take vectors in the hook's own units."""
        self._trainer.set_final_sae_metadata()
        if self._sparse:
            self.sae.W_enc.data = self.sae.W_enc.data.contiguous()
        self.sae.fold_activation_norm_scaling_factor(self.scale)
        self._trainer.activation_scaler.scaling_factor = None

    def _tensors(self) -> dict[str, Tensor]:
        made = self._trainer
        moments = {
            f"adam/{name}/{key}": value
            for name, parameter in self.sae.named_parameters()
            for key, value in made.optimizer.state[parameter].items()
        }
        counters = {f"trainer/{name}": getattr(made, name) for name in _COUNTERS}
        weights = {f"weights/{k}": v for k, v in self.sae.state_dict().items()}
        return {**weights, **moments, **counters}

    def _facts(self) -> dict[str, Any]:
        made = self._trainer
        return {
            "digest": self.plan.digest,
            "scale": self.scale,
            "seconds": self.seconds,
            "lr": made.optimizer.param_groups[0]["lr"],
            "lr_scheduler": made.lr_scheduler.state_dict(),
            "coefficients": {k: v.state_dict() for k, v in made.coefficient_schedulers.items()},
            **{name: getattr(made, name) for name in _NUMBERS},
        }

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        made = self._trainer
        device = self.sae.device
        named = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.sae.load_state_dict(
            {k.removeprefix("weights/"): v for k, v in named.items() if k.startswith("weights/")}
        )
        for name, parameter in self.sae.named_parameters():
            moments = {k: named[f"adam/{name}/{k}"] for k in ("exp_avg", "exp_avg_sq")}
            made.optimizer.state[parameter] = {
                "step": tensors[f"adam/{name}/step"],  # on the CPU wherever the SAE is
                # laid out in memory as their parameter is
                **{k: torch.empty_like(parameter).copy_(v) for k, v in moments.items()},
            }
        for name in _COUNTERS:
            setattr(made, name, named[f"trainer/{name}"])
        for name in _NUMBERS:
            setattr(made, name, facts[name])
        made.lr_scheduler.load_state_dict(facts["lr_scheduler"])
        for name, state in facts["coefficients"].items():
            made.coefficient_schedulers[name].load_state_dict(state)
        made.optimizer.param_groups[0]["lr"] = facts["lr"]
        self.scale = made.activation_scaler.scaling_factor = facts["scale"]
        self.seconds = facts["seconds"]


@torch.no_grad()
def _measured(output: Any) -> StepResult:
    """Return what sae-lens' own step says of its batch."""
    error = float((output.sae_in - output.sae_out).double().square().sum())
    n_active = int(output.feature_acts.count_nonzero())
    return StepResult(output.sae_in, float(output.loss), error, n_active)


_COUNTERS = ("act_freq_scores", "n_forward_passes_since_fired")
_NUMBERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")


def train_all(
    trainings: Sequence[Training],
    source: Vectors,
    *,
    checkpoint_every_steps: int | None,
    progress: Progress,
) -> dict[str, DictionaryError]:
    """Take every step that is left of every training, in one pass over the vectors.

    A training whose loss breaks is dropped and the others go on.

    Returns:
        What broke, by the name of the plan.

    Raises:
        DictionaryError: A batch holds NaN or infinite values.
        TrainingStopped: SIGTERM arrived; what has a folder is saved.
        KeyboardInterrupt: Ctrl-C arrived; what has a folder is saved.
    """
    broken: dict[str, DictionaryError] = {}
    left = [training for training in trainings if not training.is_done]
    first = min((training.step for training in left), default=0)
    with stop_requests() as request:
        for number, batch in _numbered(source, first if left else None):
            for training in [t for t in left if t.step == number]:
                try:
                    training.take_step(batch[training.plan.hook], progress)
                except DictionaryError as error:
                    broken[training.plan.name] = error
                    left.remove(training)
            left = [training for training in left if not training.is_done]
            _save_where_due(left, number + 1, checkpoint_every_steps, request)
            if not left:
                break
    return broken


def _numbered(source: Vectors, first: int | None) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield batches with their numbers; nothing where there is no first one."""
    if first is not None:
        yield from enumerate(source.batches(first), start=first)


def _save_where_due(
    left: Sequence[Training], step: int, every: int | None, request: StopRequest
) -> None:
    """Save the trainings under way when it is time, or when a signal asked for a stop."""
    stop = request.signal if left else None
    if stop or (every and step % every == 0):
        for training in left:
            if training.step == step:
                training.save()
    if stop == signal.SIGINT:
        raise KeyboardInterrupt
    if stop:
        kept = all(training.plan.folder for training in left)
        raise TrainingStopped(
            f"fit: stopped by SIGTERM after step {step}; "
            + ("all is saved, the same call goes on from here" if kept else "nothing is saved, ")
            + ("" if kept else "because no folder was given")
        )
