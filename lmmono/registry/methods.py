"""The methods that change a model or put something beside it, with their sources and status.

A record names its home as a string, so that training, suites and recipes reach a method without
importing it. Adding one is adding a record, and, for an objective, its settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lmmono.errors import TrainError
from lmmono.registry.lookup import find, load

Role = Literal["objective", "adapter", "head", "interpreter", "comparator"]
"""`objective`: a loss term. `adapter`: weights added to a model that is tuned. `head`: what turns
features into logits, or learns codes on frozen ones. `interpreter`: learns to explain a model.
`comparator`: an interpretable model of another kind, to compare with."""

Place = Literal["train", "fine_tuning", "robustness", "python"]
"""Where a method is named: recipe sections `train` and `robustness.fine_tuning`, families and
learners of `robustness`, or from Python alone."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method."""

    name: str
    """Name in recipes and tables; of an objective, its `kind`."""
    role: Role
    """What it is."""
    about: str
    """What it does, in a sentence."""
    paper: str
    """Where it comes from."""
    variant: str
    """What of the paper this is: its equation, released code, or a stated candidate."""
    status: str
    """How sure we are that it is what the paper has."""
    home: str
    """`module:name`; of an objective, takes its settings and a context, returns the objective."""
    places: tuple[Place, ...]
    """Where it can be named."""

    def load(self) -> Callable[..., Any]:
        """Import and return what the record stands for."""
        return load(self.home)


_PENALTIES = "lmmono.methods.penalties"
_CONSISTENCY = "lmmono.methods.smoothness"
_ADAPTERS = "lmmono.methods.adapters:adapted"
_CONTRASTIVE = "lmmono.methods.contrastive"
_CONCEPTS = "lmmono.methods.concepts"
_TUNED: tuple[Place, ...] = ("train", "fine_tuning")

_METHODS = (
    Method(
        "flint",
        "interpreter",
        "attributes of a classifier's layers, from which a linear head gives the same classes",
        "Parekh, Mozharovskyi and d'Alché-Buc 2021 (arXiv 2010.09345), FLINT",
        "text: attributes of tokens, no negative weight; paper: weights and signs for MNIST",
        "losses as in the released code, which differ from the text; on text it is ours",
        "lmmono.methods.flint_objective:FlintObjective",
        ("fine_tuning", "robustness", "python"),
    ),
    Method(
        "decorrelation",
        "objective",
        "pairs of units, or of tokens, are pushed towards correlation 0",
        "Yan et al. 2024 (arXiv 2406.17969), DecPO",
        "squared correlations of units, or squared cosines of tokens",
        "the idea; the released loss is un-normalised and signed, which a norm penalty also lowers",
        f"{_PENALTIES}:DecorrelationTerm",
        _TUNED,
    ),
    Method(
        "sparsity",
        "objective",
        "activations are made small (L1) or few (Hoyer)",
        "L1; Hoyer 2004 (J. Mach. Learn. Res. 5)",
        "mean |a|; 1 - Hoyer's sparseness",
        "standard definitions",
        f"{_PENALTIES}:SparsityTerm",
        _TUNED,
    ),
    Method(
        "mono_score",
        "objective",
        "units fire on tokens of near embeddings",
        "MonoLoss (arXiv 2602.12403)",
        "the paper's formula on token embeddings, or on any hook's activations",
        "formula as published; the embedding is our choice, the paper has images",
        f"{_PENALTIES}:MonoScoreTerm",
        _TUNED,
    ),
    Method(
        "reversed_deactivation",
        "objective",
        "the most monosemantic activations are put to their mean, gradient 0 or turned round",
        "MEmeL, KDD 2024 (arXiv 2312.11560)",
        "reversed, naive",
        "candidates: the paper's equations could not be read",
        f"{_PENALTIES}:ReversedDeactivationTerm",
        _TUNED,
    ),
    Method(
        "continuity",
        "objective",
        "changes that leave the meaning shall change logits, streams, gradients, attributes little",
        "Wu et al., semantic continuity (arXiv 2011.09789)",
        "task + weight x distance, every choice a setting; augmentation with or without it",
        "candidates: beyond the abstract and the form of the loss the paper could not be read",
        "lmmono.methods.continuity:ContinuityTerm",
        _TUNED,
    ),
    Method(
        "r_drop",
        "objective",
        "two passes with dropout agree",
        "R-Drop, Liang et al. 2021 (arXiv 2106.14448)",
        "half the symmetric KL, batch means; dropout of the model, or of token embeddings",
        "the paper's equation; its code sums over the batch",
        f"{_CONSISTENCY}:RDropTerm",
        _TUNED,
    ),
    Method(
        "vat",
        "objective",
        "the worst small change of token embeddings changes the output little",
        "VAT, Miyato et al. (arXiv 1704.03976)",
        "KL to the held clean output; radius over the norm of a text's embeddings",
        "equations from memory",
        f"{_CONSISTENCY}:VatTerm",
        _TUNED,
    ),
    Method(
        "smart",
        "objective",
        "the same with symmetric KL and a step of one largest norm per token",
        "SMART, Jiang et al. 2020 (arXiv 1911.03437)",
        "the released code's infinity norm per token; no Bregman proximal term",
        "as its code",
        f"{_CONSISTENCY}:SmartTerm",
        _TUNED,
    ),
    Method(
        "freelb",
        "objective",
        "the main loss at embeddings changed against the model, mean over steps uphill",
        "FreeLB, Zhu et al. 2020 (arXiv 1909.11764)",
        "one optimizer step on the mean; dropout drawn anew in each pass",
        "the paper's algorithm but for the shared dropout masks",
        f"{_CONSISTENCY}:FreeLbTerm",
        _TUNED,
    ),
    Method(
        "label_smoothing",
        "objective",
        "the main loss with smoothed labels",
        "Szegedy et al. 2016 (arXiv 1512.00567)",
        "(1 - share) loss + share mean of -log p",
        "standard definition",
        f"{_CONSISTENCY}:LabelSmoothingTerm",
        _TUNED,
    ),
    Method(
        "jacobian",
        "objective",
        "logits change little with token embeddings",
        "Hoffman et al. 2019 (arXiv 1908.02729)",
        "squared Frobenius norm by random projections",
        "standard definition",
        f"{_CONSISTENCY}:JacobianTerm",
        _TUNED,
    ),
    Method(
        "lora",
        "adapter",
        "a low-rank update of every linear layer",
        "Hu et al. 2022 (arXiv 2106.09685)",
        "B A x",
        "peft's own",
        _ADAPTERS,
        ("fine_tuning", "python"),
    ),
    Method(
        "rslora",
        "adapter",
        "LoRA scaled by alpha over the root of the rank",
        "Kalajdzievski 2023 (arXiv 2312.03732)",
        "B A x",
        "peft's own",
        _ADAPTERS,
        ("fine_tuning", "python"),
    ),
    Method(
        "dora",
        "adapter",
        "LoRA of directions, with a learned magnitude of each output",
        "Liu et al. 2024 (arXiv 2402.09353)",
        "the paper's",
        "peft's own",
        _ADAPTERS,
        ("fine_tuning", "python"),
    ),
    Method(
        "monolora",
        "adapter",
        "LoRA with non-negative maps in its update",
        "Zhang et al. 2024 (arXiv 2410.21331)",
        "relu_out, relu_both, relu_code; topk_code is ours",
        "candidates: the equation could not be read, and no code is public",
        _ADAPTERS,
        ("fine_tuning", "python"),
    ),
    Method(
        "two_branch",
        "adapter",
        "the difference of two non-negative updates of half the rank: MonoLoRA's control",
        "ours",
        "ReLU(B1 ReLU(A1 x)) - ReLU(B2 ReLU(A2 x))",
        "a control, in no paper",
        _ADAPTERS,
        ("fine_tuning", "python"),
    ),
    Method(
        "topk_lora",
        "adapter",
        "LoRA of which the k largest codes act, straight through",
        "marek357/lora_interp on GitHub; no paper",
        "hard gate forward, k softmax(z / temperature) backward; temperature schedule linear",
        "formula of the repository, code ours; its k schedule is left out",
        _ADAPTERS,
        ("fine_tuning", "python"),
    ),
    Method(
        "cl",
        "head",
        "a contrastive head on the mean row of a text",
        "Zhang et al. 2024 (arXiv 2410.21331); SimCLR's loss",
        "on frozen features of a language model; the paper's is trained with a vision model",
        "loss and temperature as released; architecture and positives ours",
        f"{_CONTRASTIVE}:cl",
        ("robustness", "python"),
    ),
    Method(
        "ncl",
        "head",
        "the same head with a non-negative map at its end",
        "Wang et al. 2024 (arXiv 2403.12459)",
        "maps of the released code; rep_relu where not told",
        "loss and maps as released; architecture and positives ours",
        f"{_CONTRASTIVE}:ncl",
        ("robustness", "python"),
    ),
    Method(
        "csr",
        "head",
        "a tied top-k SAE with a contrastive term on its codes",
        "Wen et al. 2025 (arXiv 2503.01776)",
        "loss of the released code; positives differ, where its text code has identical passes",
        "loss as released, positives ours",
        f"{_CONTRASTIVE}:csr",
        ("robustness", "python"),
    ),
    Method(
        "nonneg_ce",
        "head",
        "cross entropy of ReLU(e) ReLU(W)^T without a bias",
        "Wang et al. 2024 (arXiv 2403.12459)",
        "the authors' definition in issue 2 of PKU-ML/non_neg",
        "as defined; a learner of probes solves it as the convex problem that it is",
        "lmmono.methods.nonneg:NonNegativeHead",
        ("fine_tuning", "robustness", "python"),
    ),
    Method(
        "concept_bottleneck",
        "comparator",
        "a classifier whose head sees supervised concepts alone",
        "C3M, Tan et al. 2024 (arXiv 2311.05014)",
        "equations of the released code on frozen rows, without its sigmoid before cross entropy",
        "code read, tables not; the language model is not tuned",
        f"{_CONCEPTS}.bottleneck:ConceptBottleneck",
        ("python",),
    ),
    Method(
        "hi_concept",
        "comparator",
        "concepts of a layer whose removal changes what the model says",
        "HI-Concept, Zhao et al. 2023 (arXiv 2305.02160)",
        "losses and weights of the released code; off-diagonals squared, rows of full length",
        "code read, tables not",
        f"{_CONCEPTS}.hi_concept:HiConcept",
        ("python",),
    ),
    Method(
        "dolfin",
        "comparator",
        "a classifier by features that are present in a text",
        "DoLFIn (arXiv 2011.05295)",
        "presence max or noisy_or, head on the sum or the vector: candidates",
        "a reconstruction: the equations could not be read, and no code is public",
        f"{_CONCEPTS}.dolfin:Dolfin",
        ("python",),
    ),
    Method(
        "induction_gram",
        "comparator",
        "a language model of matches in a corpus and in the context",
        "Induction-Gram (arXiv 2411.00066)",
        "its three sources and their order; likeness by any encoder, its own is not distilled",
        "code read; unigrams are mixed in, so that losses are finite",
        f"{_CONCEPTS}.induction:InductionGram",
        ("python",),
    ),
)

METHODS = {method.name: method for method in _METHODS}
"""Methods by name."""


def find_method(name: str) -> Method:
    """Return a method.

    Raises:
        TrainError: There is none of that name.
    """
    return find("method", name, METHODS, TrainError)
