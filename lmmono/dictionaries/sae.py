"""Sparse autoencoders: settings in the constructor, data in `fit`, trained by sae-lens.

What is saved is a SAELens folder with `dictionary.json` beside it. The scale of the input is in
the weights, so both readers take vectors in the hook's own units.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from lmmono.dictionaries.architectures import read_inference, write_inference
from lmmono.dictionaries.curves import read_curves, write_curves
from lmmono.dictionaries.estimator import Dictionary, load_dictionary
from lmmono.dictionaries.fit_checkpoint import remove_checkpoint
from lmmono.dictionaries.sae_training import Plan, Training, train_all
from lmmono.dictionaries.soundness import (
    Opening,
    check_alive,
    check_enough,
    fvu_of,
    open_vectors,
)
from lmmono.dictionaries.sparse_step import Scratch
from lmmono.dictionaries.vector_source import Vectors, as_vectors
from lmmono.errors import DictionaryError, nearest
from lmmono.files.locks import lock_folder
from lmmono.recipe.dictionary_settings import Sae
from lmmono.types import Progress, silent


class SAE(Dictionary):
    """A sparse autoencoder: standard, gated, topk, batchtopk, jumprelu, matryoshka, pursuit.

    `fit` takes, beside vectors and progress:
        folder: Where the result goes, and checkpoints and `metrics.parquet` on the way there.
            Fitting again with the same settings and vectors goes on where it stopped, to the same
            bits, and loads what is finished.
        checkpoint_every_steps: Save this often; without it only a stop by SIGTERM or Ctrl-C saves.
        device: Where to train; a GPU when there is one.

    Attributes:
        network: sae-lens' inference SAE, once fitted or loaded.
        history: Loss, L0, FVU, dead share and learning rate by step, as a table; None where the
            dictionary was loaded without.
    """

    kind: ClassVar[str] = "sae"
    adapter: ClassVar[TypeAdapter[Any]] = TypeAdapter(Sae)
    network: Any = None
    history: pa.Table | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, as the SAELens folder has them."""
        self._check_fitted("tensors")
        return dict(self.network.state_dict())

    def _fit(self, source: Vectors, *, progress: Progress, **options: Any) -> None:
        folder = options.pop("folder", None)
        job = _Job(self.arch, self, self.hook or "", None if folder is None else Path(folder))
        broken = _fit_jobs([job], source, progress=progress, **options)
        for error in broken.values():
            raise error

    def _encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return self.network.encode(x)

    def _decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return self.network.decode(acts)

    def _save(self, folder: Path) -> None:
        self.network.save_model(folder)
        if self.history is not None:
            write_curves(folder, self.history)

    def _load(self, folder: Path) -> None:
        self.network, self.history = read_inference(folder), read_curves(folder)


def fit_together(
    dictionaries: Mapping[str, Dictionary] | Sequence[Dictionary],
    vectors: Any,
    *,
    hooks: Mapping[str, str] | Sequence[str] | None = None,
    folder: str | Path | None = None,
    checkpoint_every_steps: int | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, SAE]:
    """Fit several SAEs from one pass over the vectors, each to the bits it gets alone.

    Under `accelerate launch` every process fits its share, all read the same order, and each
    process loads what the others fitted; a folder is needed for that.

    Args:
        dictionaries: SAEs by name; a list is named 0, 1, 2, ...
        vectors: As `SAE.fit` takes them, of one hook or of several.
        hooks: Hook of each dictionary, by name or in the same order; not needed for one hook.
        folder: Each dictionary goes into `folder/<name>`, with checkpoints on the way there.
        checkpoint_every_steps: As in `SAE.fit`.
        device: As in `SAE.fit`.
        progress: Called with steps done, and what is known of the loss, for each dictionary.

    Returns:
        The same objects by name, fitted.

    Raises:
        DictionaryError: A setting or a name does not fit, or the fit of one came to nothing. The
            others are fitted all the same.
    """
    source = as_vectors(vectors)
    jobs = _jobs(dictionaries, hooks, source, None if folder is None else Path(folder))
    state = _processes(folder)
    rank, n = (state.process_index, state.num_processes) if state else (0, 1)
    try:
        for job in jobs:
            job.sae.begin(source, job.hook)
        broken = _fit_jobs(
            jobs[rank::n],
            source,
            progress=progress,
            checkpoint_every_steps=checkpoint_every_steps,
            device=device,
        )
    except BaseException:
        for job in jobs:
            job.sae.clear()
        raise
    if state:
        state.wait_for_everyone()
        broken |= _load_jobs([job for i, job in enumerate(jobs) if i % n != rank], source)
    if broken:
        raise DictionaryError("\n".join(str(error) for error in broken.values()))
    return {job.name: job.sae for job in jobs}


@dataclass(frozen=True)
class _Job:
    """One SAE to fit: on which hook, and where it goes."""

    name: str
    sae: SAE
    hook: str
    folder: Path | None

    def plan(self, source: Vectors) -> Plan:
        """Return what decides the weights of this SAE."""
        sae = self.sae
        decides = [sae.settings.model_dump(mode="json"), sae.seed, self.hook, source.digest]
        return Plan(
            name=self.name,
            settings=sae.settings,
            seed=sae.seed,
            hook=self.hook,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            digest=hashlib.sha256(json.dumps([*decides, sae.d_in]).encode()).hexdigest(),
            about={
                "hook_name": self.hook or None,
                "model_name": source.facts.get("model_name"),
                "context_size": source.facts.get("n_ctx"),
                "prepend_bos": False,
            },
            folder=self.folder,
        )


def _jobs(
    dictionaries: Mapping[str, Dictionary] | Sequence[Dictionary],
    hooks: Mapping[str, str] | Sequence[str] | None,
    source: Vectors,
    folder: Path | None,
) -> list[_Job]:
    """Pair every dictionary with its hook and folder.

    Raises:
        DictionaryError: One is no SAE or comes twice, or a hook is missing or unknown.
    """
    named = dict(dictionaries) if isinstance(dictionaries, Mapping) else _numbered(dictionaries)
    if hooks is None:
        hooks = dict.fromkeys(named, source.only_hook())
    wanted = dict(hooks) if isinstance(hooks, Mapping) else dict(zip(named, hooks, strict=False))
    if len({id(sae) for sae in named.values()}) < len(named):
        raise DictionaryError("dictionaries: one SAE comes twice; make one for each fit")
    jobs: list[_Job] = []
    for name, sae in named.items():
        if not isinstance(sae, SAE):
            raise DictionaryError(
                f"{name}: want an SAE, got {type(sae).__name__}; fit other kinds one by one"
            )
        if wanted.get(name) not in source.widths:
            raise DictionaryError(
                f"{name}: hook {wanted.get(name)!r} is none of the vectors'; "
                + nearest(str(wanted.get(name)), source.widths)
            )
        jobs.append(_Job(name, sae, wanted[name], None if folder is None else folder / name))
    return jobs


def _numbered(dictionaries: Sequence[Dictionary]) -> dict[str, Dictionary]:
    return {str(number): sae for number, sae in enumerate(dictionaries)}


def _processes(folder: str | Path | None) -> Any:
    """Return Accelerate's view of the processes, or None where there is one only.

    Raises:
        DictionaryError: There are several, and no folder to share results through.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if folder is None:
        raise DictionaryError(
            "fit_together: several processes share their results through files; give folder=..."
        )
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _fit_jobs(
    jobs: Sequence[_Job],
    source: Vectors,
    *,
    progress: Progress,
    checkpoint_every_steps: int | None = None,
    device: str | None = None,
) -> dict[str, DictionaryError]:
    """Fit SAEs that have begun; return what came to nothing, by name."""
    for job in jobs:
        check_enough(source, job.name, job.sae.settings.steps, job.sae.d_sae)
    with ExitStack() as locks:
        for job in jobs:
            if job.folder is not None:
                job.folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(lock_folder(job.folder))
        left = [job for job in jobs if not _is_loaded(job, source)]
        if not left:
            return {}
        opening = open_vectors(source)
        scratch = Scratch()
        trainings = {job.name: _start(job, source, opening, device, scratch) for job in left}
        broken = train_all(
            list(trainings.values()),
            source,
            checkpoint_every_steps=checkpoint_every_steps,
            progress=progress,
        )
        for job in left:
            if job.name not in broken:
                try:
                    _finish(job, trainings[job.name], opening.probes[job.hook])
                except DictionaryError as error:
                    broken[job.name] = error
            if job.name in broken:
                job.sae.clear()
        return broken


def _start(
    job: _Job, source: Vectors, opening: Opening, device: str | None, scratch: Scratch
) -> Training:
    """Return the training of a job, at its first step or where a checkpoint left it."""
    scale = opening.scales[job.hook] if job.sae.settings.scaling == "norm" else 1.0
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(
        job.plan(source), source.batch_tokens, scale, device=chosen, scratch=scratch
    )
    training.resume()
    return training


def _finish(job: _Job, training: Training, probe: Float[Tensor, "n d_in"]) -> None:
    """Turn a training into a fitted dictionary, in memory and in its folder.

    Raises:
        DictionaryError: All latents are dead, or the reconstruction is worse than the mean.
    """
    sae = job.sae
    dead = training.dead_fraction
    training.fold()
    with tempfile.TemporaryDirectory() as folder:
        write_inference(training.sae, Path(folder))
        sae.network = read_inference(Path(folder))
    sae.history = training.curves.table()
    acts = sae.encode(probe)
    reached = {
        "l0": float(acts.count_nonzero()) / len(acts),
        "fvu": fvu_of(probe, sae.decode(acts)),
        "dead_fraction": dead,
    }
    check_alive(job.name, sae.settings, reached)
    sae.facts |= {
        "fit": training.plan.digest,
        "input_scale": training.scale,
        "n_tokens": training.n_tokens,
        "seconds": round(training.seconds, 3),
        **reached,
    }
    if job.folder is not None:
        sae.write(job.folder)
        remove_checkpoint(job.folder)


def _is_loaded(job: _Job, source: Vectors) -> bool:
    """Load the finished dictionary of a job's folder, if it holds one.

    Raises:
        DictionaryError: It holds one of other settings or vectors.
    """
    if job.folder is None or not (job.folder / "dictionary.json").exists():
        return False
    found = load_dictionary(job.folder)
    if not isinstance(found, SAE) or found.facts.get("fit") != job.plan(source).digest:
        raise DictionaryError(
            f"{job.folder}: holds a dictionary of other settings, another seed or other vectors; "
            "choose another folder, or remove this one"
        )
    job.sae.facts, job.sae.network, job.sae.history = found.facts, found.network, found.history
    return True


def _load_jobs(jobs: Sequence[_Job], source: Vectors) -> dict[str, DictionaryError]:
    """Load what other processes fitted; return what is missing, by name."""
    broken: dict[str, DictionaryError] = {}
    for job in jobs:
        if not _is_loaded(job, source):
            job.sae.clear()
            broken[job.name] = DictionaryError(
                f"{job.name}: its fit came to nothing in another process, which says why"
            )
    return broken
