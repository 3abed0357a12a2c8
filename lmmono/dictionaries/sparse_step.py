"""A training step of topk and batchtopk that computes active (token, latent) pairs only.

sae-lens multiplies dense matrices six times a step: encode, decode, and four times backwards. Of
those only the encoder's product needs all latents; in the others all but k of d_sae terms are zero.
Here the encoder's product is dense, and the rest goes pair by pair. The sums are those of sae-lens
(the loss for dead latents included), so weights agree up to rounding; the classes, the optimizer,
the schedules and the counters are sae-lens' own. CPU and float32 only.

A decoder norm multiplies a pre-activation before the choice and divides the act after it. Its two
gradients cancel, so the act is ReLU(pre-activation) and the norm decides the choice alone.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmmono.dictionaries import sparse_kernels as kernels

GUESS = 0.95
"""Share of the last batch's smallest act from which on batchtopk looks for this batch's."""


class Scratch:
    """Memory that steps use again, one array for each name."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def take(self, name: str, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        """Return an array with whatever it held before; valid until the name is taken again."""
        size = int(np.prod(shape))
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)


@dataclass(frozen=True)
class Pairs:
    """Active pairs, token by token."""

    starts: np.ndarray
    """[n + 1]: the pairs of token i are starts[i] to starts[i + 1]."""
    latents: np.ndarray
    """[pairs]."""
    values: np.ndarray
    """[pairs]: ReLU(x W_enc + b_enc), before any norm; those of zero stand for nothing."""


@dataclass(frozen=True)
class StepResult:
    """What a step says of its batch."""

    x: Tensor
    """[n, d_in], in scaled units."""
    loss: float
    """The loss that was stepped on."""
    squared_error: float
    """Sum over the batch of the squared error of the reconstruction."""
    n_active: int
    """Pairs with an act above zero."""


class SparseStep:
    """The step of one `SAETrainer` whose SAE is topk or batchtopk."""

    def __init__(self, trainer: Any, scratch: Scratch) -> None:
        self._trainer, self._sae, self._scratch = trainer, trainer.sae, scratch
        self._guess = 0.0
        trainer.optimizer.param_groups[0]["fused"] = True
        encoder = self._sae.W_enc
        encoder.data = encoder.data.T.contiguous().T  # a latent's weights side by side

    def take(self, batch: Float[Tensor, "n d_in"]) -> StepResult:
        """Do what `SAETrainer.step` does with a batch, up to rounding."""
        made, sae = self._trainer, self._sae
        made.n_training_samples += len(batch)
        x = made.activation_scaler(batch).contiguous()
        dead = made.dead_neurons
        with torch.no_grad():
            result, fired = self._set_gradients(x, dead)
        made.n_forward_passes_since_fired += 1
        made.n_forward_passes_since_fired[fired > 0] = 0
        made.act_freq_scores += fired
        made.n_frac_active_samples += made.cfg.train_batch_size_samples
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        made.optimizer.step()
        made.optimizer.zero_grad()
        made.lr_scheduler.step()
        return result

    def _set_gradients(self, x: Tensor, dead: Tensor) -> tuple[StepResult, Tensor]:
        sae, take = self._sae, self._scratch.take
        n, d_in, d_sae = len(x), sae.cfg.d_in, sae.cfg.d_sae
        centred = x - sae.b_dec
        pre = take("pre", n, d_sae)
        torch.mm(centred, sae.W_enc, out=torch.from_numpy(pre))
        pairs = self._choose(pre)
        error, squared = take("error", n, d_in), take("squared", n)
        w_dec, b_dec = sae.W_dec.numpy(), sae.b_dec.numpy()
        _shared(
            n,
            lambda a, b: kernels.decode(
                *(pairs.starts, pairs.latents, pairs.values, w_dec, b_dec, x.numpy()),
                *(a, b, error, squared),
            ),
        )
        errors = torch.from_numpy(error)
        total = float(squared.sum(dtype=np.float64))
        loss = total / n
        dead_loss = self._dead_gradients(pre, errors, dead) if dead.any() else None
        fired = self._pair_gradients(pairs, centred, errors.mul_(2.0 / n))
        if dead_loss is not None:
            loss += dead_loss.add(centred, sae)
        sae.b_dec.grad = errors.sum(0) - sae.W_enc @ sae.b_enc.grad
        return StepResult(x, loss, total, int(fired.sum())), fired

    def _choose(self, pre: np.ndarray) -> Pairs:
        sae = self._sae
        bias, norm = sae.b_enc.numpy(), sae.W_dec.norm(dim=-1).numpy()
        if sae.cfg.architecture() == "batchtopk":
            return self._choose_in_batch(pre, bias, norm)
        n, k = len(pre), sae.cfg.k
        latents = self._scratch.take("latents", n, k, dtype=np.int32)
        values = self._scratch.take("values", n, k)
        _shared(n, lambda a, b: kernels.choose_in_rows(pre, bias, norm, k, a, b, latents, values))
        return Pairs(np.arange(0, n * k + 1, k), latents.reshape(-1), values.reshape(-1))

    def _choose_in_batch(self, pre: np.ndarray, bias: np.ndarray, norm: np.ndarray) -> Pairs:
        """Keep the int(k n) largest acts of the batch and move sae-lens' running threshold."""
        n, wanted = len(pre), int(self._sae.cfg.k * len(pre))
        least, starts = self._guess, self._starts(pre, bias, norm, self._guess)
        while starts[-1] < wanted and least > 0.0:
            least = 0.8 * least if least > 1e-6 else 0.0
            starts = self._starts(pre, bias, norm, least)
        latents = self._scratch.take("latents", int(starts[-1]), dtype=np.int32)
        acts = self._scratch.take("acts", int(starts[-1]))
        _shared(
            n,
            lambda a, b: kernels.take_above(pre, bias, norm, least, a, b, starts, latents, acts),
        )
        many = len(acts) > wanted
        smallest = np.partition(acts, len(acts) - wanted)[len(acts) - wanted] if many else 0.0
        kept, smallest = kernels.keep_largest(starts, latents, acts, smallest, wanted)
        if kept:
            self._guess = GUESS * smallest
            self._sae.update_topk_threshold(torch.tensor([smallest], dtype=torch.float32))
        values = self._scratch.take("values", kept)
        _shared(n, lambda a, b: kernels.values_of(pre, bias, starts, latents, a, b, values))
        return Pairs(starts, latents[:kept], values)

    def _starts(
        self, pre: np.ndarray, bias: np.ndarray, norm: np.ndarray, least: float
    ) -> np.ndarray:
        """Return where each row's pairs begin if all acts above `least` are taken."""
        counts = self._scratch.take("counts", len(pre), dtype=np.int64)
        _shared(len(pre), lambda a, b: kernels.count_above(pre, bias, norm, least, a, b, counts))
        return np.concatenate([[0], np.cumsum(counts)])

    def _pair_gradients(self, pairs: Pairs, centred: Tensor, grad: Tensor) -> Tensor:
        """Set the gradients of all but the decoder bias; return how often each latent fired."""
        sae, take = self._sae, self._scratch.take
        d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae
        bounds = take("bounds", d_sae + 1, dtype=np.int64)
        tokens = take("tokens", len(pairs.values), dtype=np.int32)
        values = take("sorted", len(pairs.values))
        kernels.by_latent(pairs.starts, pairs.latents, pairs.values, bounds, tokens, values)
        d_enc, d_dec = take("d_enc", d_sae, d_in), take("d_dec", d_sae, d_in)
        d_bias = take("d_bias", d_sae)
        x, g, w_dec = centred.numpy(), grad.numpy(), sae.W_dec.numpy()
        _shared(
            d_sae,
            lambda a, b: kernels.gradients(
                bounds, tokens, values, w_dec, g, x, a, b, d_enc, d_dec, d_bias
            ),
        )
        sae.W_enc.grad = torch.from_numpy(d_enc).T
        sae.W_dec.grad = torch.from_numpy(d_dec)
        sae.b_enc.grad = torch.from_numpy(d_bias)
        return torch.from_numpy(np.diff(bounds))

    def _dead_gradients(self, pre: np.ndarray, error: Tensor, dead: Tensor) -> "DeadGradients":
        """Return the gradients of sae-lens' `calculate_topk_aux_loss`."""
        sae = self._sae
        where = dead.nonzero().squeeze(-1)
        n, n_dead, k = len(pre), len(where), sae.cfg.d_in // 2
        scale = sae.cfg.aux_loss_coefficient * min(n_dead / k, 1.0)
        k = min(k, n_dead)
        values = torch.from_numpy(pre)[:, where] + sae.b_enc[where]
        w_dec = sae.W_dec[where]
        if k < n_dead:
            chosen = (values * w_dec.norm(dim=-1)).topk(k, sorted=False).indices
            mask = torch.zeros_like(values).scatter_(-1, chosen, 1.0)
            values = values * mask
        else:
            mask = None
        rest = values @ w_dec + error  # the residual is x - reconstruction
        loss = scale * rest.square().sum(-1).mean()
        rest *= 2.0 * scale / n
        slopes = rest @ w_dec.T
        if mask is not None:
            slopes *= mask
        return DeadGradients(where, loss, values.T @ rest, slopes)


@dataclass(frozen=True)
class DeadGradients:
    """Gradients of the loss that lets dead latents model the residual."""

    where: Tensor
    """Which latents are dead."""
    loss: Tensor
    d_dec: Tensor
    """[n_dead, d_in]."""
    slopes: Tensor
    """[n, n_dead], of the pre-activations."""

    def add(self, centred: Tensor, sae: Any) -> float:
        """Add them to those of the SAE and return the loss."""
        sae.W_dec.grad.index_add_(0, self.where, self.d_dec)
        sae.W_enc.grad.T.index_add_(0, self.where, self.slopes.T @ centred)
        sae.b_enc.grad.index_add_(0, self.where, self.slopes.sum(0))
        return float(self.loss)


def _shared(n: int, part: Callable[[int, int], None]) -> None:
    """Do `part(first, last)` over 0 to n, on as many threads as torch has."""
    threads = torch.get_num_threads()
    if threads == 1:
        part(0, n)
        return
    edges = np.linspace(0, n, 4 * threads + 1).astype(int).tolist()
    list(_pool(threads).map(part, edges[:-1], edges[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparse-step")
