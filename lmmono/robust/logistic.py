"""Multinomial logistic regression of many problems over the same rows, and over all L2 penalties.

The objective is scikit-learn's: sum of cross entropies + l2 / 2 |weight|^2, the bias free, so `l2`
is its 1 / C. Problems are solved together by L-BFGS in the coordinates of `basis`, each going down
its path of penalties at its own pace: one that has converged writes its weights down and goes on
to the next penalty, taking its curvature along. An iteration costs one product of the direction
with the rows and one of the residual with the rows, 4 n d (classes - 1) operations, whatever the
line search tries: it moves along logits that are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmmono.robust.basis import Basis, basis

L2_PATH = tuple(float(10 ** (4 - 8 * i / 9)) for i in range(10))
"""Penalties from strong to weak: 1 / C of scikit-learn's LogisticRegressionCV."""

TOLERANCE = 3e-5
"""Root mean square of the mean loss' gradient at which a fit has converged.

The largest part is about three times that: scikit-learn's default of 1e-4.
"""

MAX_ITERATIONS = 500
"""Iterations at one penalty; more are not spent."""

HISTORY = 8
"""Steps whose curvature is remembered."""

AT_ONCE = 128
"""Problems solved together: their logits stay near the processor."""

LINE_TRIALS = 12


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Probes of each problem at each penalty, in the coordinates of a basis."""

    basis: Basis
    l2: tuple[float, ...]
    """Penalties, from strong to weak."""
    turned: Float[Tensor, "p l k r1"]
    """Weights against the last class, in the basis."""
    n_iterations: Int64[Tensor, "p l"]
    """Iterations spent at each penalty; `max_iterations` where the fit has not converged."""

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.turned.shape[2] + 1

    def weights(
        self, at: Int64[Tensor, "p"] | None = None
    ) -> tuple[Float[Tensor, "*p_l c d"], Float[Tensor, "*p_l c"]]:
        """Return weights and biases on the features as they came, with sum zero over classes.

        Args:
            at: One penalty per problem, by index; None: all.
        """
        turned = self.turned if at is None else self.turned[torch.arange(len(at)), at]
        return self.basis.back(_all_classes(turned))

    def log_probabilities(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "p l m c"]:
        """Return the log-probabilities of rows at each penalty."""
        p, n_l2, k, r1 = self.turned.shape
        logits = self.turned.reshape(-1, r1) @ self.basis.of(x).T
        logits = logits.reshape(p, n_l2, k, len(x)).movedim(2, 3)
        return torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1).log_softmax(dim=-1)


def fit_path(
    x: Float[Tensor, "n d"] | Basis,
    y: Int64[Tensor, "p n"],
    *,
    n_classes: int,
    l2: Sequence[float] = L2_PATH,
    standardise: bool = True,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Path:
    """Fit every problem at every penalty.

    Args:
        x: Rows, or their basis; float64 rows are fitted in float64.
        y: Labels of each problem, 0 to n_classes - 1.
        n_classes: Number of classes.
        l2: Penalties, from strong to weak.
        standardise: Divide each dimension by its standard deviation first.
        tolerance: Root mean square of the mean loss' gradient at which a fit has converged.
        max_iterations: Iterations at one penalty after which it is left as it is.
    """
    assert list(l2) == sorted(l2, reverse=True) and l2[-1] > 0, l2
    on = x if isinstance(x, Basis) else basis(x, standardise=standardise)
    fits = [
        _Fit.start(on, part, n_classes, l2, tolerance, max_iterations).run()
        for part in y.split(AT_ONCE)
    ]
    weights, iterations = zip(*fits, strict=True)
    return Path(on, tuple(l2), torch.cat(weights), torch.cat(iterations))


def _all_classes(
    turned: Float[Tensor, "*batch k r1"],
) -> Float[Tensor, "*batch c r1"]:
    """Return weights of all classes, with sum zero, from those against the last class."""
    whole = torch.cat([turned, torch.zeros_like(turned[..., :1, :])], dim=-2)
    return whole - whole.mean(dim=-2, keepdim=True)


def _probabilities(logits: Float[Tensor, "p k n"]) -> Float[Tensor, "p k n"]:
    """Return the probabilities of all classes but the last, whose logit is 0."""
    if logits.shape[1] == 1:
        return logits.sigmoid()
    top = logits.amax(dim=1, keepdim=True).clamp_min_(0)
    powers = (logits - top).exp_()
    return powers.div_(powers.sum(dim=1, keepdim=True).add_(top.neg_().exp_()))


def _dot(a: Float[Tensor, "p m"], b: Float[Tensor, "p m"]) -> Float[Tensor, "p"]:
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


@dataclass(slots=True, eq=False)
class _Fit:
    """A set of problems on their way down the path; finished ones leave it."""

    on: Basis
    l2: Tensor
    tolerance: float
    max_iterations: int
    found: Float[Tensor, "p0 l k r1"]
    iterations: Int64[Tensor, "p0 l"]
    free: Float[Tensor, "r1"]
    """1 for penalised coordinates, 0 for the bias."""
    names: Int64[Tensor, "p"]
    """Place of each problem in `found`."""
    at: Int64[Tensor, "p"]
    """Index of its penalty."""
    spent: Int64[Tensor, "p"]
    target: Float[Tensor, "p k r1"]
    weight: Float[Tensor, "p k r1"]
    logits: Float[Tensor, "p k n"]
    gradient: Float[Tensor, "p k r1"]
    """Gradient of the cross entropies."""
    scale: Float[Tensor, "p"]
    """Mean curvature of the loss, by which the diagonal bound is scaled."""
    steps: list[Tensor]
    changes: list[Tensor]
    """Differences of weights and of gradients (at the present penalty), newest last."""
    inverses: list[Tensor]
    """1 / (step . change)."""

    @classmethod
    def start(
        cls,
        on: Basis,
        y: Int64[Tensor, "p n"],
        n_classes: int,
        l2: Sequence[float],
        tolerance: float,
        max_iterations: int,
    ) -> "_Fit":
        """Return the problems at weights of zero and the strongest penalty."""
        (p, n), k, r1 = y.shape, n_classes - 1, len(on.squares)
        new = on.rows.new_zeros
        present = (y[:, None] == torch.arange(k)[:, None]).to(on.rows.dtype)
        target = (present.reshape(p * k, n) @ on.rows).reshape(p, k, r1)
        even = on.rows.sum(dim=0) / n_classes
        free = torch.ones_like(on.squares)
        free[-1] = 0
        counts = torch.zeros(p, dtype=torch.long)
        return cls(
            on, torch.tensor(l2, dtype=on.rows.dtype), tolerance, max_iterations,
            new(p, len(l2), k, r1), torch.zeros(p, len(l2), dtype=torch.long), free,
            torch.arange(p), counts, counts.clone(), target, new(p, k, r1), new(p, k, n),
            even - target, torch.full((p,), 1 / n_classes, dtype=on.rows.dtype), [], [], [],
        )  # fmt: skip

    def run(self) -> tuple[Float[Tensor, "p0 l k r1"], Int64[Tensor, "p0 l"]]:
        """Solve all problems and return their weights and iterations."""
        while len(self.names):
            total = self._total_gradient()
            done = self._is_converged(total)
            if done.any():
                self._write_down(done)
                self._drop_finished()
                continue
            self._step(total)
        return self.found, self.iterations

    def _penalty(self) -> Float[Tensor, "p 1 r1"]:
        return self.l2[self.at][:, None, None] * self.free

    def _total_gradient(self) -> Float[Tensor, "p k r1"]:
        mean = self.weight.sum(dim=1, keepdim=True) / (self.weight.shape[1] + 1)
        return torch.addcmul(self.gradient, self._penalty(), self.weight - mean)

    def _is_converged(self, total: Float[Tensor, "p k r1"]) -> Tensor:
        size = total.square().mean(dim=(1, 2)).sqrt() / len(self.on.rows)
        return (size <= self.tolerance) | (self.spent >= self.max_iterations)

    def _write_down(self, done: Tensor) -> None:
        """Note the weights of converged problems and move them to their next penalty."""
        names, at = self.names[done], self.at[done]
        self.found[names, at] = self.weight[done]
        self.iterations[names, at] = self.spent[done]
        self.spent[done] = 0
        before = self._penalty()
        self.at = torch.where(done, self.at + 1, self.at)
        going = self.at < len(self.l2)
        self.at, last = self.at.clamp_max(len(self.l2) - 1), self.at
        by = (self._penalty() - before)[:, :, :]
        for i, step in enumerate(self.steps):
            s = step.view_as(self.weight)
            mean = s.sum(dim=1, keepdim=True) / (s.shape[1] + 1)
            self.changes[i] += (by * (s - mean)).view_as(step)
            self.inverses[i] = _inverse(step, self.changes[i])
        p = _probabilities(self.logits[done])
        rest = 1 - p.sum(dim=1)
        uneven = 1 - (p.square().sum(dim=1) + rest.square()).mean(dim=1)
        self.scale[done] = (uneven / p.shape[1]).clamp_min(1e-3)
        self.at = last
        assert going.numel()

    def _drop_finished(self) -> None:
        going = self.at < len(self.l2)
        if going.all():
            return
        for name in ("names", "at", "spent", "target", "weight", "logits", "gradient", "scale"):
            setattr(self, name, getattr(self, name)[going])
        for name in ("steps", "changes", "inverses"):
            setattr(self, name, [part[going] for part in getattr(self, name)])

    def _step(self, total: Float[Tensor, "p k r1"]) -> None:
        """Move every problem along its direction."""
        p, k, r1 = total.shape
        direction = self._direction(total)
        along = (direction.view(p * k, r1) @ self.on.rows.T).view(p, k, -1)
        length, probabilities = self._line_search(total, direction, along)
        step = direction.mul_(length[:, None, None])
        self.logits.addcmul_(along, length[:, None, None])
        self.weight += step
        gradient = (probabilities.view(p * k, -1) @ self.on.rows).view(p, k, r1) - self.target
        mean = step.sum(dim=1, keepdim=True) / (k + 1)
        change = gradient - self.gradient + self._penalty() * (step - mean)
        self.gradient = gradient
        self.spent += 1
        self.steps.append(step.view(p, -1))
        self.changes.append(change.view(p, -1))
        self.inverses.append(_inverse(self.steps[-1], self.changes[-1]))
        if len(self.steps) > HISTORY:
            del self.steps[0], self.changes[0], self.inverses[0]

    def _direction(self, total: Float[Tensor, "p k r1"]) -> Float[Tensor, "p k r1"]:
        """Return the direction of L-BFGS, its first guess the diagonal bound."""
        left = total.reshape(len(total), -1).clone()
        shares: list[Tensor] = []
        pairs = list(zip(self.steps, self.changes, self.inverses, strict=True))
        for step, change, inverse in reversed(pairs):
            shares.append(inverse * _dot(step, left))
            left.addcmul_(change, shares[-1][:, None], value=-1)
        guess = left.view_as(total)
        guess = guess + guess.sum(dim=1, keepdim=True)
        guess /= self.scale[:, None, None] * self.on.squares + self._penalty()
        way = guess.view(len(total), -1)
        for (step, change, inverse), share in zip(pairs, reversed(shares), strict=True):
            way.addcmul_(step, (share - inverse * _dot(change, way))[:, None])
        return way.view_as(total).neg_()

    def _line_search(
        self,
        total: Float[Tensor, "p k r1"],
        direction: Float[Tensor, "p k r1"],
        along: Float[Tensor, "p k n"],
    ) -> tuple[Float[Tensor, "p"], Float[Tensor, "p k n"]]:
        """Return step lengths and the probabilities there; slopes decide, the loss is convex."""
        p = len(total)
        first = _dot(total.reshape(p, -1), direction.view(p, -1))
        mean = direction.sum(dim=1, keepdim=True) / (direction.shape[1] + 1)
        drag = self._penalty() * (direction - mean)
        straight = _dot(drag.view(p, -1), self.weight.view(p, -1))
        straight -= _dot(self.target.view(p, -1), direction.view(p, -1))
        bend = _dot(drag.view(p, -1), direction.view(p, -1))
        length = torch.ones_like(first)
        probabilities = _probabilities(self.logits + along)
        todo = torch.arange(p)
        for trial in range(LINE_TRIALS):
            slope = _dot(probabilities[todo].view(len(todo), -1), along[todo].view(len(todo), -1))
            slope += straight[todo] + length[todo] * bend[todo]
            ratio = slope / first[todo]  # 1 at the start, 0 at the bottom, negative beyond it
            bad = (ratio < -0.3) | (ratio > 0.9)
            if not bad.any():
                break
            todo, ratio = todo[bad], ratio[bad]
            length[todo] *= (1 / (1 - ratio).clamp_min(0.1)).clamp(0.05, 10)
            assert trial < LINE_TRIALS
            moved = self.logits[todo] + length[todo, None, None] * along[todo]
            probabilities[todo] = _probabilities(moved)
        return length, probabilities


def _inverse(step: Float[Tensor, "p m"], change: Float[Tensor, "p m"]) -> Float[Tensor, "p"]:
    """Return 1 / (step . change), 0 where rounding left no curvature: the pair is then unused."""
    product = _dot(step, change)
    floor = torch.finfo(step.dtype).eps * _dot(step, step).sqrt() * _dot(change, change).sqrt()
    return torch.where(product > floor, 1 / product.where(product > floor, 1), 0)
