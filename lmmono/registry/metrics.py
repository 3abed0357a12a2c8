"""The metrics by name: one formula per name, with its version, unit and equation.

Every stored row names a metric of `METRICS` and its version; a changed formula gets a new version,
never a new meaning. Formulas that several rooms compute stand in `lmmono.stats.formulas`. A line of
the tables below is a metric: name, version, unit, what is better, equation.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric name stands for."""

    name: str
    """Name in tables and figures."""
    version: int
    """Raised whenever the formula changes."""
    unit: str
    """Unit of the value, or its range."""
    better: Better
    """Direction of improvement, where there is one."""
    equation: str
    """The formula in one line."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest value that there can be; infinite where the unit names none.

        >>> METRICS["accuracy"].bounds, METRICS["unit_kurtosis"].bounds
        ((0.0, 1.0), (1.0, inf))
        """
        numbers = [float(number) for number in re.findall(r"-?\d+", self.unit)]
        if self.unit.startswith("["):
            return numbers[0], numbers[1]
        if self.unit.startswith("<="):
            return -math.inf, numbers[0]
        return (numbers[0], math.inf) if self.unit.startswith(">=") else (-math.inf, math.inf)


def _listed(table: str) -> list[Metric]:
    """Return the metrics of a table."""
    metrics: list[Metric] = []
    for line in table.splitlines():
        name, unit, better, equation = line.split(" | ", 3)  # an equation may have bars
        assert better in get_args(Better), line
        name, version = name.split()
        metrics.append(Metric(name, int(version), unit, cast(Better, better), equation))
    return metrics


def _simulated(scorer: str, records: str) -> list[Metric]:
    """Return the measures of a simulation scorer, and their means over units that have one."""
    t, p = "t over the tokens of all records", "p predicted from the explanation"
    formulas = {
        "": f"Pearson of {t} and {p}; {records}",
        "_spearman": f"Spearman of {t} and {p}; {records}",
        "_r2": f"1 - sum(t - p)^2 / sum(t - mean t)^2; {records}",
        "_uncentred_r2": f"1 - sum(t - p)^2 / sum t^2; {records}",
        "_deviation": f"1 - sum|t - p| / sum|t|; {records}",
    }
    metrics = [
        Metric(scorer + name, 1, "<= 1", "higher", f"{formula}; 0 where not defined")
        for name, formula in formulas.items()
    ]
    return metrics + [
        Metric(
            f"{metric.name}_defined",
            2,
            "<= 1",
            "higher",
            f"mean over units of {metric.name} where defined",
        )
        for metric in metrics
    ]


_SIMULATED = (
    ("simulation_tar", "as many top as random records"),
    ("simulation_random", "random records, firing or not"),
)


def _classified(name: str, contrast: str) -> list[Metric]:
    """Return the measures of a classification scorer, and their means over units that have one."""
    formulas = {
        "": "mean of the shares of each class that the judge gets right, unanswered by half",
        "_auroc": "P(score of a firing record > score of another), ties and unanswered by half",
        "_average_precision": "sum (R_k - R_{k-1}) P_k over thresholds, unanswered last",
    }
    metrics = [
        Metric(name + end, 1, "[0, 1]", "higher", f"{formula}; {contrast}; chance if not defined")
        for end, formula in formulas.items()
    ]
    return _with_defined(metrics)


def _with_defined(metrics: list[Metric]) -> list[Metric]:
    """Return metrics and, after them, their means over the units where they are defined."""
    return metrics + [
        Metric(
            f"{metric.name}_defined",
            2,
            metric.unit,
            metric.better,
            f"mean over units of {metric.name} if defined",
        )
        for metric in metrics
    ]


def _sided(scorer: str, counted: str, weighted: str | None) -> list[Metric]:
    """Return the measures of a scorer on records of both sides, and their means where defined.

    weighted: what the weighted draws of all sides estimate; None where they estimate nothing.
    """
    formulas = {
        "recall": f"share of firing {counted} that are predicted, on records where the unit fires",
        "precision": f"share of predicted {counted} that fire, on records predicted to fire",
        "f1": "harmonic mean of the recall and the precision of both sides",
        "weighted": f"{weighted} over all excerpts, from draws weighted by 1 / (mean draws)",
    }
    return _with_defined(
        [
            Metric(f"{scorer}_{name}", 1, "<= 1", "higher", formula)
            for name, formula in formulas.items()
            if name != "weighted" or weighted is not None
        ]
    )


_CLASSIFIED = (
    ("detection", "records that fire against silent ones"),
    ("detection_near_miss", "records that fire against silent ones with the favourite token"),
    ("fuzz", "firing tokens marked against marks in silent records"),
    ("fuzz_active", "firing tokens marked against other tokens of firing records"),
)

_GENERAL = """\
loss 1 | nats per token | lower | mean of -ln p(next token)
lr 1 | per step | neither | learning rate of the step
continuity_distance 1 | nats | neither | mean over texts of KL(p | q) + KL(q | p), p and q the \
outputs for a text and for the same text changed
flip_rate 1 | [0, 1] | neither | share of texts whose class a change changes
consistency 1 | [0, 1] | higher | share of texts whose class is right without noise and under \
each of some noises
meaning_ratio 1 | >= 0 | higher | continuity_distance of edits that change an attribute in \
every replaced word, over that of edits of as many words that change none
confidence 1 | [0, 1] | neither | mean over texts of the largest probability
gradient_norm 1 | >= 0 | neither | mean over texts of |d loss / d e| |e|, e the token \
embeddings; beside confidence, for gradients vanish where a model saturates
gradient_change 1 | >= 0 | lower | mean over texts of |g(e + noise) - g(e)| / |g(e)|, g = d \
loss / d e, noise of 0.05 of the root mean square of e
saliency_spearman 1 | [-1, 1] | higher | mean over texts of the rank correlation of gradient x \
input before and after a change, on the tokens that both texts have
saliency_overlap 1 | [0, 1] | higher | the same of Jaccard's index of the tenth of the tokens \
of largest |gradient x input|
attacked_accuracy 1 | [0, 1] | higher | share of texts right before and after an attack
transfer_accuracy 1 | [0, 1] | higher | share right of the texts that an attack on the first \
model of a suite has made
objective 1 | its own | neither | objective/NAME: mean of a loss term before its weight, over \
the steps that had it; objective/NAME/COLUMN: a further number of it
grad_norm 1 | 1 | neither | L2 norm of all gradients before clipping
minimal_pairs 1 | [0, 1] | higher | share of pairs with p(good) > p(bad)
accuracy 1 | [0, 1] | higher | share of texts whose likeliest class is true
density 1 | [0, 1] | neither | share of (token, unit) pairs above threshold
dead_fraction 1 | [0, 1] | lower | share of units never above threshold
kurtosis 1 | >= 1 | neither | median over units of m4 / m2^2 (normal: 3)
ista_step_norm 1 | 1 | neither | step_size * sigma_max(D)^2; stable below 2
reconstruction_error 1 | >= 0 | lower | sum|x - D a|^2 / sum|x|^2
fvu 1 | >= 0 | lower | sum|x - xhat|^2 / sum|x - mean(x)|^2 over the set
l0 1 | units per token | neither | mean number of non-zero acts per token
cosine 1 | [-1, 1] | higher | mean over tokens of cos(x, xhat)
shrinkage 1 | 1 | neither | sum|xhat|^2 / sum<x, xhat>; 1 is none
kl 1 | nats per token | lower | mean of KL(clean || spliced)
ce_loss_recovered 1 | <= 1 | higher | (CE_ablated - CE_spliced) / (CE_ablated - CE_clean); the \
preset names the ablation
stability_cosine 1 | [-1, 1] | higher | mean cosine of matched directions
stability_share 1 | [0, 1] | higher | share of matched cosines above 0.9
mcc 1 | [-1, 1] | higher | mean correlation of matched units, held out
fisher_ratio 1 | >= 0 | higher | d' (S1 + S0)^-1 d, mean of class against rest
feature_auroc 1 | [0, 1] | higher | mean AUROC of best units, held out
feature_f1 1 | [0, 1] | higher | mean F1 of best units, held out
unit_density 1 | [0, 1] | neither | share of tokens with act > threshold
unit_kurtosis 1 | >= 1 | neither | m4 / m2^2 of one unit (normal: 3)
token_purity 2 | [0, 1] | higher | share of strong acts (>= half the maximum) on the token \
chosen on other documents
ngram_consistency 2 | [0, 1] | higher | share of strong acts that end the n-gram chosen on \
other documents
monosemanticity_scale 1 | >= 0 | higher | mean of (z - mean)^2 / variance over the 1 % of \
tokens with the largest z (arXiv 2312.11560, there per token)
feature_decorrelation 1 | [0, 2] | higher | 1 - mean cosine of the activations of two tokens of \
different documents
unit_correlation 1 | [0, 1] | lower | mean r^2 over tokens of two units
class_selectivity 1 | [-1, 1] | higher | (mean act with the concept - without) / (with + \
without); chosen on other documents
semantic_consistency 2 | <= 1 | higher | (SC - E) / (1 - E), E the mean SC of shuffled labels; \
items where |act| > 1e-5
semantic_consistency_raw 2 | [0, 1] | higher | SC: largest share of a concept; items where \
|act| > 1e-5
semantic_consistency_top 2 | <= 1 | higher | (SC - E) / (1 - E), E the mean SC of shuffled \
labels; the top 1 % of items
semantic_consistency_top_raw 2 | [0, 1] | higher | SC: largest share of a concept; the top 1 % \
of items
sparse_probing_auc_1 1 | [0, 1] | higher | mean over concepts of the AUROC of a probe on the \
best 1 units, held out
sparse_probing_auc_2 1 | [0, 1] | higher | mean over concepts of the AUROC of a probe on the \
best 2 units, held out
sparse_probing_auc_5 1 | [0, 1] | higher | mean over concepts of the AUROC of a probe on the \
best 5 units, held out
fms 1 | [0, 1] | higher | mean over concepts of acc (local + global) / 2
fms_corrected 1 | [0, 1] | higher | FMS with 2 acc - 1 for acc: 0 at chance"""

_POPULATION = """\
population_f1 1 | [0, 1] | higher | 2 TP / (2 TP + FP + FN) over every stored token
population_precision 1 | [0, 1] | higher | TP / (TP + FP) over every stored token
population_recall 1 | [0, 1] | higher | TP / (TP + FN) over every stored token
population_iou 1 | [0, 1] | higher | TP / (TP + FP + FN) over every stored token
population_auprc 1 | [0, 1] | higher | sum (R_k - R_{k-1}) P_k over levels of the prediction
population_cosine 1 | [-1, 1] | higher | sum t p / sqrt(sum t^2 sum p^2), every stored token
population_pearson 1 | [-1, 1] | higher | Pearson of t and p over every stored token"""

_OF_UNITS = """\
intruder 1 | [0, 1] | higher | share of trials, by a language model
intruder_program 1 | [0, 1] | higher | share of trials, by a program
intervention 1 | [-1, 1] | higher | Pearson of logit changes at matched KL with ln p(v | unit's \
tokens) / p(v)
intervention_own 1 | [-1, 1] | higher | Pearson of logit changes at matched KL with the \
program's act on each token
embedding 1 | [0, 1] | higher | AUROC of the cosine with the explanation of records that fire
embedding_near_miss 1 | [0, 1] | higher | AUROC of the cosine with it, against near misses, of \
records that fire
surprisal 1 | [0, 1] | higher | AUROC of the gain in mean log-probability by the explanation of \
records that fire
surprisal_near_miss 1 | [0, 1] | higher | AUROC of the gain by it, against near misses, of \
records that fire
anthropic_intervals 1 | [-1, 1] | higher | Spearman over 60 examples of 9 tokens; 0 where not \
defined"""

_EFFECTS = """\
ablation_kl 1 | nats | neither | KL(clean || act = 0) where the unit fires
steering_kl 1 | nats | neither | KL(clean || act + the unit's maximum)
steering_strength 1 | maxima | neither | what to add for a KL of the target
token_selectivity 2 | <= 1 | higher | 1 - H(token | act) / H(token), H(token | act) a \
cross-entropy between documents"""

# of an interpreter g of a classifier f by attributes phi (FLINT)
_INTERPRETERS = """\
fidelity 1 | [0, 1] | higher | share of texts that f and g agree on
fidelity_errors 1 | [0, 1] | higher | share of texts that f gets wrong that f and g agree on
fidelity_ood 1 | [0, 1] | higher | share of texts of other domains that f and g agree on
fidelity_noisy 1 | [0, 1] | higher | share of texts with noise that f and g agree on
fidelity_kl 1 | nats | lower | mean KL(softmax f || softmax g)
conciseness_1_5 1 | >= 0 | lower | mean number of attributes with r > 1 / 1.5, r = alpha / max \
|alpha|
conciseness_2 1 | >= 0 | lower | mean number of attributes with r > 1 / 2, r = alpha / max |alpha|
conciseness_2_5 1 | >= 0 | lower | mean number of attributes with r > 1 / 2.5, r = alpha / max \
|alpha|
conciseness_3 1 | >= 0 | lower | mean number of attributes with r > 1 / 3, r = alpha / max |alpha|
conciseness_4 1 | >= 0 | lower | mean number of attributes with r > 1 / 4, r = alpha / max |alpha|
conciseness_5 1 | >= 0 | lower | mean number of attributes with r > 1 / 5, r = alpha / max |alpha|
attribute_dead 1 | [0, 1] | lower | share of attributes above 0 on no text
attribute_effective 1 | >= 1 | neither | exp H(mean phi over its sum)
attribute_exclusivity 1 | [0, 1] | neither | mean over attributes of max_c r_jc / sum_c r_jc, \
r_jc mean relevance, positive part
attribute_redundancy 1 | [0, 1] | lower | mean over j of max_i |corr(phi_j, phi_i)|
attribute_absent 1 | [0, 1] | lower | share of texts whose largest |alpha| is < 0
attribute_stability 1 | [-1, 1] | higher | mean correlation over texts of attributes of two \
seeds, matched one to one
comprehensiveness 1 | [-1, 1] | higher | median of p(class) - p(class | text without tokens \
where relevant attributes act), p of f
comprehensiveness_random 1 | [-1, 1] | neither | median of p(class) - p(class | text without as \
many random tokens), p of f
comprehensiveness_irrelevant 1 | [-1, 1] | neither | median of p(class) - p(class | text \
without as many tokens where other attributes act), p of f
comprehensiveness_gradients 1 | [-1, 1] | neither | median of p(class) - p(class | text without \
as many tokens of largest integrated gradient), p of f
sufficiency 1 | [-1, 1] | lower | median of p(class) - p(class | only tokens where relevant \
attributes act), p of f
sufficiency_random 1 | [-1, 1] | neither | median of p(class) - p(class | only as many random \
tokens), p of f
sufficiency_irrelevant 1 | [-1, 1] | neither | median of p(class) - p(class | only as many \
tokens where other attributes act), p of f
sufficiency_gradients 1 | [-1, 1] | neither | median of p(class) - p(class | only as many \
tokens of largest integrated gradient), p of f
word_gain 1 | nats per word | higher | -ln p(word) of the unigram model less that given phi, \
held out
gradient_agreement 1 | [-1, 1] | higher | mean Spearman over tokens of acts with integrated \
gradients of the top attribute
attribute_flips 1 | [0, 1] | lower | share of edits that change argmax_j r_j
attribute_overlap 1 | [0, 1] | higher | mean Jaccard of {j: r_j > 1/3} over edits
attribute_distance 1 | [0, 1] | lower | mean |phi(x) - phi(x')|_1 / (|phi(x)|_1 + |phi(x')|_1 + \
1e-6)
relevance_distance 1 | [0, 2] | lower | mean 1 - cos(r(x), r(x'))
attribute_relevance 1 | [-1, 1] | neither | mean r_j over texts of the class that f and g agree on
attribute_norm 1 | >= 0 | neither | mean |phi(x)|_1
edited_norm 1 | >= 0 | neither | mean |phi(x')|_1 of edited texts
mcc_shuffled 1 | [-1, 1] | neither | mcc with the features of other tokens
mcc_untrained 1 | [-1, 1] | neither | mcc of the same code with random weights
mcc_texts 1 | [-1, 1] | higher | mean correlation over texts of a feature's share of tokens \
with its match, held out"""

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *_listed(_GENERAL),
        *_with_defined(_listed(_POPULATION)),
        *_with_defined(_listed(_OF_UNITS)),
        *_listed(_EFFECTS),
        *(metric for scorer, records in _SIMULATED for metric in _simulated(scorer, records)),
        *(metric for name, contrast in _CLASSIFIED for metric in _classified(name, contrast)),
        *(metric for name, _ in _SIMULATED for metric in _sided(name, "tokens", "Pearson")),
        *(
            metric
            for name in ("detection", "embedding", "surprisal")
            for metric in _sided(name, "records", "F1")
        ),
        *_sided("anthropic_intervals", "tokens", "Pearson"),
        *_sided("fuzz", "marked tokens", None),
        *_listed(_INTERPRETERS),
    )
}
