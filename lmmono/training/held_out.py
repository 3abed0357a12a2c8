"""What a model is worth during training: held-out loss, minimal pairs, and how its codes look."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from activation_store.write.recording import input_device
from lmmono.data.framing import text_start
from lmmono.data.minimal_pairs import MinimalPair
from lmmono.data.tokens import TokenRows
from lmmono.models.crate import CrateForCausalLM
from lmmono.models.hooks import recording
from lmmono.stats.formulas import kurtosis
from lmmono.stats.intervals import cluster_error


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """How one layer's neurons behave over the evaluated tokens."""

    layer: int
    """Block."""
    density: float
    """Share of (token, neuron) pairs with an activation above 0."""
    dead_fraction: float
    """Share of neurons that were never above 0."""
    kurtosis: float
    """Median over neurons of m4 / m2^2."""
    ista_step_norm: float | None = None
    """step_size * sigma_max(D)^2, for CRATE."""
    reconstruction_error: float | None = None
    """sum|x - D a|^2 / sum|x|^2 of the block's input by its code, for CRATE."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation on held-out rows."""

    loss: float
    """Nats per token."""
    loss_se: float
    """Standard error of the loss: documents vary, their tokens hang together; NaN for one."""
    n_tokens: int
    """Predicted tokens."""
    layers: tuple[LayerStatistics, ...]
    """Statistics per block."""


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, " n"]:
    """Return -ln p of every token but each row's first, in nats, rows one after another."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def evaluate(
    model: PreTrainedModel, rows: TokenRows, batch_rows: int, *, with_layers: bool = True
) -> Evaluation:
    """Return held-out loss and, with layers, statistics of a model's neurons over rows' tokens."""
    n_layers = model.config.num_hidden_layers if with_layers else 0
    codes = [f"blocks.{i}.mlp.hook_post" for i in range(n_layers)]
    sums = [_CodeSums() for _ in codes]
    losses: list[Tensor] = []
    was_training = model.training
    model.eval()
    is_token = np.asarray(rows.doc_ids) >= 0  # padding stands last, so that no token sees it
    with recording(model, codes) as acts:
        for i, ids in enumerate(_batches(rows.ids, batch_rows, input_device(model))):
            real = torch.from_numpy(is_token[i * batch_rows : (i + 1) * batch_rows]).to(ids.device)
            losses.append(token_losses(model, ids)[real[:, 1:].flatten()].double().cpu())
            for name, layer_sums in zip(codes, sums, strict=True):
                layer_sums.add(acts[name][real])
    ista: list[tuple[float | None, float | None]] = []
    if with_layers:
        ista = _ista_facts(model, next(_batches(rows.ids, batch_rows, input_device(model))))
    model.train(was_training)
    nats = torch.cat(losses).numpy()
    return Evaluation(
        loss=float(nats.mean()),
        loss_se=cluster_error(nats, rows.doc_ids[:, 1:][is_token[:, 1:]]),
        n_tokens=len(nats),
        layers=tuple(
            layer_sums.statistics(i, *facts)
            for i, (layer_sums, facts) in enumerate(zip(sums, ista, strict=True))
        ),
    )


@torch.no_grad()
def minimal_pair_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[MinimalPair],
    batch_pairs: int = 64,
) -> float:
    """Return the share of pairs whose good sentence is more probable, as a whole (BLiMP's rule)."""
    model.eval()
    better = 0
    for start in range(0, len(pairs), batch_pairs):
        part = pairs[start : start + batch_pairs]
        good = _sentence_log_probs(model, tokenizer, [pair.good for pair in part])
        bad = _sentence_log_probs(model, tokenizer, [pair.bad for pair in part])
        better += int((good > bad).sum())
    model.train()
    return better / len(pairs)


def _sentence_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: list[str]
) -> Float[Tensor, " batch"]:
    """Return ln p of each sentence after a BOS or end-of-text token, padded on the right."""
    start = text_start(tokenizer)
    assert start is not None, "a tokenizer of a run names its end of text"
    plain = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    encoded = [[start, *ids] for ids in plain]
    width = max(len(ids) for ids in encoded)
    padded = torch.tensor([ids + [start] * (width - len(ids)) for ids in encoded])
    lengths = torch.tensor([len(ids) for ids in encoded])
    ids = padded.to(input_device(model))
    losses = token_losses(model, ids).view(len(encoded), width - 1)
    real = torch.arange(1, width, device=ids.device) < lengths.to(ids.device)[:, None]
    return -(losses * real).sum(dim=1)


def _batches(
    rows: np.ndarray, batch_rows: int, device: torch.device
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Yield rows as tensors on the device, a batch at a time."""
    for start in range(0, len(rows), batch_rows):
        part = rows[start : start + batch_rows].astype(np.int64)
        yield torch.from_numpy(part).to(device)


@torch.no_grad()
def _ista_facts(
    model: PreTrainedModel, ids: Int[Tensor, "batch pos"]
) -> list[tuple[float | None, float | None]]:
    """Return (ista_step_norm, reconstruction_error) per CRATE layer; (None, None) without ISTA."""
    if not isinstance(model, CrateForCausalLM) or model.config.relu_mlp:
        return [(None, None)] * model.config.num_hidden_layers
    sizes, dictionaries = model.step_sizes(), model.dictionaries()
    codes = [f"blocks.{i}.mlp.hook_post" for i in range(len(sizes))]
    inputs = [f"model.blocks.{i}.ln2" for i in range(len(sizes))]
    facts: list[tuple[float | None, float | None]] = []
    with recording(model, [*inputs, *codes]) as acts:
        model(input_ids=ids, use_cache=False)
        for size, d, before, code in zip(sizes, dictionaries, inputs, codes, strict=True):
            x, a, d = acts[before].float(), acts[code].float(), d.float()
            error = (x - a @ d).square().sum() / x.square().sum()
            norm = size * float(torch.linalg.matrix_norm(d, ord=2)) ** 2
            facts.append((norm, float(error)))
    return facts


class _CodeSums:
    """Running sums of a layer's activations over tokens, in float64."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.powers: Float[Tensor, "4 units"] | None = None
        self.active: Int[Tensor, " units"] | None = None

    @torch.no_grad()
    def add(self, acts: Float[Tensor, "tokens units"]) -> None:
        """Add the activations of some tokens."""
        x = acts.double()
        powers = torch.stack([x.sum(0), (x2 := x * x).sum(0), (x2 * x).sum(0), (x2 * x2).sum(0)])
        active = (x > 0).sum(0)
        self.powers = powers if self.powers is None else self.powers + powers
        self.active = active if self.active is None else self.active + active
        self.n_tokens += len(x)

    def statistics(
        self, layer: int, step_norm: float | None, error: float | None
    ) -> LayerStatistics:
        """Return the layer's statistics over everything added."""
        assert self.powers is not None and self.active is not None
        peakedness = kurtosis(float(self.n_tokens), self.powers.cpu().numpy())
        alive = peakedness[~np.isnan(peakedness)]
        return LayerStatistics(
            layer=layer,
            density=float(self.active.double().mean()) / self.n_tokens,
            dead_fraction=float((self.active == 0).double().mean()),
            kurtosis=float(np.median(alive)) if len(alive) else float("nan"),
            ista_step_norm=step_norm,
            reconstruction_error=error,
        )
