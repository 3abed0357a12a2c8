"""The training loop: AdamW over packed rows with Accelerate, exact to resume, safe to stop.

Batch k of a run depends only on the recipe's seed and k. Every process takes its share of it, so
the number of processes changes nothing but speed. Held-out loss and code statistics go to
`metrics.parquet`; nothing is printed and no tracker runs unless asked.
"""

import math
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from activation_store.write.recorder import digest as weights_digest
from lmmono.data.batches import train_batches
from lmmono.data.minimal_pairs import MinimalPair, read_minimal_pairs
from lmmono.data.tokens import TokenRows
from lmmono.errors import DataError, RecipeError, TrainError, TrainingStopped
from lmmono.files.atomic import remove_folder
from lmmono.files.signals import StopRequest, stop_requests
from lmmono.models.build import build_model
from lmmono.models.hooks import bare as bare_network
from lmmono.recipe.sections import PretrainedModel, Train
from lmmono.runs.folder import Run, open_run
from lmmono.runs.kept import kept_dir, kept_recipe
from lmmono.runs.stages import STAGES
from lmmono.training.checkpoint import (
    Position,
    load_checkpoint,
    save_checkpoint,
)
from lmmono.training.held_out import Evaluation, evaluate, minimal_pair_accuracy
from lmmono.training.log import LogRow, TrainingLog, evaluation_rows
from lmmono.training.objectives import (
    ObjectiveContext,
    Outputs,
    Terms,
    Trainee,
    TrainingBatch,
    build_terms,
    take_step,
)
from lmmono.training.optimizer import build_optimizer, lr_at
from lmmono.training.watch import LossWatch
from lmmono.types import Progress, silent

CHECK_EVERY_STEPS = 10  # reading a loss waits for the device, so losses are read in tens


def train_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Train the model of a run, or resume it; return the facts. See `lmmono.train`."""
    accelerator = _accelerator(run)
    with accelerator.main_process_first():  # the others find the corpus prepared
        run.corpus  # noqa: B018
    pairs = _pairs_that_fit(run)
    with stop_requests() as request:
        _start_trackers(accelerator, run)
        loop = _Loop.start(accelerator, run, progress, request)
        loop.optimize()
        facts = loop.finish(pairs)
    accelerator.wait_for_everyone()
    # not end_training: it also ends the process group, which hangs now and then (the last barrier's
    # thread waits for the interpreter's lock, whose holder waits for the thread)
    for tracker in accelerator.trackers:
        tracker.finish()
    return facts


def _accelerator(run: Run) -> Accelerator:
    """Return Accelerate's view of the machine for this run."""
    recipe, settings = run.recipe, run.recipe.train
    bf16 = settings.precision == "bf16" or (
        settings.precision == "auto"
        and torch.cuda.is_available()
        and torch.cuda.is_bf16_supported()
    )
    precision = "bf16" if bf16 else "no"
    # Accelerate keeps the precision of a process' first Accelerator and refuses another one: arms
    # of a study that differ in it run one after the other, each with a state of its own; what
    # belongs to the process (PartialState, its group) stays
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:  # pyright: ignore[reportPrivateUsage]
        AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    accelerator = Accelerator(
        # processes without accelerators see each other only if told that there are none
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        log_with=list(settings.trackers) or None,
        project_dir=run.dir,
    )
    share = settings.batch_tokens // recipe.data.n_ctx
    if share % accelerator.num_processes:
        raise RecipeError(
            [
                f"train.batch_tokens: want a number of rows ({share}) that divides over "
                f"{accelerator.num_processes} processes"
            ]
        )
    return accelerator


def _start_trackers(accelerator: Accelerator, run: Run) -> None:
    """Start the trackers that the recipe asks for; they write into the run folder."""
    trackers = run.recipe.train.trackers
    if "wandb" in trackers:
        # offline alone still asks a telemetry host (wandb 0.31); this switches that off
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if trackers:
        accelerator.init_trackers(
            run.recipe.name,
            config={"seed": run.recipe.seed},
            init_kwargs={"wandb": {"mode": "offline", "dir": str(run.dir)}},
        )


class LanguageTrainee(Trainee):
    """A causal language model that learns next tokens."""

    is_classifier = False

    def __init__(self, model: nn.Module, accelerator: Accelerator | None = None) -> None:
        """Take a model, in wrappers or not."""
        self._model, self._network = model, bare_network(model)
        self._accelerator = accelerator

    @property
    def model(self) -> nn.Module:
        """The model in its wrappers."""
        return self._model

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all its weights."""
        return self._model.parameters()

    def run(self, batch: TrainingBatch, *, is_main: bool = False) -> Outputs:
        """Run rows of tokens; further passes of a step go past the wrapper of several processes."""
        network = self._model if is_main else self._network
        autocast = None if is_main or self._accelerator is None else self._accelerator.autocast()
        with autocast or nullcontext():
            output = network(input_ids=batch.ids, labels=batch.labels, use_cache=False)
        return Outputs(output.logits, output.loss)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """Return the mean loss of next tokens, in nats."""
        network: Any = self._network
        return network.loss_function(logits, labels, vocab_size=logits.shape[-1])


@dataclass(slots=True)
class _Loop:
    """Everything that one training holds while it runs."""

    accelerator: Accelerator
    run: Run
    bare: PreTrainedModel
    """The model itself; `model` may wrap it for several processes or compilation."""
    trainee: LanguageTrainee
    terms: Terms
    whole: nn.Module
    """What checkpoints hold: the model, with its objectives where there are some."""
    optimizer: torch.optim.Optimizer
    rows: TokenRows
    log: TrainingLog
    watch: LossWatch
    request: StopRequest
    progress: Progress
    step: int
    started: float = field(default_factory=time.perf_counter)
    unread: list[Tensor] = field(default_factory=list[Tensor])
    """Main loss and columns of this process' steps since they were last read from the device."""

    @classmethod
    def start(
        cls, accelerator: Accelerator, run: Run, progress: Progress, request: StopRequest
    ) -> "_Loop":
        """Build model and optimizer, or restore them from a checkpoint."""
        recipe, corpus = run.recipe, run.corpus
        bare = _new_model(run).to(accelerator.device)
        torch.manual_seed(recipe.seed)
        terms = build_terms(recipe.train.objectives, _context(run, bare))
        whole = nn.ModuleDict({"model": bare, "objectives": terms}) if len(terms) else bare
        optimizer = build_optimizer(
            bare, recipe.train, terms.groups(recipe.train.weight_decay, recipe.train.lr)
        )
        position = load_checkpoint(
            run.dir / "checkpoint",
            whole,
            optimizer,
            recipe.digest(*STAGES["train"].sections),
        )
        log = TrainingLog(run.dir / "metrics.parquet")
        log.resume(position.step if position else 0)
        prepared = torch.compile(bare) if recipe.train.compile else bare
        model, optimizer = accelerator.prepare(prepared, optimizer)
        return cls(
            accelerator=accelerator,
            run=run,
            bare=bare,
            trainee=LanguageTrainee(model, accelerator),
            terms=terms,
            whole=whole,
            optimizer=optimizer,
            rows=corpus.tokens("train"),
            log=log,
            watch=LossWatch(len(corpus.tokenizer), position.smooth_loss if position else None),
            request=request,
            progress=progress,
            step=position.step if position else 0,
            unread=_unread(position, len(terms.columns), accelerator.device),
        )

    @property
    def _settings(self) -> Train:
        return self.run.recipe.train

    def optimize(self) -> None:
        """Take every step that is left, evaluating, saving and stopping where due."""
        settings = self._settings
        kept = settings.kept_steps
        batch_rows = settings.batch_tokens // self.run.recipe.data.n_ctx
        batches = train_batches(self.rows, batch_rows, self.run.recipe.seed, self.step)
        if self.step == 0 and 0 in kept:
            self._keep()
        while self.step < settings.last_step:
            self.unread.append(self._take_step(next(batches)))
            self.step += 1
            stop = self.request.agreed(self.accelerator)
            last = self.step == settings.last_step
            if last or self.step % CHECK_EVERY_STEPS == 0:
                self._log_losses()
            if self.step in kept:
                self._keep()
            elif not last and self.step % settings.eval_every_steps == 0:
                self._evaluate()
            every = settings.checkpoint_every_steps
            if stop or (every and self.step % every == 0):
                self._save()
            if stop:
                raise _stopped(stop, self.run, self.step)

    def _take_step(self, batch: np.ndarray) -> Float[Tensor, "loss_and_columns"]:
        """Step on a global batch [batch_rows, n_ctx]; return the losses of this process' share."""
        accelerator, settings = self.accelerator, self._settings
        share = len(batch) // accelerator.num_processes
        first = accelerator.process_index * share
        ids = torch.from_numpy(batch[first : first + share]).to(accelerator.device)
        micro_tokens = settings.micro_batch_tokens or settings.batch_tokens
        parts = ids.split(max(1, micro_tokens // ids.shape[1]))
        is_target = batch[first : first + share, 1:] >= 0  # padding is none; counted on the CPU
        n_rows = len(parts[0])
        n_targets = [int(is_target[i : i + n_rows].sum()) for i in range(0, share, n_rows)]
        shares = [n / max(1, sum(n_targets)) for n in n_targets]
        return take_step(
            self.trainee,
            # padding stands last in its row, so no token sees what it is clamped to
            [
                (TrainingBatch(part.clamp(min=0), part >= 0, part), share)
                for part, share in zip(parts, shares, strict=True)
            ],
            self.terms,
            self.optimizer,
            lr=lr_at(self.step, settings),
            clip_norm=settings.clip_norm,
            index=self.step,
            n_steps=settings.steps,
            accelerator=accelerator,
        )

    def _read_losses(self) -> list[list[float]]:
        """Return main loss and columns of each step not logged yet, means over processes.

        Raises:
            TrainError: A loss is no finite number.
        """
        if not self.unread:
            return []
        reduced = self.accelerator.reduce(torch.stack(self.unread), reduction="mean")
        assert isinstance(reduced, Tensor)
        vectors: list[list[float]] = reduced.tolist()
        losses, first = [vector[0] for vector in vectors], self.step - len(vectors)
        self.watch.require_finite(losses, first, self.bare, self._settings)
        self.terms.require_finite([v[1:] for v in vectors], first, self._settings.steps)
        return vectors

    def _log_losses(self) -> None:
        """Read the losses of the last steps; check, log and report them."""
        vectors, settings = self._read_losses(), self._settings
        losses = [vector[0] for vector in vectors]
        self.unread.clear()
        self.watch.follow(losses, self.step - len(losses), self.bare, settings)
        n_tokens, seconds = settings.batch_tokens * len(losses), time.perf_counter() - self.started
        values = {"loss": sum(losses) / len(losses), "lr": lr_at(self.step - 1, settings)}
        means = self.terms.means([vector[1:] for vector in vectors])
        values |= {f"objective/{name}": mean for name, mean in means.items()}
        self.log.add(
            LogRow(self.step, "train", name, value, n_tokens, seconds)
            for name, value in values.items()
        )
        self.accelerator.log({f"train/{k}": v for k, v in values.items()}, step=self.step)
        if self.accelerator.is_main_process:
            what = f"train {self.run.name}"
            self.progress(what, self.step, settings.last_step, loss=values["loss"])

    def _evaluate(self) -> Evaluation | None:
        """Evaluate on held-out documents in the main process, and log the result."""
        result = None
        if self.accelerator.is_main_process:
            settings = self._settings
            rows = self.run.tokens("val").limit(settings.eval_tokens)
            batch_tokens = min(settings.batch_tokens, settings.eval_tokens)
            result = evaluate(self.bare, rows, max(1, batch_tokens // rows.n_ctx))
            seconds = time.perf_counter() - self.started
            self.log.add(evaluation_rows(result, self.step, seconds))
            self.log.save()
            self.accelerator.log({"val/loss": result.loss}, step=self.step)
        self.accelerator.wait_for_everyone()
        return result

    def _keep(self) -> None:
        """Keep the model of this step as a run of its own; it is written anew after a resume.

        Raises:
            TrainError: Its weights are those of an earlier kept step.
        """
        result = self._evaluate()
        if result is not None:
            run, step = self.run, self.step
            kept = Run.create(kept_recipe(run.recipe, step), kept_dir(run, step))
            with kept.stage("train") as facts:
                facts |= self._facts(result)
                require_new_weights(facts["model_digest"], step, self._kept_digests(before=step))
                kept.save_model(self.bare, run.corpus.tokenizer)
                self.log.save(kept.dir / "metrics.parquet")
        self.accelerator.wait_for_everyone()

    def _kept_digests(self, before: int) -> dict[int, str]:
        """Return the digests of the weights of the kept steps before a step."""
        return {
            step: str(open_run(kept_dir(self.run, step)).model_facts["model_digest"])
            for step in self._settings.kept_steps
            if step < before
        }

    def _facts(self, result: Evaluation) -> dict[str, Any]:
        """Return what the manifest says of the model of this step."""
        return {
            "val_loss": result.loss,
            "val_loss_se": result.loss_se,
            "val_tokens": result.n_tokens,
            "train_tokens": self.step * self._settings.batch_tokens,
            "step": self.step,
            "model_digest": weights_digest(self.bare),
            "data_digest": self.run.corpus.digest,
            "n_parameters": sum(p.numel() for p in self.bare.parameters()),
            "n_processes": self.accelerator.num_processes,
        }

    def _save(self) -> None:
        """Save a checkpoint and the log so far."""
        vectors = self._read_losses()
        if self.accelerator.is_main_process:
            position = Position(
                step=self.step,
                digest=self.run.recipe.digest(*STAGES["train"].sections),
                smooth_loss=self.watch.smooth_loss,
                unread_losses=[vector[0] for vector in vectors],
                # JSON has no NaN
                unread_terms=[[None if math.isnan(x) else x for x in v[1:]] for v in vectors],
            )
            save_checkpoint(self.run.dir / "checkpoint", self.whole, self.optimizer, position)
            self.log.save()
        self.accelerator.wait_for_everyone()

    def finish(self, pairs: Sequence[MinimalPair]) -> dict[str, Any]:
        """Evaluate a last time, save the model whole, and return the facts of the run.

        The checkpoint of the last step goes only when the model is saved, so a fault on the way
        costs no training: the same call resumes here.
        """
        self._save()
        result = self._evaluate()
        if result is None:
            return {}
        facts = self._facts(result)
        if kept := self._kept_digests(before=self.step):
            require_new_weights(facts["model_digest"], self.step, kept)
            facts["kept"] = {str(step): digest for step, digest in kept.items()}
        if pairs:
            accuracy = minimal_pair_accuracy(self.bare, self.run.corpus.tokenizer, pairs)
            facts |= {"minimal_pairs": accuracy, "n_minimal_pairs": len(pairs)}
            self.log.add([LogRow(self.step, "val", "minimal_pairs", accuracy, result.n_tokens)])
            self.log.save()
        self.run.save_model(self.bare, self.run.corpus.tokenizer)
        remove_folder(self.run.dir / "checkpoint")
        return facts


def _context(run: Run, network: PreTrainedModel) -> ObjectiveContext:
    recipe = run.recipe
    return ObjectiveContext(
        model=network,
        is_classifier=False,
        n_steps=recipe.train.steps,
        seed=recipe.seed,
        d_model=int(network.config.hidden_size),
        tokenizer=run.corpus.tokenizer,
    )


def _unread(position: Position | None, n_columns: int, device: torch.device) -> list[Tensor]:
    """Return what `_Loop.unread` held when a checkpoint was saved."""
    if position is None:
        return []
    terms = position.unread_terms or [[math.nan] * n_columns for _ in position.unread_losses]
    return [
        torch.tensor([loss, *(math.nan if x is None else x for x in row)], device=device)
        for loss, row in zip(position.unread_losses, terms, strict=True)
    ]


def _pairs_that_fit(run: Run) -> list[MinimalPair]:
    """Return the minimal pairs that the recipe names, read before a step is taken.

    Raises:
        DataError: The file cannot be read, or a sentence is longer than the model's context.
    """
    path, n_ctx, tokenizer = run.recipe.train.minimal_pairs, run.recipe.data.n_ctx, run.tokenizer
    if path is None:
        return []
    pairs = read_minimal_pairs(path)
    for pair in pairs:
        for sentence in (pair.good, pair.bad):
            plain = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            n_tokens = 1 + len(plain)  # after a BOS or an end-of-text token
            if n_tokens > n_ctx:
                raise DataError(
                    f"{path}: a sentence of {pair.group} has {n_tokens} tokens, the start token "
                    f"included, and data.n_ctx is {n_ctx}: {sentence[:60]!r}...; leave it out, or "
                    "raise data.n_ctx"
                )
    return pairs


def require_new_weights(digest: str, step: int, earlier: Mapping[int, str]) -> None:
    """Refuse weights that an earlier kept step has: one of the two is not what its name says.

    Public checkpoints are wrong like that: 86 of the 154 of Pythia-2.8B share their weights.

    Raises:
        TrainError: Names both steps.
    """
    for other, weights in earlier.items():
        if weights == digest:
            raise TrainError(
                f"steps {other} and {step} have the same weights (sha256 {digest[:12]}): nothing "
                "was learned between them; raise train.lr, or keep steps that are further apart"
            )


def _new_model(run: Run) -> PreTrainedModel:
    """Return the freshly initialised model of a run, ready to train."""
    recipe, tokenizer = run.recipe, run.corpus.tokenizer
    assert isinstance(tokenizer.eos_token_id, int), "build_tokenizer always sets it"
    assert not isinstance(recipe.model, PretrainedModel), "its run has a stage of its own"
    model = build_model(
        recipe.model,
        d_vocab=len(tokenizer),
        n_ctx=recipe.data.n_ctx,
        seed=recipe.seed,
        eos_token_id=tokenizer.eos_token_id,
    )
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def _stopped(number: int, run: Run, step: int) -> BaseException:
    """Return what a stop request raises once everything is saved."""
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return TrainingStopped(
        f"{run.dir}: stopped by SIGTERM after step {step} of {run.recipe.train.last_step}; "
        "all is saved, the same command goes on from here"
    )
