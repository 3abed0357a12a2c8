"""The errors that a user can cause, and the words they are told in.

    Exception
    ├── LmmonoError            root: the command line prints its text and exits with 2
    │   ├── RecipeError        every fault of a recipe file, one line each
    │   ├── DataError          text, tokens, tokenizers, tasks, label and text noise
    │   ├── ModelError         models, checkpoints, hook names, edits
    │   ├── TrainError         training that cannot start or must not go on
    │   │   └── TrainingDiverged   its loss became NaN or rose beyond guessing
    │   ├── TrainingStopped    asked to stop, everything saved: exit 143
    │   ├── DictionaryError    dictionaries and the vectors they are fitted on
    │   ├── ExplainError       explainers, scorers, the units and splits they are given
    │   ├── ClientError        language models that are asked
    │   ├── RobustnessError    probes, attacks, suites
    │   └── RunError           run folders
    └── activation_store.StoreError    the store's own root: it is usable alone; exit 2 as well

A message says what is wrong, where, what was found, what was wanted, and the way out. It quotes
files, so control characters in it are shown and never sent. Our own mistakes are asserts.
"""

import difflib
from collections.abc import Iterable

from activation_store.printable import printable


class LmmonoError(Exception):
    """Root of every error that a user's input, file or machine can cause."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RecipeError(LmmonoError):
    """A recipe that cannot be used; holds every fault found, one line each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(map(printable, faults))
        super().__init__("\n".join(self.faults))


class DataError(LmmonoError):
    """Text, tokens or a tokenizer that cannot be read or used."""


class ModelError(LmmonoError):
    """A model, checkpoint or hook name that does not fit what was asked."""


class TrainError(LmmonoError):
    """Training that cannot start or must not go on."""


class TrainingDiverged(TrainError):
    """A loss that became NaN, or worse than guessing."""


class TrainingStopped(LmmonoError):
    """Training that was asked to stop and saved everything first."""


class DictionaryError(LmmonoError):
    """A dictionary that cannot be fitted, used or read, or vectors that do not fit it."""


class ExplainError(LmmonoError):
    """A unit, split, explainer or scorer that cannot be used as asked."""


class ClientError(LmmonoError):
    """A language model that cannot be asked, or does not answer."""


class RobustnessError(LmmonoError):
    """Probes, attacks or a robustness study that cannot be fitted or run as asked."""


class RunError(LmmonoError):
    """A run folder that is missing, foreign, or holds something else than asked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the way out for an unknown name: the closest known ones, or all of them.

    >>> nearest("blocks.0.mlp.hook_pots", ["blocks.0.mlp.hook_post", "hook_embed"])
    'did you mean blocks.0.mlp.hook_post?'
    >>> nearest("zzz", ["crate", "gpt2"])
    'known: crate, gpt2'
    >>> nearest("zzz", [])
    'it has none'
    """
    choices = list(known)
    if not choices:
        return "it has none"
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "known: " + ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
