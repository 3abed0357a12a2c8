"""Named loss terms, and the one step that every training takes.

    batch -> main pass (hooks recorded, edits applied) -> main loss ------------.
                       |                                                        v
                       '-> objective(Step) -> Loss x weight x schedule -> sum -> backward -> clip
                                                                               -> optimizer

A language model and a classifier of texts are both a `Trainee`; the loops that call `take_step`
differ only in where batches come from and in what they keep. An objective is a module: its own
weights join the optimizer, its weights and buffers are part of checkpoints.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmmono.errors import TrainError
from lmmono.models.hooks import attached, bare, match_hooks, recording, run_until
from lmmono.models.points import Watch
from lmmono.recipe.objective_settings import ObjectiveSettings
from lmmono.registry.methods import find_method
from lmmono.training.optimizer import set_lr


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBatch:
    """What one forward pass reads."""

    ids: Int64[Tensor, "batch pos"]
    """Token ids; padding, which stands last in its row, is some valid id."""
    is_token: Bool[Tensor, "batch pos"]
    """Where there is a token and no padding."""
    labels: Int64[Tensor, "*shape"]
    """Targets: of a language model [batch, pos], -100 where there is none; of texts their class."""
    texts: tuple[str, ...] | None = None
    """The texts themselves, where a classifier is trained."""
    rows: Int64[np.ndarray, " batch"] | None = None
    """Numbers of those texts in the training set."""


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What one forward pass gives."""

    logits: Float[Tensor, "batch *shape"]
    """[batch, pos, d_vocab] of a language model, [batch, n_classes] of a classifier."""
    loss: Float[Tensor, ""]
    """The main loss."""
    features: Float[Tensor, "batch d_model"] | None = None
    """What a classifier's head reads: the pooled stream."""
    acts: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Activations of the hooks that were asked for, with their graph."""


class Trainee(ABC):
    """What is trained: a language model, or a classifier of texts."""

    is_classifier: bool

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The module that hooks attach to, in the wrappers that it is trained in."""

    @abstractmethod
    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the weights that are trained."""

    @abstractmethod
    def run(self, batch: TrainingBatch, *, is_main: bool = False) -> Outputs:
        """Run the model in the mode it is in; `is_main` is the pass that wrappers must see."""

    @abstractmethod
    def loss_of(self, logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """Return the main loss of logits."""

    def read(self, texts: Sequence[str], labels: Tensor) -> TrainingBatch:  # noqa: ARG002
        """Return texts as a batch.

        Raises:
            TrainError: This is no classifier of texts.
        """
        raise TrainError(
            f"{type(self).__name__} reads rows of tokens, no texts; objectives that change texts "
            "are for robustness.fine_tuning"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """What an objective gives for a step."""

    value: Float[Tensor, ""]
    """The term, before its weight."""
    columns: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Further numbers to log, by names of the objective's `columns`."""
    main: Float[Tensor, ""] | None = None
    """What takes the place of the main loss, from an objective that says so."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One training step as an objective sees it."""

    trainee: Trainee
    batch: TrainingBatch
    outputs: Outputs
    """Of the main pass; `acts` has the hooks of every objective of the training."""
    index: int
    """Steps taken before this one."""
    n_steps: int
    """Steps in all."""
    objectives: Mapping[str, "Objective"]
    """Every objective of the training by its name."""

    @property
    def fraction(self) -> float:
        """Share of the steps that were taken."""
        return self.index / max(1, self.n_steps)

    @property
    def network(self) -> Any:
        """The model without its wrappers."""
        return bare(self.trainee.model)

    @property
    def is_classifier(self) -> bool:
        """Whether labels are classes of texts."""
        return self.trainee.is_classifier

    def acts(self, objective: "Objective") -> dict[str, Tensor]:
        """Return the main pass' activations of an objective's hooks, in the order they run."""
        return {name: self.outputs.acts[name] for name in objective.hooks}

    def again(
        self,
        batch: TrainingBatch | None = None,
        *,
        embeds: Float[Tensor, "batch pos d"] | None = None,
        hooks: Sequence[str] = (),
        grad: bool = True,
        twice: bool = False,
    ) -> Outputs:
        """Run the model once more, in the mode it is in; dropout is drawn anew.

        Args:
            batch: What to read; None takes the step's batch.
            embeds: What stands in place of the token embeddings.
            hooks: Hooks whose activations are wanted.
            grad: Whether a graph is kept.
            twice: Whether gradients of gradients are wanted, which fused attention has none of.
        """
        with ExitStack() as stack:
            if not grad:
                stack.enter_context(torch.no_grad())
            if twice:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if embeds is not None:
                stack.enter_context(_embedded(self.network, embeds))
            acts = stack.enter_context(recording(self.network, hooks)) if hooks else {}
            outputs = self.trainee.run(batch or self.batch)
        return Outputs(outputs.logits, outputs.loss, outputs.features, dict(acts))

    def main(self, logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """Return the main loss of logits."""
        return self.trainee.loss_of(logits, labels)

    def read(self, texts: Sequence[str], labels: Tensor) -> TrainingBatch:
        """Return texts as a batch; see `Trainee.read`."""
        return self.trainee.read(texts, labels)

    def embed(self, ids: Int64[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d"]:
        """Return the token embeddings of ids, as the model's first layer is given them."""
        return self.network.get_input_embeddings()(ids)


@contextmanager
def _embedded(network: Any, embeds: Tensor) -> Generator[None]:
    def replaced(*_: Any) -> Tensor:
        return embeds

    handle = network.get_input_embeddings().register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True, eq=False)
class ObjectiveContext:
    """What an objective is made for."""

    model: nn.Module
    """The model; hooks are matched on it."""
    is_classifier: bool
    n_steps: int
    seed: int
    d_model: int
    """Width of its stream."""
    n_classes: int | None = None
    """Classes of texts."""
    tokenizer: Any = None
    texts: tuple[str, ...] | None = None
    """The training texts of a classifier."""
    pooling: Literal["mean", "last"] | None = None
    """How a classifier pools the tokens of a text."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def hooks(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """Return the hook names that match, in the order they run.

        Raises:
            ModelError: A pattern matches nothing.
        """
        return tuple(match_hooks(self.model, patterns))

    def widths(self, hooks: Sequence[str]) -> dict[str, int]:
        """Return how many numbers each hook has per token; found by running one token."""
        network = bare(self.model)
        was_training = network.training
        network.eval()  # no dropout, which would draw from the generator
        try:
            one = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            acts = run_until(network, one, hooks)
        finally:
            network.train(was_training)
        return {name: acts[name].numel() for name in hooks}

    def require_embeddings(self, objective: str) -> None:
        """Check that token embeddings can be replaced, as perturbations of them need.

        Raises:
            TrainError: The model has none.
        """
        network: Any = bare(self.model)
        get = getattr(network, "get_input_embeddings", None)
        try:
            embedding = get() if get is not None else None
        except NotImplementedError:
            embedding = None
        if not isinstance(embedding, nn.Module):
            raise TrainError(
                f"objective {objective} moves token embeddings, and {type(network).__name__} has "
                "none (get_input_embeddings); take an objective on other passes, such as r_drop"
            )


class Objective(nn.Module, ABC):
    """A loss term; made from its settings and an `ObjectiveContext`.

    Draws from torch's global generator only, whose state checkpoints keep. Buffers keep their
    shapes, so that a checkpoint can be put back.
    """

    columns: tuple[str, ...] = ()
    """Names of further numbers that it logs."""
    replaces_main = False
    """Whether it computes the main loss itself; one objective of a training may."""
    hooks: tuple[str, ...] = ()
    """Exact names of the hooks that are recorded in the main pass."""
    lr: float | None = None
    """Highest learning rate of its own weights, on the training's schedule; None takes the
    training's own."""
    weight_decay: float | None = None
    """Decay of its own matrices; None takes that of the training. Vectors are never decayed."""

    def edits(self) -> Mapping[str, Watch]:
        """Return functions that change activations in the main pass of training steps, by hook."""
        return {}

    @abstractmethod
    def forward(self, step: Step) -> Loss:
        """Return the term of a step."""


@runtime_checkable
class AttributeMap(Protocol):
    """An objective that reads attributes off activations, as FLINT's interpreter does."""

    hooks: tuple[str, ...]

    def attributes(
        self, acts: Mapping[str, Tensor], is_token: Tensor
    ) -> Float[Tensor, "batch n_attributes"]:
        """Return the attributes, none below 0, of texts."""
        ...

    def relevance(self, attributes: Tensor, logits: Tensor) -> Float[Tensor, "batch n_attributes"]:
        """Return how much each attribute counts for the class that logits predict."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """An objective with its name, weight and schedule."""

    name: str
    """Its column."""
    objective: Objective
    weight: float = 1.0
    """What it is multiplied by."""
    start_fraction: float = 0.0
    """Share of the steps before it begins."""
    warmup_fraction: float = 0.0
    """Share of the steps over which its weight then grows."""
    every_steps: int = 1
    """It is part of every so-many-th step."""

    def is_on(self, index: int, n_steps: int) -> bool:
        """Say whether it is part of a step, counted from 0."""
        return index >= self.start_fraction * n_steps and index % self.every_steps == 0

    def weight_at(self, index: int, n_steps: int) -> float:
        """Return its weight in a step that it is part of."""
        ramp = self.warmup_fraction * n_steps
        begun = index + 1 - self.start_fraction * n_steps
        return self.weight * min(1.0, begun / ramp) if ramp else self.weight


class Terms(nn.Module):
    """The objectives of a training, as one module; there may be none."""

    def __init__(self, terms: Sequence[Term] = ()) -> None:
        """Take terms whose names differ.

        Raises:
            TrainError: Two have one name, or two replace the main loss.
        """
        super().__init__()
        self.terms = tuple(terms)
        self.objectives = nn.ModuleDict({term.name: term.objective for term in terms})
        replacing = [term.name for term in terms if term.objective.replaces_main]
        if len(self.objectives) < len(self.terms):
            raise TrainError(f"objectives {', '.join(t.name for t in terms)}: want each name once")
        if len(replacing) > 1:
            raise TrainError(
                f"objectives {' and '.join(replacing)} both compute the main loss; take one"
            )
        self.by_name = {term.name: term.objective for term in terms}
        self.hooks = tuple(dict.fromkeys(name for t in terms for name in t.objective.hooks))
        self.columns = tuple(
            name
            for term in terms
            for name in (term.name, *(f"{term.name}/{c}" for c in term.objective.columns))
        )
        """Names of what is logged of a step, after the main loss."""

    def __len__(self) -> int:
        return len(self.terms)

    def groups(self, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        """Return the groups of an optimizer for the objectives' own weights.

        Args:
            weight_decay: The training's, for objectives without one of their own.
            lr: The training's highest learning rate.
        """
        groups: list[dict[str, Any]] = []
        for objective in self.by_name.values():
            own = objective.weight_decay
            decay = weight_decay if own is None else own
            weights = [p for p in objective.parameters() if p.requires_grad]
            for part, its_decay in (
                ([p for p in weights if p.dim() >= 2], decay),
                ([p for p in weights if p.dim() < 2], 0.0),
            ):
                if part:
                    scale = 1.0 if objective.lr is None else objective.lr / lr
                    groups.append({"params": part, "weight_decay": its_decay, "lr_scale": scale})
        return groups

    def edits(self, index: int, n_steps: int) -> dict[str, Watch]:
        """Return the edits of the objectives of a step, those of one hook one after the other."""
        edits: dict[str, Watch] = {}
        for term in self.terms:
            changes = term.objective.edits() if term.is_on(index, n_steps) else {}
            for hook, watch in changes.items():
                edits[hook] = partial(_both, edits[hook], watch) if hook in edits else watch
        return edits

    def losses(self, step: Step) -> dict[str, Loss]:
        """Return the loss of every term that is part of the step."""
        return {
            term.name: term.objective(step)
            for term in self.terms
            if term.is_on(step.index, step.n_steps)
        }

    def values(self, losses: Mapping[str, Loss], like: Tensor) -> list[Tensor]:
        """Return the numbers of `columns` of a step; NaN for terms that are no part of it."""
        missing = like.new_full((), math.nan)
        values: list[Tensor] = []
        for term in self.terms:
            loss = losses.get(term.name)
            values.append(missing if loss is None else loss.value.to(like))
            for column in term.objective.columns:
                value = missing if loss is None else loss.columns.get(column, missing)
                values.append(value.to(like))
        return values

    def require_finite(
        self, vectors: Sequence[Sequence[float]], first_step: int, n_steps: int
    ) -> None:
        """Check the columns of steps in a row.

        Raises:
            TrainError: A term that was on is no finite number.
        """
        for i, term in ((self.columns.index(term.name), term) for term in self.terms):
            for step, vector in enumerate(vectors, start=first_step):
                if term.is_on(step, n_steps) and not math.isfinite(vector[i]):
                    raise TrainError(
                        f"objective {term.name} became {vector[i]} at step {step}. Lower its "
                        f"weight (now {term.weight:g}) or the learning rate"
                    )

    def means(self, vectors: Sequence[Sequence[float]]) -> dict[str, float]:
        """Return the mean of each column over the steps that had it; others are left out."""
        means: dict[str, float] = {}
        for name, values in zip(self.columns, zip(*vectors, strict=True), strict=True):
            numbers = [value for value in values if not math.isnan(value)]
            if numbers:
                means[name] = sum(numbers) / len(numbers)
        return means


def _both(first: Watch, second: Watch, acts: Tensor) -> Tensor | None:
    changed = first(acts)
    again = second(acts if changed is None else changed)
    return changed if again is None else again


def build_terms(settings: Sequence[ObjectiveSettings], context: ObjectiveContext) -> Terms:
    """Return the objectives that settings name, on the model's device.

    Raises:
        TrainError: One does not fit the model or what it is trained for.
        ModelError: A hook matches nothing.
    """
    place = "fine_tuning" if context.is_classifier else "train"
    terms: list[Term] = []
    for setting in settings:
        method = find_method(setting.kind)
        if place not in method.places:
            others = ", ".join(method.places)
            raise TrainError(f"objective {setting.kind} is not for {place}; it is for {others}")
        objective: Objective = method.load()(setting, context)
        schedule = (
            setting.weight,
            setting.start_fraction,
            setting.warmup_fraction,
            setting.every_steps,
        )
        terms.append(Term(setting.title, objective, *schedule))
    return Terms(terms).to(context.device)


def take_step(
    trainee: Trainee,
    parts: Sequence[tuple[TrainingBatch, float]],
    terms: Terms,
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    clip_norm: float,
    index: int,
    n_steps: int,
    accelerator: Accelerator | None = None,
    with_main: bool = True,
) -> Float[Tensor, "loss_and_columns"]:
    """Take one optimizer step on a batch; return its main loss and the columns of its terms.

    Args:
        trainee: What is trained.
        parts: The batch in parts that fit the memory, each with its share of the targets; terms
            are of a part and are averaged by these shares.
        terms: Objectives, none or some.
        optimizer: Of the trainee's weights and the objectives' own.
        lr: Learning rate of this step.
        clip_norm: Largest gradient norm, over all weights together.
        index: Steps taken before.
        n_steps: Steps in all.
        accelerator: What runs several processes or half precision, if anything.
        with_main: Whether the main loss is made small; else only the terms.
    """
    set_lr(optimizer, lr)
    totals = torch.zeros(1 + len(terms.columns), device=parts[0][0].ids.device)
    backward: Any = Tensor.backward if accelerator is None else accelerator.backward
    for i, (batch, share) in enumerate(parts):
        is_last = i == len(parts) - 1
        with (
            nullcontext() if accelerator is None or is_last else accelerator.no_sync(trainee.model)
        ):
            outputs = _main_pass(trainee, batch, terms, terms.edits(index, n_steps))
            if not share:  # the mean over no target is NaN
                backward(outputs.logits.sum() * 0.0)
                continue
            losses = terms.losses(Step(trainee, batch, outputs, index, n_steps, terms.by_name))
            main = next((x.main for x in losses.values() if x.main is not None), outputs.loss)
            loss = main * share if with_main else main.new_zeros(())
            for term in terms.terms:
                if term.name in losses and (weight := term.weight_at(index, n_steps)):
                    loss = loss + losses[term.name].value * (weight * share)
            if loss.requires_grad:
                backward(loss)
        totals += torch.stack([outputs.loss, *terms.values(losses, outputs.loss)]).detach() * share
    parameters = [*trainee.parameters(), *terms.parameters()]
    if accelerator is None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    else:
        # the objectives' own weights: no wrapper averages their gradients over processes
        for weight in terms.parameters() if accelerator.num_processes > 1 else ():
            if weight.grad is not None:
                weight.grad = accelerator.reduce(weight.grad, reduction="mean")  # pyright: ignore[reportAttributeAccessIssue]
        accelerator.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return totals


def _main_pass(
    trainee: Trainee, batch: TrainingBatch, terms: Terms, edits: Mapping[str, Watch]
) -> Outputs:
    """Run the model with what the terms change in it, and record what they read."""
    with ExitStack() as stack:
        if edits:
            stack.enter_context(attached(trainee.model, edits))
        # after the edits, so that what is recorded is what the model went on with
        acts = stack.enter_context(recording(trainee.model, terms.hooks)) if terms.hooks else {}
        outputs = trainee.run(batch, is_main=True)
    return Outputs(outputs.logits, outputs.loss, outputs.features, dict(acts)) if acts else outputs
