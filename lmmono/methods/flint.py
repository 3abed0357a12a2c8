"""FLINT on text: a classifier and an interpreter of it, learned together or one after the other.

    by_design   classes and interpretation are learned at once, from a language model
    post_hoc    a finished classifier is read, and keeps its weights to the bit

    folder/classifier/               as `Classifier.save` writes it
           interpreter.safetensors   Psi, head, decoder
           flint.json                settings, hooks, classes, digests; written last

What it reads off a text is an `Interpretation`; `Flint.model` is the classifier with the attributes
as hook `flint.hook_attributes`, which `lmmono.capture` stores like any other.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from numpy import ndarray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from activation_store.write.recorder import digest as weights_digest
from lmmono.errors import RobustnessError
from lmmono.files.atomic import atomic_folder
from lmmono.files.digests import damaged_files, folder_digests
from lmmono.files.json_files import read_json, settings_faults
from lmmono.methods import flint_measures as measures
from lmmono.methods.flint_interpreter import Interpreter, counted_tokens
from lmmono.methods.flint_objective import FlintObjective, build_interpreter, check_classes
from lmmono.methods.flint_words import ContentWords
from lmmono.models.hooks import bare, recording
from lmmono.probes.finetuning import (
    Classifier,
    FineTuning,
    LabelledTexts,
    finetune,
    load_classifier,
    tune,
)
from lmmono.recipe.objective_settings import FlintSettings
from lmmono.training.objectives import ObjectiveContext, Term
from lmmono.types import Progress, silent

Mode = Literal["by_design", "post_hoc"]

NAME = "flint"
"""Name of the term in a training's columns."""

ATTRIBUTES = "flint.hook_attributes"
"""Hook of the attributes in `Flint.model`."""


@runtime_checkable
class TextsWithLabels(Protocol):
    """Texts with the number of their class: `LabelledTexts`, or a part of a task."""

    @property
    def texts(self) -> Sequence[str]:
        """The texts."""
        ...

    @property
    def labels(self) -> ndarray:
        """Their classes."""
        ...


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What a classifier f and its interpreter g make of some texts."""

    ids: Sequence[Int64[ndarray, "_"]]
    """Tokens of each text, the one before it included."""
    acts: Sequence[Float32[ndarray, "_ attribute"]] = field(repr=False)
    """Act of every attribute on every token, one array per text."""
    phi: Float32[ndarray, "n attribute"] = field(repr=False)
    """Attributes of the texts."""
    log_p: Float32[ndarray, "n c"] = field(repr=False)
    """Log-probabilities of the classifier."""
    scores: Float32[ndarray, "n c"] = field(repr=False)
    """Logits of the interpreter."""
    weight: Float32[ndarray, "attribute c"] = field(repr=False)
    """Weights of the interpreter's head."""

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.scores.shape[1]

    @cached_property
    def classes(self) -> Int64[ndarray, " n"]:
        """Class that the interpreter gives each text."""
        return self.scores.argmax(axis=1)

    @cached_property
    def agree(self) -> Bool[ndarray, " n"]:
        """Texts on which the classifier gives the same class."""
        return self.classes == self.log_p.argmax(axis=1)

    @cached_property
    def alpha(self) -> Float[ndarray, "n attribute"]:
        """What each attribute adds to the score of the interpreter's class."""
        return measures.contributions(self.phi, self.weight, self.classes)

    @cached_property
    def relevance(self) -> Float[ndarray, "n attribute"]:
        """Alpha over its largest magnitude."""
        return measures.relevance(self.alpha)

    @cached_property
    def matrix(self) -> Float[ndarray, "c attribute"]:
        """Mean relevance by class, over the texts where both agree."""
        return measures.global_relevance(self.relevance, self.classes, self.agree, self.n_classes)

    @property
    def own_log_p(self) -> Float[ndarray, "n c"]:
        """Log-probabilities of the interpreter."""
        return torch.from_numpy(self.scores).double().log_softmax(-1).numpy()


class InterpretedModel(nn.Module):
    """The classifier with the attributes as a hook, for `lmmono.capture` and `run_with_cache`.

    The classifier's own hooks have the names that they have in the language model.
    """

    def __init__(self, classifier: Classifier, interpreter: Interpreter, hooks: Sequence[str]):
        super().__init__()
        self.network, self.flint = classifier.network, interpreter
        self.hooks, self.tokenizer = tuple(hooks), classifier.reader.tokenizer

    @property
    def config(self) -> Any:
        """Configuration of the language model."""
        body: Any = bare(self.network.body)
        return body.config

    def get_decoder(self) -> nn.Module:
        """Return the module that hook names are relative to."""
        body: Any = bare(self.network.body)
        return body.get_decoder() if hasattr(body, "get_decoder") else body

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings."""
        body: Any = bare(self.network.body)
        return body.get_input_embeddings()

    def forward(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> Any:
        """Return the classifier's logits, [batch, 1, c]: a text has one class.

        Padding stands at the end, where nothing sees it.
        """
        del position_ids, use_cache
        full = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        lengths = full if attention_mask is None else attention_mask.sum(1)
        with recording(self.network.body, self.hooks) as acts:
            logits = self.network(input_ids, lengths)
            self.flint.attributes([acts[hook] for hook in self.hooks])
        return SimpleNamespace(logits=logits[:, None])


class Flint:
    """An interpreter of a classifier of texts: FLINT, arXiv 2010.09345.

    Attributes:
        settings: The checked settings.
        mode: Whether the classifier is learned with it.
        tuning: How the classifier is learned.
        classifier: The classifier f, once fitted.
        interpreter: Psi, head and decoder, once fitted.
        hooks: Hooks that it reads.
        facts: What the fit says of itself: digest of the classifier, warnings.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int | str] | None = None,
        n_attributes: int = 24,
        mode: Mode | str = "by_design",
        tuning: FineTuning | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        """Check the settings; nothing is computed before `fit`.

        Args:
            layers: Blocks by number, or hooks by name; None takes two late ones.
            n_attributes: Attributes.
            mode: `by_design` or `post_hoc`.
            tuning: How the classifier is tuned, and how long; None takes the defaults.
            seed: Seed of everything random.
            **settings: Further fields of the objective `flint`, such as decoder, diversity, variant
                or head; `lmmono.recipe.objective_settings.FlintSettings` has them all.

        Raises:
            RobustnessError: A setting is unknown or out of range.
        """
        if mode != "by_design" and mode != "post_hoc":
            raise RobustnessError(f"Flint: mode: want by_design or post_hoc, got {mode!r}")
        chosen = {"layers": None if layers is None else tuple(layers), "n_attributes": n_attributes}
        try:
            self.settings = FlintSettings.model_validate({**chosen, **settings})
        except ValidationError as error:
            raise RobustnessError(settings_faults("Flint", error)) from None
        self.mode: Mode = mode
        self.tuning, self.seed = tuning or FineTuning(), seed
        self.hooks: tuple[str, ...] = ()
        self.facts: dict[str, Any] = {}
        self._classifier: Classifier | None = None
        self._interpreter: Interpreter | None = None

    @property
    def classifier(self) -> Classifier:
        """The classifier f."""
        return self._fitted(self._classifier)

    @property
    def interpreter(self) -> Interpreter:
        """Psi, pooling, head and decoder."""
        return self._fitted(self._interpreter)

    @property
    def model(self) -> InterpretedModel:
        """The classifier with hook `flint.hook_attributes`."""
        return InterpretedModel(self.classifier, self.interpreter, self.hooks).eval()

    def fit(
        self,
        model: nn.Module | Classifier,
        train: TextsWithLabels,
        val: TextsWithLabels,
        *,
        n_classes: int | None = None,
        tokenizer: Any = None,
        folder: str | Path | None = None,
        progress: Progress = silent,
    ) -> "Flint":
        """Learn the interpreter, and the classifier where it is not given.

        The weights of the last epoch are kept: those of an earlier one are from before the end of
        the schedule.

        Args:
            model: A language model; post hoc a classifier of `finetune` too.
            train: Texts to learn from, with their classes.
            val: Texts that epochs are judged on.
            n_classes: Number of classes; None takes the largest label and one.
            tokenizer: Where the model has none.
            folder: Where the state after each epoch is kept, so that the same call goes on there.
            progress: Called after every epoch.

        Returns:
            This object, fitted.

        Raises:
            RobustnessError: The labels cannot be learned, the model lacks a layer, there are too
                many classes, by design gets a finished classifier, or every attribute died.
        """
        labelled, judged = _labelled(train), _labelled(val)
        n = max(labelled.labels.max(initial=0), judged.labels.max(initial=0)) + 1
        n_classes = int(n) if n_classes is None else n_classes
        check_classes(n_classes, self.settings.n_attributes)
        where = None if folder is None else Path(folder)
        if self.mode == "by_design":
            if isinstance(model, Classifier):
                raise RobustnessError(
                    "Flint: by design learns classifier and interpreter together, from a language "
                    "model; a finished classifier is for mode='post_hoc'"
                )
            how = replace(self.tuning, objectives=(*self.tuning.objectives, self.settings))
            classifier = finetune(
                model,
                labelled,
                judged,
                n_classes=n_classes,
                seed=self.seed,
                settings=how,
                tokenizer=tokenizer,
                keep="last",
                folder=None if where is None else where / "both",
                progress=progress,
            )
            objective = classifier.terms.by_name[NAME]
        else:
            if isinstance(model, Classifier):
                classifier = model
            else:
                classifier = finetune(
                    model,
                    labelled,
                    judged,
                    n_classes=n_classes,
                    seed=self.seed,
                    settings=self.tuning,
                    tokenizer=tokenizer,
                    folder=None if where is None else where / "classifier",
                    progress=progress,
                )
            objective = self._learn_post_hoc(classifier, labelled, judged, where, progress)
        assert isinstance(objective, FlintObjective)
        self._classifier, self._interpreter = classifier, objective.interpreter.eval()
        self.hooks = objective.hooks
        self.facts = {"classifier": weights_digest(classifier.network)}
        self.facts["warnings"] = [*objective.warnings, *self._batch_doubts()]
        if not self.interpret(judged.texts).phi.any():
            raise RobustnessError(
                "Flint: every attribute is 0 on every text that epochs are judged on, so it "
                f"explains nothing; its own learning rate was {self.settings.lr:g}: take a lower "
                "lr, or smaller l1_weight and conciseness_weight"
            )
        return self

    def _learn_post_hoc(
        self,
        classifier: Classifier,
        train: LabelledTexts,
        val: LabelledTexts,
        folder: Path | None,
        progress: Progress,
    ) -> FlintObjective:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            objective = FlintObjective(self.settings, context_of(classifier, train.texts))
        before, history = weights_digest(classifier.network), classifier.history
        chosen, terms = classifier.chosen_epoch, classifier.terms
        tune(
            classifier,
            train,
            val,
            seed=self.seed,
            settings=replace(self.tuning, objectives=()),
            terms=[Term(NAME, objective.to(next(classifier.network.parameters()).device))],
            frozen=True,
            keep="last",
            folder=None if folder is None else folder / "interpreter",
            progress=progress,
        )
        assert weights_digest(classifier.network) == before, "post hoc moves no weight of it"
        # nor what is known of how it was tuned
        classifier.history, classifier.chosen_epoch, classifier.terms = history, chosen, terms
        return objective

    def _batch_doubts(self) -> list[str]:
        batch, n = self.tuning.batch_texts, self.settings.n_attributes
        if batch >= n or self.settings.diversity_memory:
            return []
        return [
            f"batches of {batch} texts underestimate the diversity of {n} attributes; take "
            f"batch_texts >= {n}, or diversity_memory 0.9"
        ]

    @torch.no_grad()
    def interpret(
        self, texts: Sequence[str] | Sequence[ndarray], *, batch_texts: int = 32
    ) -> Interpretation:
        """Return what classifier and interpreter make of texts, or of token ids that were read."""
        classifier, interpreter = self.classifier, self.interpreter
        classifier.network.eval()
        interpreter.eval()
        is_read = bool(len(texts)) and not isinstance(texts[0], str)
        ids: Any = list(texts) if is_read else classifier.reader.read(texts)[0]  # pyright: ignore[reportArgumentType]
        n, (j, c) = len(ids), interpreter.weight.shape
        phi, log_p, scores = (np.zeros((n, width), np.float32) for width in (j, c, c))
        acts: list[ndarray] = []
        for first in range(0, n, batch_texts):
            rows = slice(first, first + batch_texts)
            lengths = torch.tensor([len(row) for row in ids[rows]])
            with recording(classifier.network.body, self.hooks) as record:
                logits = classifier.logits(ids[rows])
                is_token = torch.arange(int(lengths.max())) < lengths[:, None]
                reading = interpreter(
                    [record[hook] for hook in self.hooks],
                    counted_tokens(is_token).to(logits.device),
                )
            log_p[rows] = logits.float().log_softmax(-1).cpu().numpy()
            phi[rows], scores[rows] = reading.phi.cpu().numpy(), reading.scores.cpu().numpy()
            tokens = reading.tokens.cpu().numpy()
            acts += [tokens[i, :length] for i, length in enumerate(lengths.tolist())]
        return Interpretation(ids, acts, phi, log_p, scores, interpreter.weight.cpu().numpy())

    def predict(self, texts: Sequence[str]) -> Float[ndarray, "n c"]:
        """Return log-probabilities of the interpreter, not of the classifier."""
        return self.interpret(texts).own_log_p

    def save(self, folder: str | Path) -> None:
        """Write classifier and interpreter; a failure leaves what was there.

        Raises:
            RobustnessError: It is not fitted.
            RunError: The disk refuses.
        """
        weights = {k: v.detach().contiguous() for k, v in self.interpreter.state_dict().items()}
        facts = StoredFlint(
            settings=self.settings.model_dump(mode="json"),
            mode=self.mode,
            seed=self.seed,
            hooks=self.hooks,
            n_classes=self.classifier.n_classes,
            facts=self.facts,
            files={},
        )
        with atomic_folder(Path(folder)) as fresh:
            self.classifier.save(fresh / "classifier")
            save_file(weights, fresh / "interpreter.safetensors")
            digests = {"files": folder_digests(fresh)}
            (fresh / "flint.json").write_text(json.dumps(asdict(facts) | digests, indent=1))

    def __repr__(self) -> str:
        if self._classifier is None:
            return f"Flint({self.settings.n_attributes} attributes, {self.mode}, not fitted)"
        lines = [
            f"Flint({self.settings.n_attributes} attributes of {', '.join(self.hooks)}, "
            f"{self.mode}, {self.classifier.n_classes} classes)"
        ]
        return "\n".join([*lines, *(f"  {text}" for text in self.facts.get("warnings", []))])

    def _fitted(self, part: Any) -> Any:
        if part is None:
            raise RobustnessError("this Flint is not fitted; fit it on texts with classes first")
        return part


@dataclass(frozen=True, slots=True)
class StoredFlint:
    """What `flint.json` holds."""

    settings: dict[str, Any]
    """Settings of the objective."""
    mode: Mode
    """By design or post hoc."""
    seed: int
    """Seed of the fit."""
    hooks: tuple[str, ...]
    """Hooks that it reads."""
    n_classes: int
    """Number of classes."""
    facts: dict[str, Any]
    """What the fit said of itself."""
    files: dict[str, str]
    """SHA-256 of the other files."""


def load_flint(folder: str | Path, model: nn.Module, tokenizer: Any = None) -> Flint:
    """Return what `Flint.save` wrote, to the bit.

    Args:
        folder: Where it was saved.
        model: The language model that was tuned, or another one of its shape.
        tokenizer: Where the model has none.

    Raises:
        RobustnessError: The files are damaged, or do not fit the model.
    """
    folder = Path(folder)
    stored = read_json(folder / "flint.json", StoredFlint, RobustnessError)
    if faults := damaged_files(folder, stored.files):
        raise RobustnessError(f"{folder}: {'; '.join(faults)}; fit it again")
    classifier = load_classifier(folder / "classifier", model, tokenizer)
    try:
        flint = Flint(mode=stored.mode, seed=stored.seed)
        flint.settings = FlintSettings.model_validate_json(json.dumps(stored.settings))
        weights = load_file(folder / "interpreter.safetensors")
        words = None
        if "word_ids" in weights:
            ids = weights["word_ids"].numpy()
            zeros = np.zeros(len(ids), np.float32)
            words = ContentWords(ids, zeros, zeros)  # filled by the weights, where it has them
        interpreter = build_interpreter(
            flint.settings,
            bare(classifier.network.body),
            n_classes=stored.n_classes,
            hooks=stored.hooks,
            pooling=classifier.settings.pooling,
            words=words,
        )
        interpreter.load_state_dict(weights)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as fault:
        raise RobustnessError(f"{folder}: does not fit this model ({fault})") from fault
    flint.tuning, flint.hooks, flint.facts = classifier.settings, stored.hooks, stored.facts
    flint._classifier = classifier  # pyright: ignore[reportPrivateUsage]
    flint._interpreter = interpreter.eval()  # pyright: ignore[reportPrivateUsage]
    return flint


def context_of(classifier: Classifier, texts: Sequence[str], *, seed: int = 0) -> ObjectiveContext:
    """Return what an objective is made for, of a finished classifier."""
    return ObjectiveContext(
        classifier.network.body,
        True,
        n_steps=0,
        seed=seed,
        d_model=classifier.network.d_model,
        n_classes=classifier.n_classes,
        tokenizer=classifier.reader.tokenizer,
        texts=tuple(texts),
        pooling=classifier.settings.pooling,
    )


def _labelled(data: TextsWithLabels) -> LabelledTexts:
    return LabelledTexts(data.texts, np.asarray(data.labels, np.int64))
