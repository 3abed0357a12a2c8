"""Capture of any torch module: forward hooks on the submodules asked for, a store at the other end.

The file is not called `capture` because `activation_store.capture` is the function.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.errors import ContentError, StoreError
from activation_store.hooks import Dtype, Rows, Skip, Vectors
from activation_store.store import Store
from activation_store.write.accumulator import as_tokens
from activation_store.write.recording import (
    OutputRecorder,
    first_tensor,
    input_device,
    padded_inputs,
    per_token,
)
from activation_store.write.writer import COMMIT_TOKENS, Writer

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of equal length that go through the module together."""

    token_ids: Any
    """[batch, n_ctx] whole numbers, numpy or torch: what the store calls tokens."""
    doc_ids: Any = None
    """[batch, n_ctx] document of each token, below 0 for padding; None: one per sequence."""
    split: str = "all"
    """Part of the corpus."""
    inputs: tuple[Any, ...] | None = None
    """Arguments of the module; None calls it with `token_ids`, and with a mask where there is
    padding."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the module, such as attention_mask."""
    seq_ids: Any = None
    """[batch] numbers of the sequences in the store; None counts on from the batch before."""


def capture(
    module: "nn.Module",
    batches: Iterable[Any],
    *,
    hooks: str | Sequence[str] = (),
    vectors: str | Sequence[str] = (),
    into: Store,
    seed: int = 0,
    commit_tokens: int = COMMIT_TOKENS,
    vector_dtype: Dtype = "float16",
    skip: Skip | None = None,
    **settings: Any,
) -> int:
    """Run the batches through a module and store the outputs of some of its submodules.

    Resumable: give the same batches again, and sequences that the capture holds are skipped
    without a forward pass. Further sequences have numbers of their own (`Batch.seq_ids`).

    Args:
        module: any torch module; it is in evaluation mode while this runs.
        batches: `Batch`es, or arrays of token ids [batch, n_ctx]; all of one length.
        hooks: paths of submodules, or globs over them, whose outputs are stored as sparse rows.
        vectors: the same, stored whole.
        into: a store open for writing.
        seed: seed of the exemplars.
        commit_tokens: tokens between commits.
        vector_dtype: type of stored vectors; float16 drops tokens with values beyond 65,504.
        skip: tokens to leave out of all that is stored but the tokens themselves.
        **settings: further settings of `Rows`, such as threshold, the same for every hook.

    Returns:
        The number of sequences given; those that the capture held before included.

    Raises:
        ContentError: a path that names no submodule, an output that is not [batch, n_ctx, d], a
            sequence that the store holds with other tokens, or a store of something else.
    """
    if into.mode == "r":
        raise StoreError(f"{into.path}: open for reading; use mode='a' to add to it.")
    rows, whole = match_modules(module, hooks), match_modules(module, vectors)
    stream = (batch if isinstance(batch, Batch) else Batch(batch) for batch in batches)
    first = next(stream, None)
    if first is None:
        raise ContentError("no batch to capture.")
    with _recording(module, dict.fromkeys([*rows, *whole])) as recorder:
        outputs = _run(module, first, recorder)
        width = {name: int(output.shape[-1]) for name, output in outputs.items()}
        writer = Writer(
            into.place,
            rows=[Rows(name, width[name], **settings) for name in rows],
            vectors=[Vectors(name, width[name], vector_dtype) for name in whole],
            n_ctx=int(first.token_ids.shape[1]),
            seed=seed,
            commit_tokens=commit_tokens,
            model_digest=digest(module),
            skip=skip,
        )
        with writer:
            return _write_all(module, chain([first], stream), recorder, writer)


def _write_all(
    module: "nn.Module", batches: Iterable[Batch], recorder: OutputRecorder, writer: Writer
) -> int:
    """Write every sequence that the capture does not hold; return how many were given."""
    next_seq = n_given = 0
    for batch in batches:
        n = len(batch.token_ids)
        seq = np.arange(next_seq, next_seq + n)
        if batch.seq_ids is not None:
            seq = as_tokens("seq_ids", batch.seq_ids, (n,)).astype(np.int64)
        docs = _doc_ids(batch, seq)
        pending = writer.pending(seq, batch.token_ids, docs, batch.split)
        if pending.any():
            outputs = _run(module, batch, recorder)
            writer.add(
                seq[pending],
                np.asarray(batch.token_ids)[pending],
                docs[pending],
                batch.split,
                {name: output[pending.tolist()] for name, output in outputs.items()}
                if not pending.all()
                else outputs,
            )
        next_seq, n_given = int(seq.max(initial=next_seq - 1)) + 1, n_given + n
    return n_given


def _doc_ids(batch: Batch, seq: np.ndarray) -> np.ndarray:
    if batch.doc_ids is None:
        return np.repeat(seq[:, None], batch.token_ids.shape[1], axis=1)
    return as_tokens("doc_ids", batch.doc_ids, tuple(batch.token_ids.shape))


def match_modules(module: "nn.Module", patterns: str | Sequence[str]) -> list[str]:
    """Return the paths of the submodules that the patterns match, in the module's order.

    Raises:
        ContentError: a pattern that matches nothing; lists paths that share its last part.
    """
    names = [name for name, _ in module.named_modules() if name]
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            last = pattern.rsplit(".", 1)[-1]
            near = [name for name in names if name.endswith(last)] or names
            raise ContentError(
                f"{pattern}: names no submodule of {type(module).__name__}; it has "
                f"{', '.join(near[:8])}{', ...' if len(near) > 8 else ''}."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


@contextmanager
def _recording(module: "nn.Module", names: Iterable[str]) -> "Generator[OutputRecorder]":
    """Record the submodules' outputs, the module in evaluation mode; undo all of it after."""
    recorder = OutputRecorder()

    def hook(name: str) -> "Callable[[nn.Module, Any, Any], None]":
        return lambda _module, _inputs, output: recorder.keep(name, first_tensor(name, output))

    was_training = [part for part in module.modules() if part.training]
    module.eval()
    with ExitStack() as undo:
        undo.callback(lambda: [setattr(part, "training", True) for part in was_training])
        for name in names:
            part = module.get_submodule(name)
            undo.callback(part.register_forward_hook(hook(name)).remove)
        yield recorder


def _run(module: "nn.Module", batch: Batch, recorder: OutputRecorder) -> "dict[str, Tensor]":
    """Run one batch and return [batch, n_ctx, d] of every hook.

    Raises:
        ContentError: the module has no such token or position, or an output is not per token.
    """
    import torch

    device = input_device(module)
    n, n_ctx = batch.token_ids.shape
    inputs, keywords = batch.inputs, dict(batch.keywords)
    if inputs is None:
        inputs = (torch.as_tensor(batch.token_ids, dtype=torch.int64),)
        if batch.doc_ids is not None:
            is_token = as_tokens("doc_ids", batch.doc_ids, (n, n_ctx)) >= 0
            # what the caller says of the padding counts
            if "attention_mask" not in keywords:
                keywords = {**padded_inputs(module, is_token), **keywords}

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    arguments = [moved(value) for value in inputs]
    named = {name: moved(value) for name, value in keywords.items()}
    with torch.no_grad():
        try:
            module(*arguments, **named)
            if recorder.changed():
                module(*arguments, **named)
        except IndexError as fault:
            ids = np.asarray(torch.as_tensor(batch.token_ids).cpu())
            raise ContentError(
                f"{type(module).__name__}: {fault}: the batch has token ids {ids.min()} to "
                f"{ids.max()} and {n_ctx} positions; give ids of its vocabulary, and sequences no "
                "longer than its context."
            ) from fault
    return {name: per_token(name, x, n, n_ctx) for name, x in recorder.outputs.items()}


def digest(module: "nn.Module") -> str:
    """Return the sha256 of a module's parameters and buffers, by name; 64 hexadecimal digits.

    Weights that Accelerate keeps elsewhere are read one part of the module after the other.
    """
    import torch

    sha256 = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            sha256.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            plain = _in_memory(module, name, value).contiguous().flatten().view(torch.uint8)
            sha256.update(plain.numpy().data)
    return sha256.hexdigest()


def _in_memory(module: "nn.Module", name: str, value: "Tensor") -> "Tensor":
    """Return a parameter or buffer on the CPU, read from where Accelerate keeps it if need be."""
    if value.device.type != "meta":
        return value.detach().cpu()
    path, _, own_name = name.rpartition(".")
    # Accelerate's hook on the part that owns the weight; Accelerate itself is not needed to ask it
    hook = getattr(module.get_submodule(path), "_hf_hook", None)
    kept = getattr(hook, "weights_map", None)
    if kept is None:
        raise ContentError(f"{name}: its weights are nowhere (device meta); load the model.")
    return kept[own_name].detach().cpu()
