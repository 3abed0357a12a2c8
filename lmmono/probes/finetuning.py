"""A language model tuned to classify texts whose labels may be wrong: whole, or by an adapter.

A linear head reads the last stream, pooled over a text's tokens; texts are read after an
end-of-text token. The model that is given is left as it was.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from numpy import ndarray
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lmmono.errors import RobustnessError, TrainError
from lmmono.files.atomic import atomic_folder, remove_folder
from lmmono.files.digests import damaged_files, folder_digests
from lmmono.files.json_files import read_json
from lmmono.models.hooks import bare
from lmmono.probes import losses
from lmmono.probes.text_reader import TextReader
from lmmono.recipe.objective_settings import AnyObjective
from lmmono.registry.lookup import load
from lmmono.registry.methods import find_method
from lmmono.registry.suites import MonoVariant, TuningLoss, TuningMode
from lmmono.training.checkpoint import (
    Position,
    load_checkpoint,
    restore_weights,
    save_checkpoint,
    save_weights,
)
from lmmono.training.objectives import (
    ObjectiveContext,
    Outputs,
    Term,
    Terms,
    Trainee,
    TrainingBatch,
    build_terms,
    take_step,
)
from lmmono.types import Progress, silent


@dataclass(frozen=True, slots=True)
class TuningCriterion:
    """What a tuned model minimises, and what reads its features."""

    loss: Callable[[Float[Tensor, "c n"], Int64[Tensor, "n"]], Float[Tensor, "n"]]
    """Loss of each text from the logits of all."""
    head: str | None = None
    """`module:name` of what is called with d_model and the number of classes, and returns the
    module from features to logits; None for a linear layer."""


LOSSES: dict[TuningLoss, TuningCriterion] = {
    "ce": TuningCriterion(losses.cross_entropy),
    "label_smoothing": TuningCriterion(losses.label_smoothing),
    "gce": TuningCriterion(losses.generalised_cross_entropy),
    "sce": TuningCriterion(losses.symmetric_cross_entropy),
    "nonneg_ce": TuningCriterion(losses.cross_entropy, "lmmono.methods.nonneg:NonNegativeHead"),
}
FULL_RATE, ADAPTER_RATE = 5e-5, 5e-4
"""Highest learning rates where none is given: an adapter's few weights want larger steps."""

MAX_NORM = 1.0
"""Gradients are shortened to this length, as language models are trained."""


@dataclass(frozen=True, slots=True)
class FineTuning:
    """How a model is tuned."""

    method: TuningMode = "full"
    """`full` moves every weight; the others add low-rank updates to the model's linear layers; see
    `lmmono.methods.adapters`."""
    variant: MonoVariant = "relu_both"
    """Where `monolora` has its non-negative maps: candidates, for the paper's could not be read."""
    loss: TuningLoss = "ce"
    epochs: int = 3
    """Passes over the training texts, each judged on the validation texts."""
    steps: int | None = None
    """Steps in all, in place of `epochs`: the last pass is then cut short."""
    batch_texts: int = 16
    lr: float | None = None
    """Highest learning rate, after a tenth of the steps; None: 5e-5, for adapters 5e-4."""
    weight_decay: float = 0.01
    rank: int = 8
    """Rank of an adapter's updates."""
    alpha: int = 16
    """An adapter's updates are scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout before an adapter's updates."""
    k: int = 4
    """Coordinates of a code that stay, of `topk_code` and `topk_lora`."""
    start_std: float = 1e-3
    """Standard deviation that B begins with where a ReLU follows it; elsewhere B begins at 0."""
    anneal_steps: int = 0
    """Training passes over which `topk_lora` cools its soft gate to a tenth; 0 leaves it warm."""
    pooling: Literal["mean", "last"] = "mean"
    """How the tokens of a text become one vector."""
    objectives: tuple[AnyObjective, ...] = ()
    """Loss terms added to the loss; `lmmono ls methods` lists them."""

    @property
    def identity(self) -> dict[str, Any]:
        """Every setting as JSON has it; objectives only where there are some."""
        settings = {name: value for name, value in asdict(self).items() if name != "objectives"}
        dumped = [objective.model_dump(mode="json") for objective in self.objectives]
        return {**settings, "objectives": dumped} if dumped else settings


@dataclass(frozen=True, slots=True)
class TuningEpoch:
    """What is known after one pass over the training texts."""

    train_loss: float
    """Mean loss over the texts as they were seen, without that of objectives."""
    val_accuracy: float
    """Share of validation texts put in their given, possibly wrong class."""
    terms: dict[str, float] = field(default_factory=dict[str, float])
    """Mean of each column of the objectives, over the steps that had it."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledTexts:
    """Texts with given labels, which may be wrong."""

    texts: Sequence[str]
    labels: Int64[ndarray, "n"]


class Classifier:
    """A tuned model: the weights after the epoch that did best on given validation labels.

    Attributes:
        network: Body and head.
        reader: How texts become token ids.
        settings: How it was tuned.
        history: What each epoch came to.
        chosen_epoch: Index of the epoch whose weights these are.
        n_trained: Number of weights that were moved, the head's included.
        n_truncated: Training texts longer than the context, cut there.
        terms: The objectives that it was tuned with, as they were after that epoch.
    """

    def __init__(self, network: "TextNetwork", reader: TextReader, settings: FineTuning) -> None:
        self.network, self.reader, self.settings = network, reader, settings
        self.history: tuple[TuningEpoch, ...] = ()
        self.chosen_epoch = 0
        self.n_trained = sum(p.numel() for p in network.trained())
        self.n_truncated = 0
        self.terms = Terms()

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.network.n_classes

    @torch.no_grad()
    def predict(self, texts: Sequence[str], *, batch_texts: int = 32) -> Float32[ndarray, "n c"]:
        """Return log-probabilities of the classes of texts."""
        self.network.eval()
        ids = self.reader.read(texts)[0]
        batches = np.array_split(np.arange(len(ids)), range(batch_texts, len(ids), batch_texts))
        log_p = [self.logits([ids[i] for i in rows]).log_softmax(dim=-1) for rows in batches]
        return torch.cat(log_p).float().cpu().numpy() if log_p else np.empty((0, 0), np.float32)

    def logits(self, ids: Sequence[Int64[ndarray, "_"]]) -> Float[Tensor, "batch c"]:
        """Return the logits of texts that were read, one batch."""
        lengths = torch.tensor([len(row) for row in ids])
        return self.network(self.reader.block(ids), lengths)

    def accuracy(self, data: LabelledTexts) -> float:
        """Return the share of texts that are put in their class."""
        return float((self.predict(data.texts).argmax(axis=1) == data.labels).mean())

    @property
    def best(self) -> TuningEpoch:
        """What is known of the epoch whose weights these are."""
        return self.history[self.chosen_epoch]

    def save(self, folder: str | Path) -> None:
        """Write the weights and what is known of them; a failure leaves what was there.

        Raises:
            RunError: The disk refuses.
        """
        facts = StoredClassifier(
            settings=self.settings.identity,
            n_classes=self.n_classes,
            history=self.history,
            chosen_epoch=self.chosen_epoch,
            n_truncated=self.n_truncated,
            files={},
        )
        with atomic_folder(Path(folder)) as fresh:
            save_weights(self.network, fresh / "weights.safetensors")
            stored = asdict(facts) | {"files": folder_digests(fresh)}
            (fresh / "classifier.json").write_text(json.dumps(stored, indent=1))

    def __repr__(self) -> str:
        if not self.history:
            return f"Classifier({self.n_trained} weights, not trained)"
        best = self.best
        return (
            f"Classifier({self.n_trained} weights trained, epoch {self.chosen_epoch + 1} of "
            f"{len(self.history)}, {best.val_accuracy:.3f} of given validation labels)"
        )


@dataclass(frozen=True, slots=True)
class StoredClassifier:
    """What `classifier.json` holds."""

    settings: dict[str, Any]
    """How the model was tuned."""
    n_classes: int
    """Number of classes."""
    history: tuple[TuningEpoch, ...]
    """What each epoch came to."""
    chosen_epoch: int
    """Index of the epoch whose weights are stored."""
    n_truncated: int
    """Training texts that were cut."""
    files: dict[str, str]
    """SHA-256 of the other files."""


def load_classifier(folder: str | Path, model: nn.Module, tokenizer: Any = None) -> Classifier:
    """Return a classifier that `Classifier.save` wrote, to the bit.

    Args:
        folder: Where it was saved.
        model: The model that was tuned, or another one of its shape: only that is taken.
        tokenizer: Its tokenizer; None takes `model.tokenizer`.

    Raises:
        RobustnessError: The files are damaged, or do not fit the model.
    """
    folder = Path(folder)
    stored = read_json(folder / "classifier.json", StoredClassifier, RobustnessError)
    if faults := damaged_files(folder, stored.files):
        raise RobustnessError(f"{folder}: {'; '.join(faults)}; tune the model again")
    try:
        settings = TypeAdapter(FineTuning).validate_json(json.dumps(stored.settings))
        with torch.random.fork_rng(devices=[]):
            network = TextNetwork(bare(model), stored.n_classes, settings)
        restore_weights(network, load_file(folder / "weights.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as fault:
        raise RobustnessError(
            f"{folder}: its weights do not fit this {type(bare(model)).__name__} ({fault}); give "
            "the model that was tuned"
        ) from fault
    classifier = Classifier(network, TextReader(bare(model), tokenizer), settings)
    classifier.history, classifier.chosen_epoch = stored.history, stored.chosen_epoch
    classifier.n_truncated = stored.n_truncated
    return classifier


def finetune(
    model: nn.Module,
    train: LabelledTexts,
    val: LabelledTexts,
    *,
    n_classes: int,
    seed: int,
    settings: FineTuning | None = None,
    tokenizer: Any = None,
    terms: Sequence[Term] = (),
    keep: Literal["best", "last"] = "best",
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> Classifier:
    """Tune a copy of a model to tell classes of texts apart.

    The same seed gives the same bits on one machine, whether stopped and resumed or not.

    Args:
        model: A causal language model of transformers or of lmmono.
        train: Texts to learn from.
        val: Texts to choose the epoch on; their given labels are as noisy as those of `train`.
        n_classes: Number of classes.
        seed: Seed of the head, the order of texts and dropout.
        settings: How; None takes the defaults.
        tokenizer: Its tokenizer; None takes `model.tokenizer`.
        terms: Objectives of your own, beside those that the settings name.
        keep: Whether the weights of the best epoch are kept, or those of the last one.
        folder: Where the state after each epoch is kept until all are done, so that the same call
            goes on there; None keeps nothing.
        progress: Called after every epoch.

    Raises:
        RobustnessError: Labels that cannot be learned from, no tokenizer, peft is not installed, or
            the loss is no number any more.
        ModelError: The settings do not fit the adapter, or the model has one that does not merge.
        TrainError: An objective does not fit.
    """
    how, network = settings or FineTuning(), bare(model)
    if hasattr(model, "peft_config"):  # what the adapter learned goes into the weights of a copy
        network = copy.deepcopy(model).merge_and_unload()  # pyright: ignore[reportCallIssue]
    _check(train, val, n_classes)
    reader = TextReader(network, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(TextNetwork(network, n_classes, how), reader, how)
        _train(
            _Tuning(classifier, train, val, how, seed, terms, keep=keep, folder=folder), progress
        )
    return classifier


def tune(
    classifier: Classifier,
    train: LabelledTexts,
    val: LabelledTexts,
    *,
    seed: int,
    settings: FineTuning | None = None,
    terms: Sequence[Term] = (),
    frozen: bool = False,
    keep: Literal["best", "last"] = "best",
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> None:
    """Train a classifier further, in place.

    Args:
        classifier: What is trained.
        train: Texts to learn from.
        val: Texts to choose the epoch on.
        seed: Seed of the order of texts, of dropout and of what objectives draw.
        settings: How; None takes those it was tuned by. Its kind of adapter and its head stay.
        terms: Objectives beside those that the settings name.
        frozen: Keep the classifier's weights, to the bit, and train only those of objectives; it is
            then in evaluation mode.
        keep: Whether the best epoch is kept, as in `finetune`, or the last one.
        folder: As in `finetune`.
        progress: Called after every epoch.

    Raises:
        RobustnessError: Labels that cannot be learned from, or the loss is no number any more.
        TrainError: An objective does not fit, or nothing is left to train.
    """
    _check(train, val, classifier.n_classes)
    how = settings or classifier.settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        job = _Tuning(classifier, train, val, how, seed, terms, frozen, keep, folder)
        with _frozen(classifier.network) if frozen else nullcontext():
            _train(job, progress)


def _check(train: LabelledTexts, val: LabelledTexts, n_classes: int) -> None:
    for name, data in (("train", train), ("val", val)):
        if len(data.texts) != len(data.labels):
            raise RobustnessError(f"{name}: {len(data.texts)} texts, {len(data.labels)} labels")
        if not len(data.texts):
            raise RobustnessError(f"{name}: no text; want at least one")
        low, high = int(data.labels.min()), int(data.labels.max())
        if low < 0 or high >= n_classes:
            raise RobustnessError(f"{name}: labels {low} to {high}, want 0 to {n_classes - 1}")
    missing = sorted(set(range(n_classes)) - set(train.labels.tolist()))
    if missing:
        raise RobustnessError(
            f"train: no label is of class {', '.join(map(str, missing))}; a model cannot learn it"
        )


class TextNetwork(nn.Module):
    """A copy of a model's body with a linear head."""

    def __init__(self, network: nn.Module, n_classes: int, how: FineTuning) -> None:
        super().__init__()
        body: Any = copy.deepcopy(getattr(network, "base_model", network))
        self.d_model, self.n_classes = int(body.config.hidden_size), n_classes
        device = next(body.parameters()).device
        body.requires_grad_(True)  # a model that was frozen to be studied is tuned all the same
        self.body = body if how.method == "full" else _adapted(body, how)
        criterion = LOSSES[how.loss]
        if criterion.head is not None:
            self.head: nn.Module = load(criterion.head)(self.d_model, n_classes).to(device)
        else:
            self.head = nn.Linear(self.d_model, n_classes, device=device)
            nn.init.normal_(self.head.weight, std=0.02)  # as GPT-2 begins
            nn.init.zeros_(self.head.bias)
        self._pooling = how.pooling

    def trained(self) -> list[nn.Parameter]:
        """Return the weights that move."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(
        self, ids: Int64[Tensor, "batch pos"], lengths: Int64[Tensor, "batch"]
    ) -> Float[Tensor, "batch c"]:
        """Return logits; tokens beyond a text's length come after it and change nothing."""
        return self.head(self.features(ids, lengths))

    def features(
        self, ids: Int64[Tensor, "batch pos"], lengths: Int64[Tensor, "batch"]
    ) -> Float[Tensor, "batch d_model"]:
        """Return what the head reads: the last stream, pooled over a text's tokens."""
        device = next(self.body.parameters()).device
        ids, lengths = ids.to(device), lengths.to(device)
        stream = self.body(input_ids=ids, use_cache=False).last_hidden_state
        if self._pooling == "last":
            return stream[torch.arange(len(ids)), lengths - 1]
        used = pooled_tokens(ids.shape[1], lengths).to(stream.dtype)[..., None]
        return (stream * used).sum(dim=1) / used.sum(dim=1)


def pooled_tokens(n_pos: int, lengths: Int64[Tensor, "batch"]) -> Bool[Tensor, "batch pos"]:
    """Return which tokens count in a mean: all but the first, unless it is all there is."""
    place = torch.arange(n_pos, device=lengths.device)
    begins = (lengths - 1).clamp_max(1)[:, None]
    return (place >= begins) & (place < lengths[:, None])


class ClassifierTrainee(Trainee):
    """A classifier of texts that learns their classes."""

    is_classifier = True

    def __init__(self, network: TextNetwork, reader: TextReader, loss: TuningLoss) -> None:
        """Take body, head and the name of the main loss."""
        self.network, self.reader, self._criterion = network, reader, LOSSES[loss]

    @property
    def model(self) -> nn.Module:
        """The body, whose hooks have the names that they have in the whole model."""
        return self.network.body

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the weights that move."""
        return self.network.trained()

    def run(self, batch: TrainingBatch, *, is_main: bool = False) -> Outputs:  # noqa: ARG002
        """Run texts; every pass is alike."""
        features = self.network.features(batch.ids, batch.is_token.sum(dim=1))
        logits = self.network.head(features)
        return Outputs(logits, self.loss_of(logits, batch.labels), features)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """Return the mean of the main loss over texts."""
        return self._criterion.loss(logits.T, labels).mean()

    def read(self, texts: Sequence[str], labels: Tensor) -> TrainingBatch:
        """Return texts as a batch, on the model's device."""
        return self.batch(self.reader.read(texts)[0], labels, tuple(texts))

    def batch(
        self,
        ids: Sequence[Int64[ndarray, "_"]],
        labels: Int64[Tensor, "batch"],
        texts: tuple[str, ...],
        rows: Int64[ndarray, "batch"] | None = None,
    ) -> TrainingBatch:
        """Return texts that were read as a batch, on the model's device."""
        device = next(self.network.parameters()).device
        block = self.reader.block(ids)
        lengths = torch.tensor([len(row) for row in ids])
        is_token = torch.arange(block.shape[1]) < lengths[:, None]
        return TrainingBatch(block.to(device), is_token.to(device), labels.to(device), texts, rows)


def _adapted(body: Any, how: FineTuning) -> nn.Module:
    try:
        import_module("peft")  # which the room of adapters imports at its top
    except ImportError as fault:
        raise RobustnessError(
            f"method {how.method} needs one package more: pip install 'lmmono[noise]'"
        ) from fault
    return find_method(how.method).load()(body, how)


@contextmanager
def _frozen(network: nn.Module) -> Generator[None]:
    """Let no weight of a network move, in the block."""
    moving = [p for p in network.parameters() if p.requires_grad]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for weight in moving:
            weight.requires_grad_(True)


@dataclass(frozen=True, slots=True, eq=False)
class _Tuning:
    """One training of a classifier."""

    classifier: Classifier
    train: LabelledTexts
    val: LabelledTexts
    how: FineTuning
    seed: int
    terms: Sequence[Term] = ()
    is_frozen: bool = False
    keep: Literal["best", "last"] = "best"
    folder: str | Path | None = None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides the result, the model's own weights apart."""
        texts = [[*map(str, d.texts), *d.labels.tolist()] for d in (self.train, self.val)]
        names = [term.name for term in self.terms]
        parts = [self.how.identity, self.seed, self.is_frozen, self.keep, names, texts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def build_terms(self, n_steps: int) -> Terms:
        """Return the objectives that the settings name, and those that were given."""
        network = self.classifier.network
        context = ObjectiveContext(
            model=network.body,
            is_classifier=True,
            n_steps=n_steps,
            seed=self.seed,
            d_model=network.d_model,
            n_classes=network.n_classes,
            tokenizer=self.classifier.reader.tokenizer,
            texts=tuple(self.train.texts),
            pooling=self.classifier.settings.pooling,
        )
        named = build_terms(self.how.objectives, context).terms
        return Terms([*named, *self.terms]).to(context.device)


class _Kept(nn.Module):
    """Copies of the weights of the epoch that is kept, and of its objectives' state."""

    def __init__(self, network: TextNetwork, terms: Terms) -> None:
        super().__init__()
        self._sources = [*network.trained(), *terms.parameters(), *terms.buffers()]
        for i, tensor in enumerate(self._sources):
            self.register_buffer(f"copy_{i}", tensor.detach().clone())

    @torch.no_grad()
    def take(self) -> None:
        for copied, tensor in zip(self.buffers(), self._sources, strict=True):
            copied.copy_(tensor)

    @torch.no_grad()
    def put_back(self) -> None:
        for copied, tensor in zip(self.buffers(), self._sources, strict=True):
            tensor.copy_(copied)


def _train(job: _Tuning, progress: Progress) -> None:
    """Train epoch by epoch and leave the weights of the epoch to keep in place.

    Raises:
        RobustnessError: The loss is no number any more.
        TrainError: An objective does not fit, its term is no number, nothing is left to train, or
            the state in the job's folder is damaged or of another training.
    """
    classifier, how = job.classifier, job.how
    network, reader = classifier.network, classifier.reader
    trainee = ClassifierTrainee(network, reader, how.loss)
    ids, classifier.n_truncated, _ = reader.read(job.train.texts)
    labels, order = torch.from_numpy(job.train.labels), np.random.default_rng(job.seed)
    per_epoch = -(-len(ids) // how.batch_texts)
    n_steps = how.epochs * per_epoch if how.steps is None else how.steps
    n_epochs = -(-n_steps // per_epoch)
    lr = (FULL_RATE if how.method == "full" else ADAPTER_RATE) if how.lr is None else how.lr
    terms = job.build_terms(n_steps)
    groups = [{"params": network.trained()}, *terms.groups(how.weight_decay, lr)]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainError("nothing to train: the classifier is frozen and no objective has weights")
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=how.weight_decay)
    kept, history, chosen = _Kept(network, terms), list[TuningEpoch](), 0
    whole = nn.ModuleDict({"network": network, "objectives": terms, "kept": kept})
    folder = None if job.folder is None else Path(job.folder)
    position = None if folder is None else load_checkpoint(folder, whole, optimizer, job.digest)
    if position is not None:
        history = TypeAdapter(list[TuningEpoch]).validate_python(position.facts["history"])
        chosen = int(position.facts["chosen"])
    for epoch in range(n_epochs):
        permutation = order.permutation(len(ids))
        if epoch < len(history):  # done before a stop; its order is drawn all the same
            continue
        network.train(not job.is_frozen)
        terms.train()
        n_seen, vectors = 0, list[list[float]]()
        total = 0.0
        left = n_steps - epoch * per_epoch
        shuffled = np.array_split(permutation, range(how.batch_texts, len(ids), how.batch_texts))
        for i, rows in enumerate(shuffled[:left], start=epoch * per_epoch):
            batch = trainee.batch(
                [ids[row] for row in rows],
                labels[rows],
                tuple(str(job.train.texts[row]) for row in rows),
                rows,
            )
            loss, *columns = take_step(
                trainee,
                [(batch, 1.0)],
                terms,
                optimizer,
                lr=lr * _slope(i, n_steps),
                clip_norm=MAX_NORM,
                index=i,
                n_steps=n_steps,
                with_main=not job.is_frozen,
            ).tolist()
            vectors.append(columns)
            total, n_seen = total + loss * len(rows), n_seen + len(rows)
        if not math.isfinite(total):
            raise RobustnessError(f"tuning diverged in epoch {epoch + 1}: want an lr below {lr:g}")
        terms.require_finite(vectors, epoch * per_epoch, n_steps)
        accuracy = classifier.accuracy(job.val)
        history.append(TuningEpoch(total / n_seen, accuracy, terms.means(vectors)))
        progress("epochs", epoch + 1, n_epochs, loss=history[-1].train_loss)
        if job.keep == "last" or not epoch or accuracy > history[chosen].val_accuracy:
            chosen = epoch
            kept.take()
        if folder is not None:
            facts = {"history": [asdict(past) for past in history], "chosen": chosen}
            at = Position((epoch + 1) * per_epoch, job.digest, None, [], facts=facts)
            save_checkpoint(folder, whole, optimizer, at)
    kept.put_back()
    terms.eval()
    classifier.history, classifier.chosen_epoch, classifier.terms = tuple(history), chosen, terms
    if folder is not None:
        remove_folder(folder)


def _slope(step: int, n_steps: int) -> float:
    """Return the share of the learning rate: up over a tenth of the steps, then down to 0."""
    warmup = max(1, n_steps // 10)
    return min((step + 1) / warmup, (n_steps - step) / max(1, n_steps - warmup))
