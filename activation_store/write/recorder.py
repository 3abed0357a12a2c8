"""Capture of any torch module: forward hooks on the submodules asked for, a store at the other end.

The file is not called `capture` because `activation_store.capture` is the function.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.errors import ContentError, StoreError
from activation_store.hooks import Rows, Vectors
from activation_store.store import Store
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
    """Arguments of the module; None calls it with `token_ids`."""


def capture(
    module: "nn.Module",
    batches: Iterable[Any],
    *,
    hooks: str | Sequence[str] = (),
    vectors: str | Sequence[str] = (),
    into: Store,
    seed: int = 0,
    commit_tokens: int = COMMIT_TOKENS,
    **settings: Any,
) -> int:
    """Run the batches through a module and store the outputs of some of its submodules.

    A capture that was stopped goes on: give the same batches again, and the sequences that are
    committed are passed over without a forward pass.

    Args:
        module: any torch module; it is in evaluation mode while this runs.
        batches: `Batch`es, or arrays of token ids [batch, n_ctx]; all of one length.
        hooks: paths of submodules, or globs over them, whose outputs are stored as sparse rows.
        vectors: the same, stored whole.
        into: a store open for writing.
        seed: seed of the exemplars.
        commit_tokens: tokens between commits.
        **settings: further settings of `Rows`, such as threshold, the same for every hook.

    Returns:
        The number of sequences in the capture, those of earlier runs included.

    Raises:
        ContentError: a path that names no submodule, an output that is not [batch, n_ctx, d], or a
            store that holds something else.
    """
    if into.mode == "r":
        raise StoreError(f"{into.where.file}: open for reading; use mode='a' to add to it.")
    rows, whole = match_modules(module, hooks), match_modules(module, vectors)
    stream = (batch if isinstance(batch, Batch) else Batch(batch) for batch in batches)
    first = next(stream, None)
    if first is None:
        raise ContentError("no batch to capture.")
    with _recording(module, dict.fromkeys([*rows, *whole])) as recorder:
        outputs = _run(module, first, recorder)
        width = {name: int(output.shape[-1]) for name, output in outputs.items()}
        writer = Writer(
            into.where,
            rows=[Rows(name, width[name], **settings) for name in rows],
            vectors=[Vectors(name, width[name]) for name in whole],
            n_ctx=int(first.token_ids.shape[1]),
            seed=seed,
            commit_tokens=commit_tokens,
            model_digest=digest(module),
        )
        with writer:
            return _write_all(module, chain([first], stream), recorder, writer)


def _write_all(
    module: "nn.Module", batches: Iterable[Batch], recorder: "_Recorder", writer: Writer
) -> int:
    """Write every sequence from `next_seq` on; return how many there are."""
    done = 0
    for batch in batches:
        n = len(batch.token_ids)
        skip = min(n, max(0, writer.next_seq - done)) if done < writer.next_seq else 0
        seq = np.arange(done + skip, done + n)
        if len(seq):
            outputs = _run(module, batch, recorder)
            docs = np.arange(done, done + n)[:, None] + np.zeros_like(np.asarray(batch.token_ids))
            writer.add(
                seq,
                batch.token_ids[skip:],
                (docs if batch.doc_ids is None else batch.doc_ids)[skip:],
                batch.split,
                {name: output[skip:] for name, output in outputs.items()},
            )
        done += n
    return done


def match_modules(module: "nn.Module", patterns: str | Sequence[str]) -> list[str]:
    """Return the paths of the submodules that the patterns match, in the module's order.

    Raises:
        ContentError: a pattern that matches nothing; lists paths that share its last part.
    """
    names = [name for name, _ in module.named_modules() if name]
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in given:
        if not any(fnmatchcase(name, pattern) for name in names):
            last = pattern.rsplit(".", 1)[-1]
            near = [name for name in names if name.endswith(last)] or names
            raise ContentError(
                f"{pattern}: names no submodule of {type(module).__name__}; it has "
                f"{', '.join(near[:8])}{', ...' if len(near) > 8 else ''}."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in given)]


class _Recorder:
    """Keeps the outputs of some submodules at every forward pass."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._copied: set[str] = set()

    def hook(self, name: str) -> "Callable[[nn.Module, Any, Any], None]":
        """Return the forward hook of one submodule."""

        def record(part: "nn.Module", given: Any, output: Any) -> None:
            del part, given
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.is_inference():
                self._copied.add(name)  # such a tensor does not tell when it is changed
            copied = name in self._copied
            self.outputs[name] = tensor.clone() if copied else tensor
            self._versions[name] = 0 if copied else tensor._version

        return record

    def changed(self) -> bool:
        """Tell whether an output was changed in place after its module had returned it.

        Such outputs are copied from the next forward pass on.
        """
        late = {
            name
            for name, output in self.outputs.items()
            if name not in self._copied and output._version != self._versions[name]
        }
        self._copied |= late
        return bool(late)


@contextmanager
def _recording(module: "nn.Module", names: Iterable[str]) -> "Generator[_Recorder]":
    """Record the submodules' outputs, the module in evaluation mode; undo all of it after."""
    recorder = _Recorder()
    was_training = [part for part in module.modules() if part.training]
    module.eval()
    with ExitStack() as undo:
        undo.callback(lambda: [setattr(part, "training", True) for part in was_training])
        for name in names:
            part = module.get_submodule(name)
            undo.callback(part.register_forward_hook(recorder.hook(name)).remove)
        yield recorder


def _run(module: "nn.Module", batch: Batch, recorder: "_Recorder") -> "dict[str, Tensor]":
    """Run one batch and return [batch, n_ctx, d] of every hook."""
    import torch

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    given = batch.inputs
    if given is None:
        given = (torch.as_tensor(batch.token_ids, dtype=torch.int64),)
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in given]
    with torch.no_grad():
        module(*moved)
        if recorder.changed():
            module(*moved)
    n, n_ctx = batch.token_ids.shape
    return {
        name: output.reshape(n, n_ctx, -1) if output.shape[0] == n * n_ctx else output
        for name, output in recorder.outputs.items()
    }


def digest(module: "nn.Module") -> str:
    """Return the sha256 of a module's parameters and buffers, by name; 64 hexadecimal digits."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            found.update(plain.numpy().tobytes())
    return found.hexdigest()
