"""Watches the training loss: NaN or divergence stops a run with what to change."""

import math

from torch import nn

from lmmono.errors import TrainingDiverged
from lmmono.models.storage import odd_weights
from lmmono.recipe.sections import Train

SMOOTHING = 0.9  # the mean is over about ten steps: one odd batch stops nothing
WORSE_THAN_GUESSING_NATS = 1.0


class LossWatch:
    """Follows a smoothed loss and stops what cannot become a model.

    Diverged means: the smoothed loss is more than one nat above ln(d_vocab), the loss of guessing
    every token alike, where training starts.
    """

    def __init__(self, d_vocab: int, smooth_loss: float | None) -> None:
        self.limit = math.log(d_vocab) + WORSE_THAN_GUESSING_NATS
        self.smooth_loss = smooth_loss

    def require_finite(
        self, losses: list[float], first_step: int, model: nn.Module, train: Train
    ) -> None:
        """Check the losses in nats per token of steps `first_step`, `first_step + 1`, ...

        Raises:
            TrainingDiverged: one is NaN or infinite; says at which step and what to change.
        """
        for step, loss in enumerate(losses, start=first_step):
            if not math.isfinite(loss):
                raise TrainingDiverged(_message(f"loss became {loss}", step, model, train))

    def follow(self, losses: list[float], first_step: int, model: nn.Module, train: Train) -> None:
        """Take finite losses into the smoothed one.

        Raises:
            TrainingDiverged: they diverge; says at which step and what to change.
        """
        for step, loss in enumerate(losses, start=first_step):
            before = loss if self.smooth_loss is None else self.smooth_loss
            self.smooth_loss = SMOOTHING * before + (1 - SMOOTHING) * loss
            if self.smooth_loss > self.limit:
                guessing = self.limit - WORSE_THAN_GUESSING_NATS
                what = f"loss diverged to {self.smooth_loss:.2f} nats (guessing: {guessing:.2f})"
                raise TrainingDiverged(_message(what, step, model, train))


def _message(what: str, step: int, model: nn.Module, train: Train) -> str:
    """Say what went wrong, where, and the ways out."""
    broken = odd_weights(model)
    where = f"; first broken parameter: {broken[0]}" if broken else ""
    return (
        f"{what} at step {step}{where}. Lower train.lr (now {train.lr:g}), raise "
        f"train.warmup_steps (now {train.warmup_steps}) or lower train.clip_norm (now "
        f"{train.clip_norm:g}); with bf16, try train.precision=fp32. The last checkpoint is kept."
    )
