"""A language model tuned to classify texts whose labels may be wrong: whole, or by an adapter.

A linear head reads the last stream, pooled over a text's tokens; texts are read after an
end-of-text token. The model that is given is left as it was.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy import ndarray
from torch import Tensor, nn

from lmmono.errors import RobustnessError
from lmmono.models.hooks import bare
from lmmono.probes import losses
from lmmono.probes.text_reader import TextReader
from lmmono.registry.lookup import load
from lmmono.registry.suites import MonoVariant, TuningLoss, TuningMode
from lmmono.types import Progress, silent

LOSSES: dict[TuningLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": losses.cross_entropy,
    "label_smoothing": losses.label_smoothing,
    "gce": losses.generalised_cross_entropy,
    "sce": losses.symmetric_cross_entropy,
}
FULL_RATE, ADAPTER_RATE = 5e-5, 5e-4
"""Highest learning rates where none is given: an adapter's few weights want larger steps."""

ADAPTERS = "lmmono.methods.adapters:adapted"
"""Takes a model and the settings, returns the model with adapters; a room above this one."""

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


@dataclass(frozen=True, slots=True)
class TuningEpoch:
    """What is known after one pass over the training texts."""

    train_loss: float
    """Mean loss over the texts as they were seen."""
    val_accuracy: float
    """Share of validation texts put in their given, possibly wrong class."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledTexts:
    """Texts with given labels, which may be wrong."""

    texts: Sequence[str]
    labels: Int64[ndarray, "n"]


class Classifier:
    """A tuned model: the weights after the epoch that did best on given validation labels.

    Attributes:
        history: What each epoch came to.
        chosen_epoch: Index of the epoch whose weights these are.
        n_trained: Number of weights that were moved, the head's included.
        n_truncated: Training texts longer than the context, cut there.
    """

    def __init__(self, network: "_Network", reader: TextReader) -> None:
        self.network, self._reader = network, reader
        self.history: tuple[TuningEpoch, ...] = ()
        self.chosen_epoch = 0
        self.n_trained = sum(p.numel() for p in network.trained())
        self.n_truncated = 0

    @torch.no_grad()
    def predict(self, texts: Sequence[str], *, batch_texts: int = 32) -> Float32[ndarray, "n c"]:
        """Return log-probabilities of the classes of texts."""
        self.network.eval()
        ids = self._reader.read(texts)[0]
        batches = np.array_split(np.arange(len(ids)), range(batch_texts, len(ids), batch_texts))
        log_p = [self.logits([ids[i] for i in rows]).log_softmax(dim=-1) for rows in batches]
        return torch.cat(log_p).float().cpu().numpy() if log_p else np.empty((0, 0), np.float32)

    def logits(self, ids: Sequence[Int64[ndarray, "_"]]) -> Float[Tensor, "batch c"]:
        """Return the logits of texts that were read, one batch."""
        lengths = torch.tensor([len(row) for row in ids])
        return self.network(self._reader.block(ids), lengths)

    def accuracy(self, data: LabelledTexts) -> float:
        """Return the share of texts that are put in their class."""
        return float((self.predict(data.texts).argmax(axis=1) == data.labels).mean())

    @property
    def best(self) -> TuningEpoch:
        """What is known of the epoch whose weights these are."""
        return self.history[self.chosen_epoch]

    def __repr__(self) -> str:
        best = self.best
        return (
            f"Classifier({self.n_trained} weights trained, epoch {self.chosen_epoch + 1} of "
            f"{len(self.history)}, {best.val_accuracy:.3f} of given validation labels)"
        )


def finetune(
    model: nn.Module,
    train: LabelledTexts,
    val: LabelledTexts,
    *,
    n_classes: int,
    seed: int,
    settings: FineTuning | None = None,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> Classifier:
    """Tune a copy of a model to tell classes of texts apart.

    The same seed gives the same bits on one machine.

    Args:
        model: A causal language model of transformers or of lmmono.
        train: Texts to learn from.
        val: Texts to choose the epoch on; their given labels are as noisy as those of `train`.
        n_classes: Number of classes.
        seed: Seed of the head, the order of texts and dropout.
        settings: How; None takes the defaults.
        tokenizer: Its tokenizer; None takes `model.tokenizer`.
        progress: Called after every epoch.

    Raises:
        RobustnessError: Labels that cannot be learned from, no tokenizer, peft is not installed, or
            the loss is no number any more.
        ModelError: The settings do not fit the adapter, or the model has one that does not merge.
    """
    how, network = settings or FineTuning(), bare(model)
    if hasattr(model, "peft_config"):  # what the adapter learned goes into the weights of a copy
        network = copy.deepcopy(model).merge_and_unload()  # pyright: ignore[reportCallIssue]
    _check(train, val, n_classes)
    reader = TextReader(network, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(_Network(network, n_classes, how), reader)
        _train(classifier, train, val, how, seed, progress)
    return classifier


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


class _Network(nn.Module):
    """A copy of a model's body with a linear head."""

    def __init__(self, network: nn.Module, n_classes: int, how: FineTuning) -> None:
        super().__init__()
        body: Any = copy.deepcopy(getattr(network, "base_model", network))
        d_model = int(body.config.hidden_size)
        body.requires_grad_(True)  # a model that was frozen to be studied is tuned all the same
        self.body = body if how.method == "full" else _adapted(body, how)
        self.head = nn.Linear(d_model, n_classes, device=next(body.parameters()).device)
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
        ids, lengths = ids.to(self.head.weight.device), lengths.to(self.head.weight.device)
        stream = self.body(input_ids=ids, use_cache=False).last_hidden_state
        if self._pooling == "last":
            return self.head(stream[torch.arange(len(ids)), lengths - 1])
        place = torch.arange(ids.shape[1], device=ids.device)
        begins = (lengths - 1).clamp_max(1)[:, None]  # the first token, unless it is all there is
        used = ((place >= begins) & (place < lengths[:, None])).to(stream.dtype)[..., None]
        return self.head((stream * used).sum(dim=1) / used.sum(dim=1))


def _adapted(body: Any, how: FineTuning) -> nn.Module:
    try:
        import_module("peft")  # which the room of adapters imports at its top
    except ImportError as fault:
        raise RobustnessError(
            f"method {how.method} needs one package more: pip install 'lmmono[noise]'"
        ) from fault
    return load(ADAPTERS)(body, how)


def _train(
    classifier: Classifier,
    train: LabelledTexts,
    val: LabelledTexts,
    how: FineTuning,
    seed: int,
    progress: Progress,
) -> None:
    """Train epoch by epoch and leave the weights of the best one in place."""
    network, reader = classifier.network, classifier._reader  # pyright: ignore[reportPrivateUsage]
    ids, classifier.n_truncated, _ = reader.read(train.texts)
    labels, order = torch.from_numpy(train.labels), np.random.default_rng(seed)
    per_epoch = -(-len(ids) // how.batch_texts)
    n_steps = how.epochs * per_epoch if how.steps is None else how.steps
    lr = (FULL_RATE if how.method == "full" else ADAPTER_RATE) if how.lr is None else how.lr
    optimizer = torch.optim.AdamW(network.trained(), lr=lr, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _slope(step, n_steps))
    best: tuple[tuple[float, float], list[Tensor]] | None = None
    for epoch in range(-(-n_steps // per_epoch)):
        network.train()
        total, n_seen = 0.0, 0
        left = n_steps - epoch * per_epoch
        shuffled = np.array_split(
            order.permutation(len(ids)), range(how.batch_texts, len(ids), how.batch_texts)
        )
        for rows in shuffled[:left]:
            logits = classifier.logits([ids[i] for i in rows])
            loss = LOSSES[how.loss](logits.T, labels[rows].to(logits.device)).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.trained(), MAX_NORM)
            optimizer.step()
            schedule.step()
            total, n_seen = total + float(loss.detach()) * len(rows), n_seen + len(rows)
        if not math.isfinite(total):
            raise RobustnessError(f"tuning diverged in epoch {epoch + 1}: want an lr below {lr:g}")
        done = TuningEpoch(total / n_seen, classifier.accuracy(val))
        classifier.history += (done,)
        progress("epochs", epoch + 1, -(-n_steps // per_epoch), loss=done.train_loss)
        value = (done.val_accuracy, -done.train_loss)
        if best is None or value[0] > best[0][0]:
            classifier.chosen_epoch = epoch
            best = value, [p.detach().clone() for p in network.trained()]
    assert best is not None
    for weight, best_weight in zip(network.trained(), best[1], strict=True):
        weight.data.copy_(best_weight)


def _slope(step: int, n_steps: int) -> float:
    """Return the share of the learning rate: up over a tenth of the steps, then down to 0."""
    warmup = max(1, n_steps // 10)
    return min((step + 1) / warmup, (n_steps - step) / max(1, n_steps - warmup))
