"""What FLINT's attributes look like, as data: a page, a notebook or a query draws it.

The class-by-attribute matrix; for each pair windows around the tokens where an attribute acts most
and, because the strongest overstate purity, windows from the middle of its range; the decoder's
words; and texts that make an attribute large, beside what the same search makes of an interpreter
that learned nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from lmmono.methods.flint import ATTRIBUTES, Flint, Interpretation
from lmmono.methods.flint_gradients import giving
from lmmono.methods.flint_interpreter import Interpreter, counted_tokens
from lmmono.methods.flint_measures import PAIR
from lmmono.methods.flint_objective import build_interpreter
from lmmono.methods.flint_words import ContentWords
from lmmono.models.hooks import bare, recording
from lmmono.registry.metrics import METRICS

RADIUS = 12
"""Tokens on each side of the token that a window is around."""

ALIKE = 0.6
"""Jaccard index of two windows' tokens from which the second is left out."""


@dataclass(frozen=True, slots=True)
class AttributeWindow:
    """Some tokens around one where an attribute acts."""

    text: int
    """Number of the text."""
    phi: float
    """The attribute of the text."""
    tokens: tuple[str, ...]
    """The tokens. In a causal model an act has seen those before it only."""
    acts: tuple[float, ...]
    """The attribute's act on each."""


@dataclass(frozen=True, slots=True)
class Maximised:
    """A text that a search has made an attribute large on."""

    start: tuple[str, ...]
    """Tokens that the search began with: some of a text's own, filler for the others."""
    tokens: tuple[str, ...]
    """Tokens that it ended with."""
    before: float
    """The attribute of the text it began with."""
    after: float
    """The attribute at the end."""


@dataclass(frozen=True, slots=True)
class AttributePicture:
    """One attribute."""

    attribute: int
    """Its number: the unit of hook `flint.hook_attributes`."""
    relevance: tuple[float | None, ...]
    """Global relevance for each class; None for a class that no text has."""
    words: tuple[str, ...]
    """Words that it makes likelier, the most first; none without decoder `bow`."""
    unlikely: tuple[str, ...]
    """Words that it makes less likely."""
    top: tuple[AttributeWindow, ...]
    """Windows of the texts where it is largest, of the class it speaks for most."""
    middle: tuple[AttributeWindow, ...]
    """Windows of texts in the middle of its range over all classes."""
    maximised: Maximised | None = None
    """A text made to have it."""
    control: Maximised | None = None
    """The same search for the same attribute of an interpreter with random weights."""


def pictures(
    flint: Flint,
    read: Interpretation,
    *,
    n_windows: int = 3,
    n_words: int = 10,
    maximise: int = 0,
    seed: int = 0,
) -> list[AttributePicture]:
    """Return a picture of every attribute.

    Args:
        flint: Fitted.
        read: What it makes of texts.
        n_windows: Windows of each kind.
        n_words: Words of the decoder; half as many unlikely ones.
        maximise: Attributes, the most relevant first, that a text is searched for.
        seed: Seed of the search.
    """
    matrix = np.nan_to_num(read.matrix, nan=-np.inf)
    order = np.argsort(-matrix.max(axis=0), kind="stable")[:maximise].tolist()
    shown: list[AttributePicture] = []
    for j in range(read.phi.shape[1]):
        label = int(matrix[:, j].argmax())
        likely, unlikely = decoder_words(flint, j, n_words)
        top = windows(flint, read, j, label=label, k=n_windows)
        best = control = None
        if j in order and top:
            best = maximised(flint, read.ids[top[0].text], j, seed=seed)
            blank = untrained_interpreter(flint, seed=seed)
            control = maximised(flint, read.ids[top[0].text], j, seed=seed, interpreter=blank)
        shown.append(
            AttributePicture(
                attribute=j,
                relevance=tuple(None if np.isnan(r) else float(r) for r in read.matrix[:, j]),
                words=likely,
                unlikely=unlikely,
                top=tuple(top),
                middle=tuple(windows(flint, read, j, k=n_windows, kind="middle")),
                maximised=best,
                control=control,
            )
        )
    return shown


def class_attribute_rows(
    read: Interpretation, class_names: Sequence[str], *, task: str, feature: str, seed: int
) -> list[dict[str, Any]]:
    """Return the class-by-attribute matrix as rows of table `all_scores`, one per pair.

    `preset` is the class, `unit` the attribute, `dictionary` the interpreter and `explainer` the
    task; pairs above 0.2 are those that the paper shows for natural images.
    """
    counts = [int((read.agree & (read.classes == c)).sum()) for c in range(read.n_classes)]
    return [
        {
            "metric": "attribute_relevance",
            "metric_version": METRICS["attribute_relevance"].version,
            "preset": name,
            "hook": ATTRIBUTES,
            "unit": j,
            "dictionary": feature,
            "explainer": task,
            "seed": seed,
            "split": "test",
            "value": None if np.isnan(read.matrix[c, j]) else float(read.matrix[c, j]),
            "n": counts[c],
            "failure": None if counts[c] else f"no text of class {name} that both models agree on",
        }
        for c, name in enumerate(class_names)
        for j in range(read.phi.shape[1])
    ]


def as_json(
    shown: Sequence[AttributePicture], class_names: Sequence[str], **about: Any
) -> dict[str, Any]:
    """Return pictures as JSON has them: class names, threshold of shown pairs, attributes."""
    attributes = [asdict(picture) for picture in shown]
    return {**about, "classes": list(class_names), "shown_from": PAIR, "attributes": attributes}


def decoder_words(flint: Flint, attribute: int, n: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words that an attribute makes likeliest, and half as many least likely ones.

    None without decoder `bow`.
    """
    if flint.settings.decoder != "bow":
        return (), ()
    interpreter = flint.interpreter
    weights = interpreter.decoder_words[:, attribute].detach().cpu()
    order = weights.argsort(descending=True, stable=True)
    ids = interpreter.word_ids.cpu()[order]
    decode: Any = flint.classifier.reader.tokenizer.decode
    words = [decode([int(i)]).strip() for i in (*ids[:n], *ids.flip(0)[: n // 2])]
    n_likely = min(n, len(ids))
    return tuple(words[:n_likely]), tuple(words[n_likely:])


def windows(
    flint: Flint,
    read: Interpretation,
    attribute: int,
    *,
    label: int | None = None,
    k: int = 3,
    kind: Literal["top", "middle"] = "top",
    radius: int = RADIUS,
) -> list[AttributeWindow]:
    """Return windows around the tokens where an attribute acts most, one per text.

    Args:
        flint: Fitted.
        read: What it makes of texts.
        attribute: Which.
        label: Take texts that the interpreter puts in this class; None takes all.
        k: Windows at most.
        kind: `top`: the largest values; `middle`: from the 70th percentile of the values above 0
            down to the 50th.
        radius: Tokens on each side.
    """
    values = read.phi[:, attribute]
    wanted = values > 0
    if label is not None:
        wanted &= read.classes == label
    if kind == "middle" and wanted.any():
        low, high = np.quantile(values[wanted], [0.5, 0.7])
        wanted &= (values >= low) & (values <= high)
    order = np.flatnonzero(wanted)
    order = order[np.argsort(-values[order], kind="stable")]
    decode: Any = flint.classifier.reader.tokenizer.decode
    shown: list[AttributeWindow] = []
    seen: list[set[int]] = []
    for i in order.tolist():
        acts, ids = read.acts[i][:, attribute], read.ids[i]
        place = int(acts.argmax())
        span = slice(max(1, place - radius), place + radius + 1)
        here = set(ids[span].tolist())
        if any(len(here & other) >= ALIKE * len(here | other) for other in seen):
            continue
        seen.append(here)
        tokens = tuple(decode([int(t)]) for t in ids[span])
        shown.append(
            AttributeWindow(i, float(values[i]), tokens, tuple(acts[span].astype(float).tolist()))
        )
        if len(shown) == k:
            break
    return shown


def untrained_interpreter(flint: Flint, *, seed: int = 0) -> Interpreter:
    """Return an interpreter of the same shape whose weights learned nothing."""
    words = None
    if flint.settings.decoder != "token":
        ids = flint.interpreter.word_ids.cpu().numpy()
        words = ContentWords(ids, np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blank = build_interpreter(
            flint.settings,
            bare(flint.classifier.network.body),
            n_classes=flint.classifier.n_classes,
            hooks=flint.hooks,
            pooling=flint.classifier.settings.pooling,
            words=words,
        )
    return blank.to(flint.interpreter.weight.device).eval()


def maximised(
    flint: Flint,
    ids: Int64[ndarray, " pos"],
    attribute: int,
    *,
    seed: int = 0,
    kept: float = 0.3,
    n_steps: int = 20,
    n_candidates: int = 64,
    n_tried: int = 64,
    edit_cost: float = 0.01,
    interpreter: Interpreter | None = None,
) -> Maximised:
    """Search for a text that has an attribute, swapping one token at a time.

    The paper starts from an image of low intensity and follows the gradient. Of a text a share of
    the tokens stays, the rest begins as filler; each step takes the swap that is best of some drawn
    among those that the gradient promises most of (HotFlip, Ebrahimi et al. 2018). No language
    model judges the result: it is a list of tokens, not a sentence.

    Args:
        flint: Fitted.
        ids: The text to start from.
        attribute: Which.
        seed: Seed of what stays and what is tried.
        kept: Share of tokens that stay; the ones where the attribute acts most are filler first.
        n_steps: Swaps at most; a step whose draw holds none that helps takes none.
        n_candidates: Tokens that the gradient proposes at each place.
        n_tried: Swaps of these that are evaluated in a step.
        edit_cost: What a changed token costs, as a share of the text.
        interpreter: Whose attribute; None takes the fitted one.
    """
    random = np.random.default_rng((seed, attribute))
    psi = flint.interpreter if interpreter is None else interpreter
    body: Any = bare(flint.classifier.network.eval().body)
    table: Tensor = body.get_input_embeddings().weight.detach()
    vocabulary = _vocabulary(flint, len(table))
    start = ids.copy()
    n = len(ids) - 1
    filled = 1 + random.permutation(n)[: round((1 - kept) * n)]
    start[filled] = flint.classifier.reader.first
    now, before = start, float(_value(flint, psi, start[None], attribute)[0])
    best = before
    for _ in range(n_steps):
        gradient = _gradient(flint, psi, now, attribute)
        gain = (table[vocabulary] @ gradient.T) - (table[torch.from_numpy(now)] * gradient).sum(1)
        gain[:, 0] = -torch.inf  # the token before the text stays
        _, proposed = gain.topk(min(n_candidates, len(vocabulary)), dim=0)
        places = random.integers(1, len(now), n_tried)
        choices = random.integers(0, len(proposed), n_tried)
        tried = np.repeat(now[None], n_tried, axis=0)
        tried[np.arange(n_tried), places] = vocabulary[proposed[choices, places].cpu()].numpy()
        n_edits = (tried[:, 1:] != ids[1:]).sum(axis=1)
        values = _value(flint, psi, tried, attribute)
        scores = values - edit_cost * n_edits / n
        if scores.max() <= best - edit_cost * (now[1:] != ids[1:]).sum() / n:
            continue  # the next draw may hold a swap that helps
        now, best = tried[int(scores.argmax())], float(values[int(scores.argmax())])
    decode: Any = flint.classifier.reader.tokenizer.decode
    as_tokens = [tuple(decode([int(t)]) for t in row[1:]) for row in (start, now)]
    return Maximised(as_tokens[0], as_tokens[1], before, best)


def _vocabulary(flint: Flint, d_vocab: int) -> Int64[Tensor, " n"]:
    """Return the tokens that may be put in: content words where the decoder has some."""
    ids = getattr(flint.interpreter, "word_ids", None)
    return torch.arange(d_vocab) if ids is None else ids.cpu()


@torch.no_grad()
def _value(
    flint: Flint, psi: Interpreter, rows: Int64[ndarray, "n pos"], attribute: int
) -> Float[ndarray, " n"]:
    block = torch.from_numpy(rows)
    network = flint.classifier.network
    lengths = torch.full((len(rows),), rows.shape[1])
    with recording(network.body, flint.hooks) as acts:
        logits = network(block, lengths)
    used = counted_tokens(torch.ones_like(block, dtype=torch.bool)).to(logits.device)
    return psi([acts[hook] for hook in flint.hooks], used).phi[:, attribute].cpu().numpy()


def _gradient(
    flint: Flint, psi: Interpreter, ids: Int64[ndarray, " pos"], attribute: int
) -> Float[Tensor, "pos d"]:
    """Return the gradient of an attribute with respect to the token embeddings."""
    network = flint.classifier.network
    body: Any = bare(network.body)
    table = body.get_input_embeddings()
    block = torch.from_numpy(ids)[None].to(table.weight.device)
    embeds = table(block).detach().requires_grad_(True)
    handle = table.register_forward_hook(giving(embeds))
    try:
        with torch.enable_grad(), recording(network.body, flint.hooks) as acts:
            network(block, torch.tensor([len(ids)]))
            used = counted_tokens(torch.ones_like(block, dtype=torch.bool))
            value = psi([acts[hook] for hook in flint.hooks], used).phi[0, attribute]
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(value, embeds)
    return gradient[0]
