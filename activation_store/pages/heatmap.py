"""Tokens coloured by their activations: HTML, and text for a terminal.

A level of 1 to 9 is the activation against a scale. Colour is never alone: the underline grows with
the level, the number is there on hover, and a terminal gets it as a raised digit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import SupportsFloat

from markupsafe import Markup

from activation_store.pages.escaping import escaped, shown
from activation_store.pages.templating import static
from activation_store.printable import number
from activation_store.read.characters import whole_characters

LEVELS = 9
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def text_heatmap(
    tokens: Sequence[str],
    acts: Iterable[SupportsFloat],
    *,
    scale: float | None = None,
    peak: int | None = None,
) -> "Heatmap":
    """Return tokens coloured by activations, which a notebook shows.

    Args:
        tokens: Strings that joined are the text; bytes as `<0xE5>` are joined to characters.
        acts: One number per token, such as a row of what `run_with_cache` gives; of negative ones
            the underline is dashed, and another colour.
        scale: Activation of the deepest colour; by default the largest.
        peak: Index of a token to mark.

    Raises:
        ValueError: There are not as many numbers as tokens.
    """
    numbers = [float(act) for act in acts]
    if len(numbers) != len(tokens):
        raise ValueError(f"text_heatmap: want one act per token, got {len(numbers)} acts for "
                         f"{len(tokens)} tokens")  # fmt: skip
    sizes = [abs(act) for act in numbers if math.isfinite(act)]
    top = max(sizes, default=0.0) if scale is None else scale
    return Heatmap(tuple(whole_characters(list(tokens), peak)), tuple(numbers), top, peak)


@dataclass(frozen=True, slots=True)
class Heatmap:
    """Tokens with their activations, ready to be shown."""

    tokens: tuple[str, ...]
    """Strings; a character of several tokens stands at one of them."""
    acts: tuple[float, ...]
    """One number per token."""
    scale: float
    """Activation of the deepest colour."""
    peak: int | None = None
    """Index of the marked token."""

    @property
    def levels(self) -> list[int]:
        """Return 0 to 9 for each token, below 0 for negative activations."""
        return [level(act, self.scale) for act in self.acts]

    @property
    def html(self) -> Markup:
        """Return spans without styles, for a page that has `unit.css`."""
        return heat_spans(self.tokens, self.acts, self.scale, self.peak)

    def _repr_html_(self) -> str:
        return in_notebook(Markup('<p class="excerpt">{}</p>').format(self.html))

    def __repr__(self) -> str:
        parts: list[str] = []
        for i, (token, depth) in enumerate(zip(self.tokens, self.levels, strict=True)):
            bare = token.lstrip(" ")
            text = f"«{bare}»" if i == self.peak else bare
            raised = "" if depth == 0 else "⁻" * (depth < 0) + _RAISED[abs(depth)]
            parts.append(" " * (len(token) - len(bare)) + text + raised)
        return str(shown("".join(parts)))


def in_notebook(markup: Markup) -> str:
    """Return markup with the styles that it needs, for a cell of a notebook."""
    return f'<div class="am-pages"><style>{static("unit.css")}</style>{markup}</div>'


def excerpts_html(excerpts: Iterable[Heatmap]) -> str:
    """Return excerpts as a list for a notebook, all on the scale of the strongest."""
    chosen = list(excerpts)
    scale = max((excerpt.scale for excerpt in chosen), default=0.0)
    rows = [
        Markup('<li><span class="act">{}</span> <bdi class="excerpt">{}</bdi></li>').format(
            "" if excerpt.peak is None else number(excerpt.acts[excerpt.peak]),
            heat_spans(excerpt.tokens, excerpt.acts, scale, excerpt.peak),
        )
        for excerpt in chosen
    ]
    return in_notebook(Markup('<ol class="excerpts">{}</ol>').format(Markup("").join(rows)))


def level(act: float, scale: float) -> int:
    """Return how deep a colour is, 0 for none; an activation that is there has one.

    >>> level(0.0, 2.0), level(0.01, 2.0), level(2.0, 2.0), level(-1.0, 2.0), level(9.0, 2.0)
    (0, 1, 9, -5, 9)
    """
    if not act or act != act or scale <= 0:
        return 0
    depth = min(LEVELS, math.ceil(LEVELS * min(abs(act) / scale, 1.0)))
    return depth if act > 0 else -depth


def heat_spans(
    tokens: Sequence[str], acts: Sequence[float], scale: float, peak: int | None
) -> Markup:
    """Return tokens as markup; those without an activation, side by side, are plain text."""
    parts: list[str] = []
    at = 0
    cells = [(level(act, scale), i == peak) for i, act in enumerate(acts)]
    for is_plain, run in groupby(cells, key=lambda cell: cell == (0, False)):
        size = len(list(run))
        if is_plain:
            parts.append(_text("".join(tokens[at : at + size])))
        else:
            for i in range(at, at + size):
                depth, is_peak = cells[i]
                name = f"h{depth}" if depth >= 0 else f"n{-depth}"
                tag = "b" if is_peak else "span"
                bare = tokens[i].lstrip(" ") or tokens[i]  # a mark stands at the word
                parts.append(" " * (len(tokens[i]) - len(bare)))
                title = number(acts[i])
                parts.append(f'<{tag} class="{name}" title="{title}">{_text(bare)}</{tag}>')
        at += size
    return Markup("".join(parts))


def _text(text: str) -> Markup:
    """Return a piece of text whose line breaks can be seen and break no line."""
    return escaped(text.replace("\n", "↵").replace("\t", "⇥"))
