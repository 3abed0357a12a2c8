"""Multinomial logistic regression of many problems over the same rows, and over all L2 penalties.

The objective is scikit-learn's: sum of cross entropies + l2 / 2 |weight|^2, the bias free, so
`l2` is its 1 / C; of two classes the weight is one vector, the difference of theirs. Problems are
solved together by L-BFGS in the coordinates of a `Basis`, each going down its path of penalties at
its own pace: one that has converged writes its weights down and goes on to the next penalty,
taking its curvature along. An iteration costs one product of the direction with the rows and one
of the residual with the rows, 4 n d (classes - 1) operations, whatever the line search tries: it
moves along logits that are known. `tuned_logistic` chooses the penalty on validation labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmmono.errors import RobustnessError
from lmmono.probes.problems import Probes, Problems, choose, empty_probes, same_rows

# 1 / C of scikit-learn's LogisticRegressionCV, so that both try the same probes
L2_PATH = tuple(float(10 ** (4 - 8 * i / 9)) for i in range(10))
"""Penalties from strong to weak."""

# the largest part of a gradient is about three times its root mean square: scikit-learn's tol, 1e-4
TOLERANCE = 3e-5
"""Root mean square of the mean loss' gradient at which a fit has converged."""

MAX_ITERATIONS = 500
"""Iterations at one penalty; a fit that needs more says so in a note."""

HISTORY = 8
"""Steps whose curvature L-BFGS remembers."""

AT_ONCE = 128
"""Problems solved together: so few that their logits stay in the processor's cache."""

LOGITS_AT_ONCE = 1 << 25
"""Validation logits of problems whose penalties are chosen together: 128 MiB."""

LINE_TRIALS = 12
"""Step lengths tried: each is at least 0.05 of the last, and 0.05 ** 12 is below rounding."""

# loose, because every trial costs the probabilities of all rows; the loss is convex, so a slope
# that fell by a tenth, or rose to less than a third uphill, is progress
UPHILL, DOWNHILL = -0.3, 0.9
"""Slopes at which a step ends well, as shares of the slope at its start."""


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """The coordinates in which a set of training rows is easy to learn from.

    Rows are standardised and turned to the eigenvectors of their Gram matrix, after which every L2
    penalty of every problem on these rows has the same diagonal bound of its Hessian (Bohning
    1992): x'Wx <= x'x / 2. Turning keeps the penalty |w|^2, so a probe fitted here is the probe
    that would be fitted on the standardised rows; where there are fewer rows than dimensions it
    needs only as many coordinates as there are rows. A last coordinate, constant 1, takes the bias.
    """

    rows: Float[Tensor, "n r1"]
    squares: Float[Tensor, "r1"]
    """Sum of squares of each column of `rows`."""
    shift: Float[Tensor, "d"]
    """Mean of each dimension of the features."""
    directions: Float[Tensor, "d r"]
    """Eigenvectors, each dimension divided by its standard deviation (0 where it is constant)."""

    def coordinates(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m r1"]:
        """Return other rows in these coordinates."""
        turned = (x.to(self.rows.dtype) - self.shift) @ self.directions
        return torch.cat([turned, turned.new_ones(len(x), 1)], dim=1)

    def on_features(
        self, weight: Float[Tensor, "*batch r1"]
    ) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """Return weights and biases on the features as they came."""
        slopes = weight[..., :-1] @ self.directions.T
        return slopes, weight[..., -1] - slopes @ self.shift


def basis(x: Float[Tensor, "n d"], *, standardise: bool = True) -> Basis:
    """Return the basis of training rows, in their precision (the eigenvectors in float64).

    Args:
        x: Rows.
        standardise: Divide each dimension by its standard deviation; else it is only centred.
    """
    exact = x.double()  # eigenvalues of a Gram matrix lose half of the digits
    shift = exact.mean(dim=0)
    exact = exact - shift
    spread = exact.square().mean(dim=0).sqrt()
    # what rounding leaves of a constant dimension in float32 is no deviation to divide by
    varies = spread > 1e-6 * shift.abs() + torch.finfo(torch.float64).tiny
    inverse = torch.where(varies, 1 / spread.where(varies, 1) if standardise else 1.0, 0.0)
    exact *= inverse
    n, d = exact.shape
    # the smaller of the two Gram matrices has the same eigenvalues
    squares, vectors = torch.linalg.eigh(exact.T @ exact if d <= n else exact @ exact.T)
    kept = squares > squares[-1].clamp_min(0) * 1e-12 * max(n, d)  # the others are rounding
    squares, vectors = squares[kept].flip(0), vectors[:, kept].flip(1)
    turn = vectors if d <= n else exact.T @ vectors / squares.sqrt()
    directions = inverse[:, None] * turn
    rows = torch.cat([exact @ turn, exact.new_ones(len(x), 1)], dim=1)
    squares = torch.cat([squares, squares.new_full((1,), len(x))])
    fields = (rows, squares, shift, directions)
    return Basis(*(field.to(x.dtype).contiguous() for field in fields))


@dataclass(frozen=True, slots=True, eq=False)
class PenaltyPath:
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

    def at(self, which: Int64[Tensor, "p"]) -> "PenaltyPath":
        """Return one penalty of each problem, by index; `l2` then is not that of all."""
        problems = torch.arange(len(which))
        turned = self.turned[problems, which][:, None]
        return replace(
            self, turned=turned, n_iterations=self.n_iterations[problems, which][:, None]
        )

    def weights(self) -> tuple[Float[Tensor, "p l c d"], Float[Tensor, "p l c"]]:
        """Return weights and biases on the features as they came, with sum zero over classes."""
        # a constant added to all classes changes no probability; with sum zero |weight| is least
        whole = torch.cat([self.turned, torch.zeros_like(self.turned[..., :1, :])], dim=-2)
        return self.basis.on_features(whole - whole.mean(dim=-2, keepdim=True))

    def log_probabilities(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "p l m c"]:
        """Return the log-probabilities of rows at each penalty."""
        p, n_l2, k, r1 = self.turned.shape
        logits = self.turned.reshape(-1, r1) @ self.basis.coordinates(x).T
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
) -> PenaltyPath:
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
        _PathFit.start(on, part, weight, n_classes, penalties(l2, n_classes).to(on.rows.dtype))
        for part, weight in zip(y.split(AT_ONCE), size, strict=False)
    ]
    done = [fit.run(tolerance, max_iterations) for fit in fits]
    turned, iterations = zip(*done, strict=True)
    return PenaltyPath(on, tuple(l2), torch.cat(turned), torch.cat(iterations))


def penalties(l2: Sequence[float], n_classes: int) -> Float[Tensor, "l"]:
    """Return penalties of the weights of all classes, with sum zero, from those of scikit-learn.

    Of two classes it penalises the difference v of their weights, |v|^2 = 2 (|v/2|^2 + |-v/2|^2).
    """
    return torch.tensor(l2, dtype=torch.float64) * (2 if n_classes == 2 else 1)


def _probabilities(logits: Float[Tensor, "p k n"]) -> Float[Tensor, "p k n"]:
    """Return the probabilities of all classes but the last, whose logit is 0."""
    if logits.shape[1] == 1:
        return logits.sigmoid()
    top = logits.amax(dim=1, keepdim=True).clamp_min_(0)
    powers = (logits - top).exp_()
    return powers.div_(powers.sum(dim=1, keepdim=True).add_(top.neg_().exp_()))


def _centred(weight: Tensor) -> Tensor:
    """Return weights [p, k, r1] against the last class less their mean over all classes.

    This is what |weight|^2 / 2, all classes with sum zero, has as gradient.
    """
    return weight - weight.sum(dim=1, keepdim=True) / (weight.shape[1] + 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products [p] of rows [p, m]; as often called, without checks of shapes."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


@dataclass(slots=True, eq=False)
class _PathFit:
    """A set of problems on their way down the path; finished ones leave it."""

    on: Basis
    l2: Float[Tensor, "l"]
    free: Float[Tensor, "r1"]
    """1 for penalised coordinates, 0 for the bias."""
    solutions: Float[Tensor, "p0 l k r1"]
    iterations: Int64[Tensor, "p0 l"]
    problem_ids: Int64[Tensor, "p"]
    """Place of each problem in `solutions`."""
    penalty_at: Int64[Tensor, "p"]
    """Index of its penalty."""
    n_spent: Int64[Tensor, "p"]
    """Iterations at that penalty."""
    row_weights: Float[Tensor, "p 1 n"] | None
    """Weight of each row; None: all 1."""
    n_weighted: Float[Tensor, "p"]
    """Sum of these."""
    class_sums: Float[Tensor, "p k r1"]
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
    ) -> "_PathFit":
        """Return the problems at weights of zero and the strongest penalty."""
        (p, n), k, r1 = y.shape, n_classes - 1, len(on.squares)
        new, rows = on.rows.new_zeros, on.rows
        row_weights = None if weights is None else weights[:, None]
        n_weighted = rows.new_full((p,), n) if weights is None else weights.sum(dim=1)
        present = (y[:, None] == torch.arange(k)[:, None]).to(rows.dtype)
        present = present if row_weights is None else present * row_weights
        class_sums = (present.view(p * k, n) @ rows).view(p, k, r1)
        mass = rows.sum(dim=0) if weights is None else (weights @ rows)[:, None]
        free = torch.ones_like(on.squares)
        free[-1] = 0
        return cls(
            on,
            l2,
            free,
            solutions=new(p, len(l2), k, r1),
            iterations=torch.zeros(p, len(l2), dtype=torch.long),
            problem_ids=torch.arange(p),
            penalty_at=torch.zeros(p, dtype=torch.long),
            n_spent=torch.zeros(p, dtype=torch.long),
            row_weights=row_weights,
            n_weighted=n_weighted,
            class_sums=class_sums,
            weight=new(p, k, r1),
            logits=new(p, k, n),
            gradient=mass / n_classes - class_sums,
            scale=n_weighted / n / n_classes,
        )

    def run(
        self, tolerance: float, max_iterations: int
    ) -> tuple[Float[Tensor, "p0 l k r1"], Int64[Tensor, "p0 l"]]:
        """Solve all problems and return their weights and iterations."""
        while len(self.problem_ids):
            slope = torch.addcmul(self.gradient, self._penalty(), _centred(self.weight))
            size = slope.square().mean(dim=(1, 2)).sqrt() / self.n_weighted
            done = (size <= tolerance) | (self.n_spent >= max_iterations)
            if done.any():
                self._write_down(done.nonzero()[:, 0])
                self._drop_finished()
            else:
                self._step(slope)
        return self.solutions, self.iterations

    def _penalty(self) -> Tensor:
        return self.l2[self.penalty_at][:, None, None] * self.free

    def _write_down(self, done: Int64[Tensor, "done"]) -> None:
        """Note the weights of converged problems and move them to their next penalty."""
        problems, at = self.problem_ids[done], self.penalty_at[done]
        self.solutions[problems, at] = self.weight[done]
        self.iterations[problems, at] = self.n_spent[done]
        self.penalty_at[done], self.n_spent[done] = at + 1, 0
        further = self.l2[(at + 1).clamp_max(len(self.l2) - 1)] - self.l2[at]
        by = further[:, None, None] * self.free
        for i, step in enumerate(self.steps):
            moved = step[done].view(len(done), *self.weight.shape[1:])
            change = self.changes[i][done] + (by * _centred(moved)).flatten(1)
            self.changes[i][done] = change  # what it would have been at the next penalty
            self.inverses[i][done] = _inverse(step[done], change)
        # mean variance of the classes, 1 / c where all c are equally likely
        probabilities = _probabilities(self.logits[done])
        last = 1 - probabilities.sum(dim=1)
        alike = (probabilities.square().sum(dim=1) + last.square()).mean(dim=1)
        variance = ((1 - alike) / probabilities.shape[1]).clamp_min(
            1e-3
        )  # never a step without end
        self.scale[done] = variance * self.n_weighted[done] / len(self.on.rows)

    def _drop_finished(self) -> None:
        going = self.penalty_at < len(self.l2)
        if going.all():
            return
        names = ("problem_ids", "penalty_at", "n_spent", "row_weights", "n_weighted", "class_sums")
        for name in (*names, "weight", "logits", "gradient", "scale"):
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
        gradient = (probabilities.view(p * k, -1) @ self.on.rows).view(p, k, r1) - self.class_sums
        change = gradient - self.gradient + self._penalty() * _centred(step)
        self.gradient = gradient
        self.n_spent += 1
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
        guess = left.view_as(slope)  # turned by the inverse of the diagonal bound over classes
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
        fixed = _dot(drag, self.weight.flatten(1)) - _dot(self.class_sums.flatten(1), flat)
        bend = _dot(drag, flat)
        length = torch.ones_like(first)
        probabilities = self._weighted(self.logits + along, slice(None))
        todo, here = torch.arange(len(first)), probabilities
        way = along
        for _ in range(LINE_TRIALS):
            slope_there = _dot(here.flatten(1), way.flatten(1))
            ratio = (slope_there + fixed[todo] + length[todo] * bend[todo]) / first[todo]
            bad = (ratio < UPHILL) | (ratio > DOWNHILL)
            if not bad.any():
                break
            todo, ratio = todo[bad], ratio[bad]
            # the secant's minimum of the slope, within a factor of 10 up and 20 down
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
        return (
            probabilities if self.row_weights is None else probabilities * self.row_weights[which]
        )


def _inverse(step: Tensor, change: Tensor) -> Tensor:
    """Return 1 / (step . change), 0 where rounding left no curvature: the pair is then unused."""
    product = _dot(step, change)
    floor = torch.finfo(step.dtype).eps * _dot(step, step).sqrt() * _dot(change, change).sqrt()
    return torch.where(product > floor, 1 / product.where(product > floor, 1), 0)


def tuned_logistic(
    problems: Problems,
    *,
    labels: Int64[Tensor, "p m"] | None = None,
    l2: Sequence[float] = L2_PATH,
    kept: Bool[Tensor, "p n"] | None = None,
) -> Probes:
    """Fit a logistic probe per problem, its penalty chosen on validation labels.

    Chosen is what `choose` takes; whose labels these are (the noisy ones of the problem, or clean
    ones) is for the learner to say. Problems that use the same rows are solved together.

    Args:
        problems: What to learn from.
        labels: Validation labels to choose by; None: the problems' own, noisy ones.
        l2: Penalties, from strong to weak.
        kept: Training rows to learn from; the others still count where features are standardised.
    """
    faults = problems.faults()
    labels = problems.y_val if labels is None else labels
    probes = empty_probes(problems, faults)
    notes: list[str | None] = [None] * len(problems)
    for rows, members in same_rows(problems, faults):
        on = basis(problems.x[rows])
        logits = len(l2) * problems.y_val.shape[1] * problems.n_classes
        for part in members.split(max(1, min(AT_ONCE, LOGITS_AT_ONCE // logits))):
            path = fit_path(
                on,
                problems.y[part][:, rows],
                n_classes=problems.n_classes,
                l2=l2,
                weights=None if kept is None else kept[part][:, rows].to(on.rows.dtype),
            )
            log_p = path.log_probabilities(problems.x_val)
            best = choose(log_p, labels[part], problems.val_rows[part])
            weight, bias = path.at(best).weights()
            probes.weight[part], probes.bias[part] = weight[:, 0], bias[:, 0]
            probes.chosen_l2[part] = torch.tensor(l2)[best]
            for i, n_spent in zip(part.tolist(), path.at(best).n_iterations[:, 0], strict=True):
                if n_spent >= MAX_ITERATIONS:
                    notes[i] = f"stopped after {MAX_ITERATIONS} iterations, before it converged"
    return Probes(probes.weight, probes.bias, probes.chosen_l2, faults, tuple(notes))


def oracle_logistic(problems: Problems) -> Probes:
    """Fit as `tuned_logistic` does, its penalty chosen on the true validation labels.

    Raises:
        RobustnessError: The problems do not hold the true labels.
    """
    if problems.clean_val is None:
        raise RobustnessError(
            "learner oracle_logistic: want Problems.clean_val, the true validation labels; without "
            "them take learner logistic"
        )
    return tuned_logistic(problems, labels=problems.clean_val.expand_as(problems.y_val))
