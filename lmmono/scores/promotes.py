"""What a unit writes: the tokens it makes likelier, and the units that are most like it.

Its direction is read through the model's own last layers:

The logit lens of a direction (nostalgebraist 2020; for neurons Geva et al. 2022, arXiv 2203.14680):

    neuron   one at the unit, zero elsewhere, run from `mlp.hook_post` to `hook_mlp_out`
    latent   its row of the decoder, from the hook that the dictionary is of
    both     the last stream is set to that direction at a root mean square of 1, and the model's
             last norm and unembedding give logits; those of a stream of zeros are taken off

Nothing of the family is known here: the directions go through the model by its hooks. What later
layers make of a direction is left out, and a CRATE without `ista_skip` hands nothing on past its
next block but through that block's code: there the lens of an early layer is a reading only.

Units are alike by their weights, the cosine of their directions, or by what they fire on, the
cosine of their activations on a sample of tokens. Each number has its control beside it: random
mixtures of the same units, or what two units would have that know nothing of each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor, nn

import activation_store as astore
from activation_store.write.recording import input_device
from lmmono.dictionaries.estimator import load_dictionary
from lmmono.errors import DictionaryError, ModelError
from lmmono.models.hooks import attached, bare, hook_names
from lmmono.models.points import Watch
from lmmono.records.seeds import stream
from lmmono.runs.folder import Run
from lmmono.types import Progress, silent

N_TOKENS = 10
"""Tokens kept at each end: what a page shows."""
N_NEAREST = 10
"""Nearest units kept of each kind."""
N_RANDOM = 15
"""Random directions whose median is the control; odd, so that it is one of them."""
LOGITS_AT_ONCE = 2**24
"""Logits, or cosines, that are made at one time: 64 MB."""
SAMPLED_TOKENS = 8_192
"""Tokens on which activations are compared: a cosine of .1 between units that fire on one token in
a hundred then stands on about 80 of them."""
SPARSE = 0.05
"""Density below which a product of sparse matrices is faster than BLAS."""


def promotes_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Fill tables `promotes` and `neighbours` of a run's store; return the facts.

    Raises:
        StoreError: The store cannot be read or written.
    """
    with astore.open(run.store_path, mode="a") as store:
        return promotes(store, run.model, folder=run.dir, seed=run.recipe.seed, progress=progress)


def promotes(
    store: astore.Store,
    model: nn.Module,
    hooks: Sequence[str] | None = None,
    *,
    folder: Any = None,
    k: int = N_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write what units promote and suppress, and the units nearest to them; return the facts.

    The rows go to the tables `promotes` and `neighbours`; a hook that has some is done again.
    Facts: `hooks`, and `left_out` with a reason for each hook that has no direction in the stream
    or whose dictionary is not at hand.

    Args:
        store: Open with mode "a".
        model: The model that was captured.
        hooks: Hooks stored as rows; None takes all.
        folder: What the paths of dictionaries in the store are relative to; by default where the
            store lies.
        k: Tokens at each end.
        seed: Of the random directions.
        progress: Called with units done.

    Raises:
        StoreError: The store cannot be written.
    """
    query = "SELECT hook, d FROM hooks WHERE kind = 'rows' ORDER BY hook"
    widths = dict(store.sql(query).fetchall())
    place = store.path.parent if folder is None else folder
    done: list[str] = []
    left_out: dict[str, str] = {}
    for hook in widths if hooks is None else hooks:
        try:
            lens = _Lens(model, *_source(store, model, hook, widths[hook], place))
        except (ModelError, DictionaryError) as fault:
            left_out[hook] = str(fault)
            continue
        drawn = stream("mixtures of units", seed, hook).standard_normal((N_RANDOM, lens.n_units))
        mixed = lens.read(torch.from_numpy(drawn).float(), k)
        control = [ends.median(0).values.numpy() for ends in (mixed.up, mixed.down)]
        parts: list[pa.Table] = []
        directions: list[Tensor] = []
        for first, units in lens.units(k):
            parts += _tables(hook, first, units, control)
            directions.append(units.directions)
            progress(f"promotes {hook}", first + len(units.up), lens.n_units)
        near = [_by_weights(hook, torch.cat(directions), mixed.directions)]
        near.append(_by_activation(store, hook, lens.n_units, seed))
        # in one commit: a killed process leaves a hook with both or without
        store.append_all(
            {"promotes": pa.concat_tables(parts), "neighbours": pa.concat_tables(near)}
        )
        done.append(hook)
    return {"hooks": done, "left_out": left_out}


def _source(
    store: astore.Store, model: nn.Module, hook: str, width: int, folder: Any
) -> tuple[str, Float[Tensor, "units d"] | int]:
    """Return the model's hook that the units write to, with their rows there or their number.

    Raises:
        ModelError: The units have no direction in the stream.
        DictionaryError: The dictionary is not where the store says.
    """
    query = "SELECT hook, path FROM dictionaries WHERE latents_hook = $hook"
    for source, path in store.sql(query, hook=hook).fetchall():
        if path is None:
            raise DictionaryError(f"{hook}: the store names no folder of its dictionary")
        rows = load_dictionary(folder / path).tensors()["W_dec"].float()
        if width == 2 * len(rows):  # a signed code, stored as two halves
            rows = torch.cat([rows, -rows])
        return source, rows
    if hook in hook_names(bare(model)):
        return hook, width
    raise ModelError(f"{hook}: neither a hook of the model nor latents of a dictionary")


@dataclass(frozen=True, slots=True)
class _Read:
    """Directions, and the tokens at both ends of their logits, the strongest first."""

    directions: Float[Tensor, "units d_model"]
    """Of unit length; zeros where a unit writes nothing."""
    up: Float[Tensor, "units k"]
    up_ids: Int[Tensor, "units k"]
    down: Float[Tensor, "units k"]
    down_ids: Int[Tensor, "units k"]


class _Lens:
    """A model, and the way from the units of one hook to its logits."""

    def __init__(self, model: nn.Module, source: str, rows: Float[Tensor, "units d"] | int) -> None:
        self._model, self._source = bare(model), source
        self._decoder = None if isinstance(rows, int) else rows
        self.n_units = rows if isinstance(rows, int) else len(rows)
        names = hook_names(self._model)
        block, _, part = source.removeprefix("blocks.").partition(".")
        streams = [name for name in names if name.endswith(".hook_resid_post")]
        self._writes = f"blocks.{block}.hook_mlp_out" if part.startswith("mlp.hook_post") else None
        is_stream = part in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out")
        if not streams or not (is_stream or self._writes in names):
            raise ModelError(
                f"{source}: want mlp.hook_post or a hook of the stream of a model with "
                "TransformerLens' names"
            )
        self._last = streams[-1]
        config: Any = self._model.config
        width = int(config.get_text_config().hidden_size)
        self._still = self._logits(torch.zeros((1, width)))
        self._at_once = max(1, LOGITS_AT_ONCE // self._still.shape[-1])

    def units(self, k: int) -> Iterator[tuple[int, _Read]]:
        """Yield the first of some units, and what they write."""
        for first in range(0, self.n_units, self._at_once):
            n = min(self._at_once, self.n_units - first)
            chosen = torch.zeros((n, self.n_units))
            chosen[torch.arange(n), torch.arange(first, first + n)] = 1.0
            yield first, self.read(chosen, k)

    def read(self, acts: Float[Tensor, "n units"], k: int) -> _Read:
        """Return what activations of the units write, taken for themselves."""
        directions = self._directions(acts if self._decoder is None else acts @ self._decoder)
        size = directions.square().mean(1, keepdim=True).sqrt().clamp_min(1e-20)
        logits = self._logits(directions / size) - self._still
        logits -= logits.mean(1, keepdim=True)
        k = min(k, logits.shape[1])
        up, down = logits.topk(k), logits.topk(k, largest=False)
        unit_length = torch.nn.functional.normalize(directions)
        return _Read(unit_length, up.values, up.indices, down.values, down.indices)

    def _directions(self, acts: Float[Tensor, "n d"]) -> Float[Tensor, "n d_model"]:
        """Return what acts of the source hook write into the stream beyond what zeros write."""
        if self._writes is None:
            return acts
        written: list[Tensor] = []
        padded = torch.cat([acts, torch.zeros_like(acts[:1])])[:, None]
        watches: dict[str, Watch] = {
            self._source: lambda acts: padded.to(acts),
            self._writes: lambda acts: written.append(acts[:, 0].float().cpu()),
        }
        self._run(len(padded), watches)
        return written[0][:-1] - written[0][-1]

    def _logits(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """Return the logits after a last stream of these directions."""
        written = directions[:, None]
        logits = self._run(len(directions), {self._last: lambda acts: written.to(acts)})
        return logits[:, 0].float().cpu()

    def _run(self, n: int, watches: dict[str, Watch]) -> Float[Tensor, "n 1 d_vocab"]:
        """Run n sequences of one token, whichever it is: what is read was put in by watches."""
        device = input_device(self._model)
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), attached(self._model, watches):
                ids = torch.zeros((n, 1), dtype=torch.long, device=device)
                return self._model(ids).logits
        finally:
            self._model.train(was_training)


def _tables(
    hook: str, first: int, read: _Read, control: Sequence[Float[np.ndarray, " k"]]
) -> list[pa.Table]:
    """Return the rows of some units, the promoted tokens and the suppressed ones."""
    tables: list[pa.Table] = []
    sides = (("up", read.up, read.up_ids), ("down", read.down, read.down_ids))
    for (sign, values, ids), floor in zip(sides, control, strict=True):
        keys = _keys(hook, "sign", sign, first, *values.shape)
        columns = {"token_id": ids.numpy().astype(np.int32).ravel(), "logit": _double(values)}
        tables.append(pa.table(keys | columns | {"control": np.tile(_double(floor), len(values))}))
    return tables


def _by_weights(
    hook: str, directions: Float[Tensor, "units d"], mixed: Float[Tensor, "random d"]
) -> pa.Table:
    """Return the units whose directions have the largest cosine with each unit's own."""
    k = min(N_NEAREST, len(directions) - 1)
    floor = _double((mixed @ directions.T).topk(k).values.median(0).values)
    tables: list[pa.Table] = []
    at_once = max(1, LOGITS_AT_ONCE // len(directions))
    for first in range(0, len(directions), at_once):
        cosines = directions[first : first + at_once] @ directions.T
        cosines[torch.arange(len(cosines)), torch.arange(first, first + len(cosines))] = -2.0
        best = cosines.topk(k)
        keys = _keys(hook, "kind", "weights", first, *best.values.shape)
        columns = {
            "neighbour": best.indices.numpy().astype(np.int32).ravel(),
            "cosine": _double(best.values),
            "control": np.tile(floor, len(cosines)),
        }
        tables.append(pa.table(keys | columns))
    return pa.concat_tables(tables)


def _by_activation(store: astore.Store, hook: str, n_units: int, seed: int) -> pa.Table:
    """Return the units that fire most like each unit, on sequences drawn by the seed.

    Units that are silent there have no rows, and are nobody's neighbours.
    """
    sizes = store.sql("SELECT seq_id, max(pos) + 1 FROM token_ids GROUP BY 1 ORDER BY 1").fetchall()
    rng = stream("tokens of a hook", seed, hook)
    n_drawn = -(-SAMPLED_TOKENS // max(size for _, size in sizes))
    drawn = rng.permutation([seq for seq, _ in sizes])[:n_drawn].tolist()
    rows = store.sql(_SAMPLE, hook=hook, seqs=drawn).fetchnumpy()
    width = int(rows["pos"].max(initial=0)) + 1
    columns = np.searchsorted(np.sort(drawn), rows["seq_id"]) * width + rows["pos"]
    n_tokens = sum(size for seq, size in sizes if seq in set(drawn))
    cells = (rows["act"].astype(np.float32), (rows["unit"], columns))
    acts = sparse.csr_array(cells, shape=(n_units, len(drawn) * width))
    norms = np.sqrt(np.asarray(acts.multiply(acts).sum(axis=1)).ravel())
    means = np.asarray(acts.sum(axis=1)).ravel() / n_tokens
    firing = np.flatnonzero(norms)
    scaled = sparse.diags_array(1 / norms[firing]) @ acts[firing]
    # the cosine of independent units: the product of their means over that of their sizes
    share = means[firing] * np.sqrt(n_tokens) / norms[firing]
    is_sparse = len(rows["act"]) < SPARSE * n_units * n_tokens
    other = scaled.T.tocsc() if is_sparse else scaled.toarray().T
    k = min(N_NEAREST, len(firing) - 1)
    parts: list[pa.Table] = []
    at_once = LOGITS_AT_ONCE // n_units + 1
    for first in range(0, len(firing) if k > 0 else 0, at_once):
        product = scaled[first : first + at_once] @ other
        cosines = product.toarray() if is_sparse else np.asarray(product)
        cosines[np.arange(len(cosines)), np.arange(first, first + len(cosines))] = -2.0
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        at = np.repeat(np.arange(first, first + len(cosines)), k)
        keys = _keys(hook, "kind", "coactivation", 0, len(cosines), k)
        promoted = {
            "unit": firing[at].astype(np.int32),
            "neighbour": firing[best.ravel()].astype(np.int32),
            "cosine": _double(np.take_along_axis(cosines, best, axis=1)).ravel(),
            "control": share[at] * share[best.ravel()],
        }
        parts.append(pa.table(keys | promoted))
    return pa.concat_tables([*parts, _NO_NEIGHBOURS])


_SAMPLE = """
SELECT unit, seq_id, pos, act FROM acts
WHERE hook = $hook AND seq_id IN (SELECT unnest($seqs::BIGINT[]))
"""

_NO_NEIGHBOURS = pa.table(
    {
        "hook": pa.array([], pa.string()),
        "unit": pa.array([], pa.int32()),
        "kind": pa.array([], pa.string()),
        "rank": pa.array([], pa.int32()),
        "neighbour": pa.array([], pa.int32()),
        "cosine": pa.array([], pa.float64()),
        "control": pa.array([], pa.float64()),
    }
)


def _keys(hook: str, column: str, kind: str, first: int, n: int, k: int) -> dict[str, Any]:
    """Return the columns by which n units, k rows each, are known."""
    return {
        "hook": pa.array([hook] * (n * k)),
        "unit": np.repeat(np.arange(first, first + n, dtype=np.int32), k),
        column: pa.array([kind] * (n * k)),
        "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), n),
    }


def _double(values: Any) -> Float[np.ndarray, " n"]:
    return np.asarray(values, dtype=np.float64).ravel()
