"""What a unit does to the next token: steered along its direction, and ablated where it fires.

A unit is steered on the last token of a prompt only, by adding to its own activation. The strength
is found by search, so that the mean KL between clean and steered next-token distributions reaches a
target: units and random directions are compared at the same size of effect.
"""

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from activation_store.write.recording import input_device
from lmmono.errors import ExplainError
from lmmono.models.crate import CACHE_ARGUMENT
from lmmono.models.hooks import attached, bare, hook_names
from lmmono.records.corpus_excerpts import TokenGrid, read_grid
from lmmono.records.seeds import stream
from lmmono.records.unit_rows import read_unit_rows
from lmmono.records.units import checked_units
from lmmono.registry.scorer_settings import SteeringSettings
from lmmono.scores.score_job import ScoreJob

UNITS_AT_ONCE = 32

SEARCH_STEPS = 14
"""Halvings of the range of strengths, which spans six powers of ten: within 0.4 % of the target."""

Change = Callable[[Tensor], Tensor]
"""Makes of the activations on the last token, [batch, d], the changed ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Steered:
    """What steering did to one unit, or one random direction."""

    unit: int
    strength: float
    """What was added to the activation, in multiples of the unit's maximum; NaN where the search
    did not reach the target."""
    changes: Float[ndarray, "prompts d_vocab"]
    """Change of each logit on each prompt, less its mean."""
    kl: Float[ndarray, " prompts"]
    """KL(clean || steered) of each prompt, in nats."""


class Steering:
    """A model with prompts from the score split, ready to be steered.

    Args:
        job: Names the model, the hook, and how many prompts of how many tokens.

    Raises:
        ExplainError: The model has no such hook, or no row is long enough for a prompt.
    """

    def __init__(self, job: ScoreJob) -> None:
        self._model, self._hook = bare(job.model), job.hook
        if job.hook not in hook_names(self._model):
            raise ExplainError(
                f"{job.hook}: this model has no such hook, so it cannot be steered there; latents "
                f"of dictionaries have no place in the model"
            )
        self.units = checked_units(job.store, job.hook, job.units)
        settings = job.settings_as(SteeringSettings)
        self._length, self._n = settings.prompt, settings.prompts
        self._target, self._job = settings.kl, job
        query = "SELECT unit, max_act FROM unit_stats WHERE hook = $hook"
        self.max_act: dict[int, float] = dict(job.store.sql(query, hook=job.hook).fetchall())
        self.grid = read_grid(job.store, "score")
        self._ends = self._possible_ends(self.grid)
        rng = stream("steered contexts", job.seed, job.hook)
        ends = rng.choice(self._ends, min(self._n, len(self._ends)), replace=False)
        self.prompts = self._ids(ends)
        self.n_documents = len(np.unique(self.grid.doc_ids[ends]))
        self._clean = self._logits(self.prompts, None)
        self._past: tuple[int, Any] | None = None

    def _possible_ends(self, grid: TokenGrid) -> Int[ndarray, " cells"]:
        """Return the cells with a whole prompt of one document up to them."""
        cells = np.arange(len(grid.doc_ids))
        first = cells - self._length + 1
        fits = (cells % grid.n_ctx >= self._length - 1) & (grid.doc_ids >= 0)
        ends = cells[fits & (grid.doc_ids[np.maximum(first, 0)] == grid.doc_ids)]
        if len(ends) < 2:
            raise ExplainError(f"no document has {self._length} tokens in a row; want prompt= less")
        return ends

    def _ids(self, ends: Int[ndarray, " n"]) -> Int[Tensor, "n prompt"]:
        cells = ends[:, None] + np.arange(1 - self._length, 1)
        return torch.from_numpy(self.grid.token_ids[cells].astype(np.int64))

    def _logits(
        self, ids: Int[Tensor, "batch tokens"], change: Change | None, past: Any = None
    ) -> Float[Tensor, "batch d_vocab"]:
        """Return float32 logits after the last token, with its activations changed."""

        def watch(acts: Tensor) -> Tensor:
            assert change is not None
            changed = acts.clone()
            changed[:, -1] = change(acts[:, -1])
            return changed

        model = self._model
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        extra: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
        extra |= {} if past is None else {CACHE_ARGUMENT: past, "use_cache": True}
        device = input_device(model)
        watches = {} if change is None else {self._hook: watch}
        with _at_rest(model), attached(model, watches):
            return model(ids.to(device), **extra).logits[:, -1].float().cpu()

    def steered(self, random: bool = False) -> Iterator[Steered]:
        """Yield what steering each unit that ever fires does; or a random direction for each."""
        alive = [int(unit) for unit in self.units if (self.max_act.get(int(unit)) or 0.0) > 0]
        for first in range(0, len(alive), UNITS_AT_ONCE):
            yield from self._some(alive[first : first + UNITS_AT_ONCE], random)

    def directions(self, units: list[int], random: bool) -> Float[Tensor, "units d"]:
        """Return a direction for each unit, as long as the unit's maximum."""
        d = int(
            self._job.store.sql(
                "SELECT d FROM hooks WHERE hook = $hook", hook=self._hook
            ).fetchall()[0][0]
        )
        directions = torch.zeros((len(units), d))
        for i, unit in enumerate(units):
            if random:
                rng = stream("random directions", self._job.seed, self._hook, unit)
                drawn = rng.standard_normal(d)
                directions[i] = torch.from_numpy(drawn / np.linalg.norm(drawn)).float()
            else:
                directions[i, unit] = 1.0
            directions[i] *= self.max_act[unit]
        return directions

    def _some(self, units: list[int], random: bool) -> list[Steered]:
        directions = self.directions(units, random)
        low, high = torch.full((len(units),), -3.0), torch.full((len(units),), 3.0)
        reached = self._at(directions, 10.0**high)[1].mean(1) >= self._target
        for _ in range(SEARCH_STEPS):
            middle = (low + high) / 2
            above = self._at(directions, 10.0**middle)[1].mean(1) >= self._target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        strength = 10.0 ** ((low + high) / 2)
        changes, kl = self._at(directions, strength)
        strength = torch.where(reached, strength, torch.nan)
        return [
            Steered(unit, float(strength[i]), changes[i].numpy(), kl[i].numpy())
            for i, unit in enumerate(units)
        ]

    def _at(
        self, directions: Float[Tensor, "units d"], strength: Float[Tensor, " units"]
    ) -> tuple[Float[Tensor, "units prompts d_vocab"], Float[Tensor, "units prompts"]]:
        """Return changes of logits and KL of all prompts at a strength for each direction.

        All but the last token of the prompts is run once; see `_before`.
        """
        n, n_units = len(self.prompts), len(directions)
        added = (directions * strength[:, None]).repeat(n, 1)
        past = self._before(n_units)
        last = self.prompts[:, -1:].repeat_interleave(n_units, dim=0)
        logits = self._logits(last, lambda acts: acts + added.to(acts), past)
        past.crop(-1)
        clean = self._clean.repeat_interleave(n_units, dim=0)
        changes = (logits - clean).view(n, n_units, -1).transpose(0, 1)
        kl = divergence(clean, logits).view(n, n_units).T
        return changes - changes.mean(dim=2, keepdim=True), kl

    def _before(self, n_units: int) -> Any:
        """Return keys and values of all tokens but the last, each prompt once for each unit."""
        if self._past is None or self._past[0] != n_units:
            ids = self.prompts[:, :-1].to(input_device(self._model))
            with _at_rest(self._model):
                past = self._model(ids, use_cache=True)[CACHE_ARGUMENT]
            past.batch_repeat_interleave(n_units)
            self._past = n_units, past
        return self._past[1]

    def natural(self, units: list[int]) -> Float[ndarray, "units prompts"]:
        """Return KL(clean || steered) in nats when the unit's maximum is added."""
        return self._at(self.directions(units, False), torch.ones(len(units)))[1].numpy()

    def ablated(self) -> Iterator[tuple[int, Float[ndarray, " firing"]]]:
        """Yield each unit with the KL(clean || ablated) at tokens on which it fires, up to n."""
        can_end = np.zeros(len(self.grid.token_ids), bool)
        can_end[self._ends] = True
        for rows in read_unit_rows(self._job.store, self._hook, self.units, self.grid):
            for i, unit in enumerate(rows.units.tolist()):
                rng = stream("continuations", self._job.seed, self._hook, unit)
                cells = rows.of(i)[0]
                cells = rng.permutation(cells[can_end[cells]])[: self._n]
                yield unit, self._ablate(unit, cells)

    def _ablate(self, unit: int, cells: Int[ndarray, " firing"]) -> Float[ndarray, " firing"]:
        def silence(acts: Tensor) -> Tensor:
            acts = acts.clone()
            acts[:, unit] = 0.0
            return acts

        if not len(cells):
            return np.zeros(0, np.float32)
        ids = self._ids(cells)
        return divergence(self._logits(ids, None), self._logits(ids, silence)).numpy()


@contextmanager
def _at_rest(model: nn.Module) -> Generator[None]:
    """Run in eval mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def divergence(
    clean: Float[Tensor, "batch d_vocab"], other: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, " batch"]:
    """Return KL(clean || other) of the distributions that logits stand for, in nats."""
    first, second = clean.log_softmax(-1), other.log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).clamp(min=0)
