"""Multinomial logistic regression of many problems over the same rows, and over all L2 penalties.

The objective is scikit-learn's: sum of cross entropies + l2 / 2 |weight|^2, the bias free, so
`l2` is its 1 / C; of two classes the weight is one vector, the difference of theirs. Problems are
solved together by L-BFGS in the coordinates of `basis`, each going down its path of penalties at
its own pace: one that has converged writes its weights down and goes on to the next penalty,
taking its curvature along. An iteration costs one product of the direction with the rows and one
of the residual with the rows, 4 n d (classes - 1) operations, whatever the line search tries: it
moves along logits that are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmmono.probes.basis import Basis, basis

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
"""Step lengths tried."""

UPHILL, DOWNHILL = -0.3, 0.9
"""Slopes at which a step ends well, as shares of the slope at its start."""


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

    def at(self, which: Int64[Tensor, "p"]) -> "Path":
        """Return one penalty of each problem, by index; `l2` then is not that of all."""
        problems = torch.arange(len(which))
        turned = self.turned[problems, which][:, None]
        return replace(
            self, turned=turned, n_iterations=self.n_iterations[problems, which][:, None]
        )

    def weights(self) -> tuple[Float[Tensor, "p l c d"], Float[Tensor, "p l c"]]:
        """Return weights and biases on the features as they came, with sum zero over classes."""
        return self.basis.back(_all_classes(self.turned))

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
    weights: Float[Tensor, "p n"] | None = None,
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
        weights: Weight of each row in each problem, 0 to 1, as scikit-learn's `sample_weight`.
            Problems with few rows are solved faster on those rows alone.
        standardise: Divide each dimension by its standard deviation first.
        tolerance: Root mean square of the mean loss' gradient at which a fit has converged.
        max_iterations: Iterations at one penalty after which it is left as it is.
    """
    assert list(l2) == sorted(l2, reverse=True) and l2[-1] > 0, l2
    on = x if isinstance(x, Basis) else basis(x, standardise=standardise)
    size = [None] * len(y) if weights is None else weights.to(on.rows.dtype).split(AT_ONCE)
    fits = [
        _Fit.start(on, part, weight, n_classes, penalties(l2, n_classes).to(on.rows.dtype))
        for part, weight in zip(y.split(AT_ONCE), size, strict=False)
    ]
    done = [fit.run(tolerance, max_iterations) for fit in fits]
    turned, iterations = zip(*done, strict=True)
    return Path(on, tuple(l2), torch.cat(turned), torch.cat(iterations))


def penalties(l2: Sequence[float], n_classes: int) -> Float[Tensor, "l"]:
    """Return penalties of the weights of all classes, with sum zero, from those of scikit-learn.

    Of two classes it penalises the difference v of their weights, |v|^2 = 2 (|v/2|^2 + |-v/2|^2).
    """
    return torch.tensor(l2, dtype=torch.float64) * (2 if n_classes == 2 else 1)


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


def _curvature(probabilities: Float[Tensor, "p k n"]) -> Float[Tensor, "p"]:
    """Return the mean variance of the classes, 1 / c where all c are equally likely."""
    last = 1 - probabilities.sum(dim=1)
    alike = (probabilities.square().sum(dim=1) + last.square()).mean(dim=1)
    return ((1 - alike) / probabilities.shape[1]).clamp_min(1e-3)


def _centred(weight: Tensor) -> Tensor:
    """Return weights [p, k, r1] against the last class less their mean over all classes.

    This is what |weight|^2 / 2, all classes with sum zero, has as gradient.
    """
    return weight - weight.sum(dim=1, keepdim=True) / (weight.shape[1] + 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products [p] of rows [p, m]; as often called, without checks of shapes."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


@dataclass(slots=True, eq=False)
class _Fit:
    """A set of problems on their way down the path; finished ones leave it."""

    on: Basis
    l2: Float[Tensor, "l"]
    free: Float[Tensor, "r1"]
    """1 for penalised coordinates, 0 for the bias."""
    found: Float[Tensor, "p0 l k r1"]
    iterations: Int64[Tensor, "p0 l"]
    names: Int64[Tensor, "p"]
    """Place of each problem in `found`."""
    at: Int64[Tensor, "p"]
    """Index of its penalty."""
    spent: Int64[Tensor, "p"]
    """Iterations at that penalty."""
    of_rows: Float[Tensor, "p 1 n"] | None
    """Weight of each row; None: all 1."""
    total: Float[Tensor, "p"]
    """Sum of these."""
    target: Float[Tensor, "p k r1"]
    """Sum of the rows of each class."""
    weight: Float[Tensor, "p k r1"]
    logits: Float[Tensor, "p k n"]
    gradient: Float[Tensor, "p k r1"]
    """Gradient of the cross entropies."""
    scale: Float[Tensor, "p"]
    """Mean curvature of the loss, by which the diagonal bound is scaled."""
    steps: list[Tensor] = field(default_factory=list[Tensor])
    changes: list[Tensor] = field(default_factory=list[Tensor])
    """Differences of weights and of gradients (at the present penalty), newest last."""
    inverses: list[Tensor] = field(default_factory=list[Tensor])
    """1 / (step . change)."""

    @classmethod
    def start(
        cls,
        on: Basis,
        y: Int64[Tensor, "p n"],
        weights: Float[Tensor, "p n"] | None,
        n_classes: int,
        l2: Float[Tensor, "l"],
    ) -> "_Fit":
        """Return the problems at weights of zero and the strongest penalty."""
        (p, n), k, r1 = y.shape, n_classes - 1, len(on.squares)
        new, rows = on.rows.new_zeros, on.rows
        of_rows = None if weights is None else weights[:, None]
        total = rows.new_full((p,), n) if weights is None else weights.sum(dim=1)
        present = (y[:, None] == torch.arange(k)[:, None]).to(rows.dtype)
        present = present if of_rows is None else present * of_rows
        target = (present.view(p * k, n) @ rows).view(p, k, r1)
        mass = rows.sum(dim=0) if weights is None else (weights @ rows)[:, None]
        free = torch.ones_like(on.squares)
        free[-1] = 0
        return cls(
            on,
            l2,
            free,
            found=new(p, len(l2), k, r1),
            iterations=torch.zeros(p, len(l2), dtype=torch.long),
            names=torch.arange(p),
            at=torch.zeros(p, dtype=torch.long),
            spent=torch.zeros(p, dtype=torch.long),
            of_rows=of_rows,
            total=total,
            target=target,
            weight=new(p, k, r1),
            logits=new(p, k, n),
            gradient=mass / n_classes - target,
            scale=total / n / n_classes,
        )

    def run(
        self, tolerance: float, max_iterations: int
    ) -> tuple[Float[Tensor, "p0 l k r1"], Int64[Tensor, "p0 l"]]:
        """Solve all problems and return their weights and iterations."""
        while len(self.names):
            slope = torch.addcmul(self.gradient, self._penalty(), _centred(self.weight))
            size = slope.square().mean(dim=(1, 2)).sqrt() / self.total
            done = (size <= tolerance) | (self.spent >= max_iterations)
            if done.any():
                self._write_down(done.nonzero()[:, 0])
                self._drop_finished()
            else:
                self._step(slope)
        return self.found, self.iterations

    def _penalty(self) -> Tensor:
        return self.l2[self.at][:, None, None] * self.free

    def _write_down(self, done: Int64[Tensor, "done"]) -> None:
        """Note the weights of converged problems and move them to their next penalty."""
        names, at = self.names[done], self.at[done]
        self.found[names, at] = self.weight[done]
        self.iterations[names, at] = self.spent[done]
        self.at[done], self.spent[done] = at + 1, 0
        further = self.l2[(at + 1).clamp_max(len(self.l2) - 1)] - self.l2[at]
        by = further[:, None, None] * self.free
        for i, step in enumerate(self.steps):
            mine = step[done].view(len(done), *self.weight.shape[1:])
            change = self.changes[i][done] + (by * _centred(mine)).flatten(1)
            self.changes[i][done] = change
            self.inverses[i][done] = _inverse(step[done], change)
        flat = _curvature(_probabilities(self.logits[done]))
        self.scale[done] = flat * self.total[done] / len(self.on.rows)

    def _drop_finished(self) -> None:
        going = self.at < len(self.l2)
        if going.all():
            return
        names = ("names", "at", "spent", "of_rows", "total", "target", "weight", "logits")
        for name in (*names, "gradient", "scale"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[going])
        for name in ("steps", "changes", "inverses"):
            setattr(self, name, [part[going] for part in getattr(self, name)])

    def _step(self, slope: Float[Tensor, "p k r1"]) -> None:
        """Move every problem along its direction."""
        p, k, r1 = slope.shape
        direction = self._direction(slope)
        along = (direction.view(p * k, r1) @ self.on.rows.T).view(p, k, -1)
        length, probabilities = self._line_search(slope, direction, along)
        step = direction.mul_(length[:, None, None])
        self.logits.addcmul_(along, length[:, None, None])
        self.weight += step
        gradient = (probabilities.view(p * k, -1) @ self.on.rows).view(p, k, r1) - self.target
        change = gradient - self.gradient + self._penalty() * _centred(step)
        self.gradient = gradient
        self.spent += 1
        self.steps.append(step.view(p, -1))
        self.changes.append(change.view(p, -1))
        self.inverses.append(_inverse(self.steps[-1], self.changes[-1]))
        if len(self.steps) > HISTORY:
            del self.steps[0], self.changes[0], self.inverses[0]

    def _direction(self, slope: Float[Tensor, "p k r1"]) -> Float[Tensor, "p k r1"]:
        """Return the direction of L-BFGS, its first guess the diagonal bound."""
        left = slope.flatten(1).clone()
        shares: list[Tensor] = []
        pairs = list(zip(self.steps, self.changes, self.inverses, strict=True))
        for step, change, inverse in reversed(pairs):
            shares.append(inverse * _dot(step, left))
            left.addcmul_(change, shares[-1][:, None], value=-1)
        guess = left.view_as(slope)
        guess = guess + guess.sum(dim=1, keepdim=True)
        guess /= self.scale[:, None, None] * self.on.squares + self._penalty()
        way = guess.flatten(1)
        for (step, change, inverse), share in zip(pairs, reversed(shares), strict=True):
            way.addcmul_(step, (share - inverse * _dot(change, way))[:, None])
        return way.view_as(slope).neg_()

    def _line_search(
        self,
        slope: Float[Tensor, "p k r1"],
        direction: Float[Tensor, "p k r1"],
        along: Float[Tensor, "p k n"],
    ) -> tuple[Float[Tensor, "p"], Float[Tensor, "p k n"]]:
        """Return step lengths and the weighted probabilities there.

        The loss is convex, so slopes alone decide.
        """
        flat, drag = direction.flatten(1), (self._penalty() * _centred(direction)).flatten(1)
        first = _dot(slope.flatten(1), flat)
        fixed = _dot(drag, self.weight.flatten(1)) - _dot(self.target.flatten(1), flat)
        bend = _dot(drag, flat)
        length = torch.ones_like(first)
        probabilities = self._weighted(self.logits + along, slice(None))
        todo, here = torch.arange(len(first)), probabilities
        way = along
        for _ in range(LINE_TRIALS):
            found = _dot(here.flatten(1), way.flatten(1))
            ratio = (found + fixed[todo] + length[todo] * bend[todo]) / first[todo]
            bad = (ratio < UPHILL) | (ratio > DOWNHILL)
            if not bad.any():
                break
            todo, ratio = todo[bad], ratio[bad]
            length[todo] *= (1 / (1 - ratio).clamp_min(0.1)).clamp_min(0.05)
            way = along[todo]
            here = self._weighted(self.logits[todo] + length[todo, None, None] * way, todo)
            probabilities[todo] = here
        return length, probabilities

    def _weighted(
        self, logits: Float[Tensor, "q k n"], which: Tensor | slice
    ) -> Float[Tensor, "q k n"]:
        """Return the probabilities of some problems, times the weights of their rows."""
        probabilities = _probabilities(logits)
        return probabilities if self.of_rows is None else probabilities * self.of_rows[which]


def _inverse(step: Tensor, change: Tensor) -> Tensor:
    """Return 1 / (step . change), 0 where rounding left no curvature: the pair is then unused."""
    product = _dot(step, change)
    floor = torch.finfo(step.dtype).eps * _dot(step, step).sqrt() * _dot(change, change).sqrt()
    return torch.where(product > floor, 1 / product.where(product > floor, 1), 0)
