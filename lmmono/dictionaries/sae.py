"""Sparse autoencoders: settings in the constructor, data in `fit`, trained by sae-lens.

What is saved is a SAELens folder with `dictionary.json` next to it. The scale of the input is in
the weights, so both readers take vectors in the hook's own units.
"""

import hashlib
import json
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
from lmmono.dictionaries.estimator import Dictionary, NetworkDictionary, load_dictionary
from lmmono.dictionaries.sae_training import (
    FitPlan,
    SaeFit,
    check_enough,
    fit_result,
    read_curves,
    read_first_batches,
    remove_checkpoint,
    train_all,
    write_curves,
)
from lmmono.dictionaries.sparse import Scratch
from lmmono.dictionaries.vector_source import VectorSource, as_vectors
from lmmono.errors import DictionaryError, nearest
from lmmono.files.locks import lock_folder
from lmmono.files.processes import best_device, this_process
from lmmono.recipe.dictionary_settings import Sae
from lmmono.recipe.reference import settings_help
from lmmono.types import Progress, silent


class SAE(NetworkDictionary):
    """A sparse autoencoder: standard, gated, topk, batchtopk, jumprelu, matryoshka, pursuit.

    `fit` takes, in addition to vectors and progress:
        folder: Where the result goes, and checkpoints and `metrics.parquet` on the way there.
            Fitting again with the same settings and vectors resumes where it stopped, to the same
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
    history: pa.Table | None = None

    def _fit(self, source: VectorSource, *, progress: Progress, **options: Any) -> None:
        folder = options.pop("folder", None)
        job = _FitJob(self.arch, self, self.hook or "", None if folder is None else Path(folder))
        broken = _fit_jobs([job], source, progress=progress, **options)
        for error in broken.values():
            raise error

    def _save(self, folder: Path) -> None:
        self.network.save_model(folder)
        if self.history is not None:
            write_curves(folder, self.history)

    def _load(self, folder: Path) -> None:
        self.network, self.history = read_inference(folder), read_curves(folder)


SAE.__doc__ = settings_help(SAE.__doc__, Sae)


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
    jobs = _fit_jobs_of(dictionaries, hooks, source, None if folder is None else Path(folder))
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
        for job in [job for i, job in enumerate(jobs) if i % n != rank]:
            if not job.is_loaded(source):
                job.sae.clear()
                broken[job.name] = DictionaryError(
                    f"{job.name}: its fit came to nothing in another process, which says why"
                )
    if broken:
        raise DictionaryError("\n".join(str(error) for error in broken.values()))
    return {job.name: job.sae for job in jobs}


@dataclass(frozen=True)
class _FitJob:
    """One SAE to fit: on which hook, and where it goes."""

    name: str
    sae: SAE
    hook: str
    folder: Path | None

    def plan(self, source: VectorSource) -> FitPlan:
        """Return what decides the weights of this SAE."""
        sae = self.sae
        decides = [sae.settings.model_dump(mode="json"), sae.seed, self.hook, source.digest]
        return FitPlan(
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

    def is_loaded(self, source: VectorSource) -> bool:
        """Load the finished dictionary of the folder, if it holds one.

        Raises:
            DictionaryError: It holds one of other settings or vectors.
        """
        if self.folder is None or not (self.folder / "dictionary.json").exists():
            return False
        saved = load_dictionary(self.folder)
        if not isinstance(saved, SAE) or saved.facts.get("fit") != self.plan(source).digest:
            raise DictionaryError(
                f"{self.folder}: holds a dictionary of other settings, another seed or other "
                "vectors; choose another folder, or remove this one"
            )
        self.sae.facts, self.sae.network, self.sae.history = (
            saved.facts,
            saved.network,
            saved.history,
        )
        return True


def _fit_jobs_of(
    dictionaries: Mapping[str, Dictionary] | Sequence[Dictionary],
    hooks: Mapping[str, str] | Sequence[str] | None,
    source: VectorSource,
    folder: Path | None,
) -> list[_FitJob]:
    """Pair every dictionary with its hook and folder.

    Raises:
        DictionaryError: One is no SAE or comes twice, or a hook is missing or unknown.
    """
    if isinstance(dictionaries, Mapping):
        named = dict(dictionaries)
    else:
        named = {str(number): sae for number, sae in enumerate(dictionaries)}
    if hooks is None:
        hooks = dict.fromkeys(named, source.only_hook())
    wanted = dict(hooks) if isinstance(hooks, Mapping) else dict(zip(named, hooks, strict=False))
    if len({id(sae) for sae in named.values()}) < len(named):
        raise DictionaryError("dictionaries: one SAE comes twice; make one for each fit")
    jobs: list[_FitJob] = []
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
        jobs.append(_FitJob(name, sae, wanted[name], None if folder is None else folder / name))
    return jobs


def _processes(folder: str | Path | None) -> Any:
    """Return Accelerate's view of the processes, or None where there is one only.

    Raises:
        DictionaryError: There are several, and no folder to share results through.
    """
    if this_process().n == 1:
        return None
    if folder is None:
        raise DictionaryError(
            "fit_together: several processes share their results through files; give folder=..."
        )
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _fit_jobs(
    jobs: Sequence[_FitJob],
    source: VectorSource,
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
        left = [job for job in jobs if not job.is_loaded(source)]
        if not left:
            return {}
        first, scratch = read_first_batches(source), Scratch()
        where = device or best_device()
        fits: dict[str, SaeFit] = {}
        for job in left:
            scale = first.scales[job.hook] if job.sae.settings.scaling == "norm" else 1.0
            # they take their steps one after the other, so all use one scratch memory
            fit = SaeFit(
                job.plan(source), source.batch_tokens, scale, device=where, scratch=scratch
            )
            fit.resume()
            fits[job.name] = fit
        broken = train_all(
            list(fits.values()),
            source,
            checkpoint_every_steps=checkpoint_every_steps,
            progress=progress,
        )
        for job in left:
            if job.name not in broken:
                try:
                    _finish(job, fits[job.name], first.probes[job.hook])
                except DictionaryError as error:
                    broken[job.name] = error
            if job.name in broken:
                job.sae.clear()
        return broken


def _finish(job: _FitJob, fit: SaeFit, x: Float[Tensor, "n d_in"]) -> None:
    """Turn a training into a fitted dictionary, in memory and in its folder.

    Raises:
        DictionaryError: All latents are dead, or the reconstruction is worse than the mean.
    """
    sae, dead_fraction = job.sae, fit.dead_fraction
    fit.fold()
    # what is in memory is what a reader of the folder gets: batchtopk becomes jumprelu there
    with tempfile.TemporaryDirectory() as folder:
        write_inference(fit.sae, Path(folder))
        sae.network = read_inference(Path(folder))
    sae.history = fit.curves.table()
    acts = sae.encode(x)
    result = fit_result(job.name, sae.settings, x, acts, sae.decode(acts), dead_fraction)
    sae.facts |= {
        "fit": fit.plan.digest,
        "input_scale": fit.scale,
        "n_tokens": fit.n_tokens,
        "steps": fit.step,
        "settled_step": fit.settled_step,
        "seconds": round(fit.seconds, 3),
        **result,
    }
    if job.folder is not None:
        sae.write(job.folder)
        remove_checkpoint(job.folder)
