"""The settings of dictionaries: one frozen class per kind, told apart by `arch`.

The same classes check the keywords of `lm.SAE`, `lm.Classical` and `lm.Control` and the entries of
a recipe's section `dictionary`. The target of a dictionary is one of `k`, `target_l0` and
`coefficient`, by its `arch`; what was reached is measured, never assumed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from lmmono.errors import nearest
from lmmono.recipe.section import Count, Fraction, Section, clash
from lmmono.recipe.sections import SkippedTokens


class DictionarySettings(Section):
    """What the settings of every dictionary share: a name, which only a recipe's entries have."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    """Name in tables and folders; null makes one of arch, width and target: `topk-x4-k32`."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings without the name, as `lm.SAE` and the others take them, arch included."""
        return self.model_dump(exclude={"name"})

    @model_serializer(mode="wrap")
    def _leave_out_no_name(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # `dictionary.json` and the digests of fits hold settings, and a name is none of them; a fit
        # without a rule to stop by is the fit that it was before there were any
        values = serialize(self)
        absent = set[str]() if values.get("name") else {"name"}
        absent |= set[str]() if values.get("stop_gain") else {"stop_gain", "stop_window_steps"}
        return {k: v for k, v in values.items() if k not in absent}


class Width(DictionarySettings):
    """How many latents: a number, or a multiple of the input's width."""

    d_sae: Count | None = None
    """Number of latents; give this or `expansion`."""
    expansion: Count | None = None
    """Number of latents over the width of the input."""

    @model_validator(mode="after")
    def _want_one(self) -> "Width":
        if (self.d_sae is None) == (self.expansion is None):
            raise clash("want d_sae or expansion, one of them", "d_sae", "expansion")
        return self

    def width(self, d_in: int) -> int:
        """Return the number of latents for an input of `d_in` coordinates."""
        return self.d_sae if self.expansion is None else self.expansion * d_in  # pyright: ignore[reportReturnType]


class Trained(Width):
    """What all dictionaries have that are trained by gradient steps."""

    steps: Count = 5_000
    """Optimizer steps; one batch of vectors each."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate of Adam."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    decay_fraction: Fraction = 0.2
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    scaling: Literal["norm", "none"] = "norm"
    """`norm` divides the input by one number, so that its mean norm is sqrt(d_in)."""
    dead_window_steps: Count = 500
    """A latent that did not fire for this many steps counts as dead in training."""
    stop_gain: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Stop when the mean FVU of `stop_window_steps` steps is less than this share below that of as
    many steps before: 0.02 is 2 %. The learning rate then falls to zero over `decay_fraction` of
    all steps. Null takes all `steps`, which are the most otherwise."""
    stop_window_steps: Count = 1_000
    """Steps of that window."""

    @model_validator(mode="after")
    def _leave_steps_after_warmup(self) -> "Trained":
        if self.warmup_steps >= self.steps:
            message = f"want fewer than steps ({self.steps}), got {self.warmup_steps}"
            raise clash(message, "warmup_steps", "steps")
        return self


class TopKSae(Trained):
    """Only the k largest pre-activations stay: per token, or k per token on average of a batch."""

    arch: Literal["topk", "batchtopk"]
    k: Count
    """Latents that stay active per token."""
    aux_coefficient: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the loss that lets dead latents model the residual error."""
    sparse_step: bool = True
    """On a CPU, compute active latents only; false takes sae-lens' own step, equal to rounding."""


class MatryoshkaSae(Trained):
    """A batch-topk SAE whose first latents must also reconstruct on their own."""

    arch: Literal["matryoshka_batchtopk"]
    k: Count
    """Latents that stay active per token, on average of a batch."""
    widths: tuple[Count, ...] = Field(min_length=1, strict=False)
    """Widths of the nested dictionaries, growing; the full width is added."""
    aux_coefficient: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the loss that lets dead latents model the residual error."""


class MatchingPursuitSae(Trained):
    """Latents chosen one after the other, each to fit what is left."""

    arch: Literal["matching_pursuit"]
    k: Count
    """Most latents per token."""
    residual_threshold: Annotated[float, Field(ge=0.0)] = 0.01
    """Stop when the norm of what is left, in scaled units, is below this."""


class PenaltySae(Trained):
    """ReLU latents under an L1 penalty, plain or gated."""

    arch: Literal["standard", "gated"]
    coefficient: Annotated[float, Field(ge=0.0)]
    """Weight of the L1 penalty."""
    coefficient_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the penalty grows from zero."""


class JumpReluSae(Trained):
    """Latents with a learned threshold each, under an L0 penalty."""

    arch: Literal["jumprelu"]
    target_l0: Annotated[float, Field(gt=0.0)] | None = None
    """Mean active latents per token to aim at; without it the penalty is on L0 itself."""
    coefficient: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the L0 penalty."""
    coefficient_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the penalty grows from zero."""
    initial_threshold: Annotated[float, Field(gt=0.0)] = 0.01
    """Threshold of every latent at the start, in scaled units."""
    bandwidth: Annotated[float, Field(gt=0.0)] = 0.05
    """Width of the kernel through which thresholds get a gradient."""


AnySae = TopKSae | MatryoshkaSae | MatchingPursuitSae | PenaltySae | JumpReluSae
Sae = Annotated[AnySae, Field(discriminator="arch")]


class Decomposition(Width):
    """A classical decomposition, fitted by scikit-learn on a sample of the vectors."""

    arch: Literal["pca", "ica", "nmf", "dictionary_learning", "kmeans"]
    k: Count | None = None
    """Keep only the k coefficients of largest size per token; null keeps all.

    `dictionary_learning` must have it and finds k directions per token by orthogonal matching
    pursuit; `kmeans` has one active latent per token and takes none.
    """
    max_tokens: Count = 100_000
    """Vectors to fit on, the first of the seeded order."""
    max_iterations: Count = 200
    """Most passes of an iterative method."""

    @model_validator(mode="after")
    def _check_k(self) -> "Decomposition":
        if self.arch == "dictionary_learning" and self.k is None:
            raise clash("want k, the directions per token, for dictionary_learning", "k", "arch")
        if self.arch == "kmeans" and self.k is not None:
            raise clash("want no k for kmeans: one latent is active per token", "k", "arch")
        return self


class RawVectors(DictionarySettings):
    """The input itself: raw neurons or raw stream coordinates."""

    arch: Literal["raw"]
    k: Count | None = None
    """Keep only the k coordinates of largest size per token; null keeps all."""


class RandomDictionary(Width):
    """Random unit directions; the k with the largest projection are fitted by least squares."""

    arch: Literal["random"]
    k: Count
    """Latents that stay active per token."""
    max_tokens: Count = 100_000
    """Vectors whose mean is taken off, the first of the seeded order."""


class DenseAutoencoder(Trained):
    """A ReLU auto-encoder without any sparsity term."""

    arch: Literal["dense"]


Control = Annotated[RawVectors | RandomDictionary | DenseAutoencoder, Field(discriminator="arch")]

AnyDictionary = AnySae | Decomposition | RawVectors | RandomDictionary | DenseAutoencoder

SIGNED = ("pca", "ica", "dictionary_learning", "raw", "random")
"""Kinds whose code has negative values; a store keeps what is above a threshold."""
SEEDLESS = ("raw", "pca")
"""Kinds in which nothing is random: fitted once, whatever the seeds."""

TrainedControl = Literal["shuffled", "untrained"]
FitSeed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True, slots=True)
class Planned:
    """One dictionary to fit on every hook."""

    entry: AnyDictionary
    """Its settings."""
    entry_name: str
    """Name of the entry: that of all its seeds together."""
    name: str
    """Name in tables and folders: the entry's, with the control and the seed where there are."""
    seed: int
    """Seed of the fit."""
    control: TrainedControl | None = None
    """What its vectors lack; None for those of the model as it is."""

    @property
    def is_sae(self) -> bool:
        """Whether it is trained by gradient steps on the vectors as they come."""
        return isinstance(self.entry, AnySae)


class Dictionaries(Section):
    """Which dictionaries are learned of which hooks, and how they are judged."""

    hooks: tuple[str, ...] = Field(default=("blocks.*.mlp.hook_post",), min_length=1)
    """Hook names or globs; every entry of `learn` is fitted on each."""
    learn: tuple[Annotated[AnyDictionary, Field(discriminator="arch")], ...] = ()
    """The dictionaries, by their `arch`; none makes the stage empty."""
    seeds: tuple[FitSeed, ...] = Field(default=(0,), min_length=1)
    """Every entry is fitted once with each; two or more give rows on stability."""
    controls: tuple[TrainedControl, ...] = ()
    """For each SAE, with the first seed, also train one on shuffled vectors, or on those of the
    untrained model."""
    source: Literal["store", "model"] = "store"
    """`store` captures the vectors of `train` once and keeps them; `model` recomputes them."""
    max_tokens: Count | None = 500_000
    """Tokens of `train` to learn from, whole rows; null takes all."""
    batch_tokens: Count = 2048
    """Vectors per step."""
    eval_tokens: Count | None = 100_000
    """Tokens of `score` to judge on, whole rows; null takes all."""
    recovery_tokens: Count | None = 10_000
    """Tokens of `score` on which features of a planted corpus are looked for; null skips that."""
    skip: SkippedTokens = Field(default_factory=SkippedTokens)
    """Tokens that dictionaries neither learn from nor are judged on; none by default."""
    checkpoint_every_steps: Count | None = 1000
    """Steps between checkpoints of a fit; null keeps only an interrupted fit's last one."""
    latents: str | None = None
    """Name of the entry whose latents, with the first seed, go into the store; null for none."""
    latents_tokens: Count | None = None
    """Tokens per captured split whose latents are stored, whole rows; null takes all captured."""

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each entry of `learn`, given or made."""
        return tuple(entry.name or _made_name(entry) for entry in self.learn)

    @property
    def planned(self) -> tuple[Planned, ...]:
        """Every dictionary to fit, entry by entry: with each seed, then its controls."""
        return tuple(
            planned
            for entry, name in zip(self.learn, self.names, strict=True)
            for planned in self._planned(entry, name)
        )

    @property
    def first_seed(self) -> int:
        """Seed of what is fitted once: controls, and the dictionary whose latents are stored."""
        return next(iter(self.seeds))

    def _planned(self, entry: AnyDictionary, name: str) -> Iterator[Planned]:
        seeded = len(self.seeds) > 1 and entry.arch not in SEEDLESS
        for seed in self.seeds if seeded else self.seeds[:1]:
            yield Planned(entry, name, f"{name}-seed{seed}" if seeded else name, seed)
        for control in self.controls if isinstance(entry, AnySae) else ():
            yield Planned(entry, name, f"{name}-{control}", self.first_seed, control)

    @model_validator(mode="after")
    def _check_names(self) -> "Dictionaries":
        if len(set(self.seeds)) < len(self.seeds):
            raise clash("want every seed once", "seeds")
        taken: dict[str, int] = {}
        for i, (entry, name) in enumerate(zip(self.learn, self.names, strict=True)):
            for planned in self._planned(entry, name):
                if planned.name in taken:
                    first = f"dictionary.learn[{taken[planned.name]}]"
                    message = f"want a name of its own: {first} gives {planned.name} too"
                    raise clash(message, f"learn.{i}.name", f"learn.{i}.arch")
                taken[planned.name] = i
        return self

    @model_validator(mode="after")
    def _check_latents(self) -> "Dictionaries":
        if self.latents is None:
            return self
        if self.latents not in self.names:
            way_out = nearest(self.latents, self.names) if self.names else "learn is empty"
            message = f"want the name of an entry of learn, got {self.latents!r}; {way_out}"
            raise clash(message, "latents")
        arch = self.learn[self.names.index(self.latents)].arch
        if arch in SIGNED:
            raise clash(f"want a code that is never negative; that of {arch} is signed", "latents")
        return self


def _made_name(entry: AnyDictionary) -> str:
    """Return what tells an entry from others of its kind: arch, width and target."""
    return "-".join([entry.arch, *_parts(entry)]).replace(".", "_").replace("+", "")


def _parts(entry: AnyDictionary) -> Iterator[str]:
    for field, letter in (("d_sae", ""), ("expansion", "x"), ("k", "k"), ("target_l0", "l0_")):
        if (value := getattr(entry, field, None)) is not None:
            yield f"{letter}{value:g}"
    if isinstance(entry, PenaltySae) or (
        isinstance(entry, JumpReluSae) and entry.target_l0 is None
    ):
        yield f"c{entry.coefficient:g}"
