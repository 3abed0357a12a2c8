"""The metrics by name: one formula per name, with its version, unit and equation.

Every stored row names a metric of `METRICS` and its version; a changed formula gets a new version,
never a new meaning. Formulas that several rooms compute stand in `lmmono.stats.formulas`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric name stands for."""

    name: str
    """Name in tables and figures."""
    version: int
    """Raised whenever the formula changes."""
    unit: str
    """Unit of the value, or its range."""
    better: Literal["lower", "higher", "neither"]
    """Direction of improvement, where there is one."""
    equation: str
    """The formula in one line."""


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
            f"{each.name}_defined",
            2,
            "<= 1",
            "higher",
            f"mean over units of {each.name} where defined",
        )
        for each in metrics
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
            f"{each.name}_defined",
            2,
            each.unit,
            each.better,
            f"mean over units of {each.name} if defined",
        )
        for each in metrics
    ]


def _interpreters() -> list[Metric]:
    """Return the measures of an interpreter g of a classifier f by attributes phi (FLINT)."""
    where = {
        "": "texts",
        "_errors": "texts that f gets wrong",
        "_ood": "texts of other domains",
        "_noisy": "texts with noise",
    }
    tokens = {
        "": "tokens where relevant attributes act",
        "_random": "as many random tokens",
        "_irrelevant": "as many tokens where other attributes act",
        "_gradients": "as many tokens of largest integrated gradient",
    }
    return [
        *(
            Metric(
                f"fidelity{end}", 1, "[0, 1]", "higher", f"share of {what} that f and g agree on"
            )
            for end, what in where.items()
        ),
        Metric("fidelity_kl", 1, "nats", "lower", "mean KL(softmax f || softmax g)"),
        *(
            Metric(
                f"conciseness_{f'{tau:g}'.replace('.', '_')}",
                1,
                ">= 0",
                "lower",
                f"mean number of attributes with r > 1 / {tau:g}, r = alpha / max |alpha|",
            )
            for tau in (1.5, 2, 2.5, 3, 4, 5)
        ),
        Metric("attribute_dead", 1, "[0, 1]", "lower", "share of attributes above 0 on no text"),
        Metric("attribute_effective", 1, ">= 1", "neither", "exp H(mean phi over its sum)"),
        Metric(
            "attribute_exclusivity",
            1,
            "[0, 1]",
            "neither",
            "mean over attributes of max_c r_jc / sum_c r_jc, r_jc mean relevance, positive part",
        ),
        Metric(
            "attribute_redundancy",
            1,
            "[0, 1]",
            "lower",
            "mean over j of max_i |corr(phi_j, phi_i)|",
        ),
        Metric(
            "attribute_absent", 1, "[0, 1]", "lower", "share of texts whose largest |alpha| is < 0"
        ),
        Metric(
            "attribute_stability",
            1,
            "[-1, 1]",
            "higher",
            "mean correlation over texts of attributes of two seeds, matched one to one",
        ),
        *(
            Metric(
                f"comprehensiveness{end}",
                1,
                "[-1, 1]",
                "higher" if not end else "neither",
                f"median of p(class) - p(class | text without {what}), p of f",
            )
            for end, what in tokens.items()
        ),
        *(
            Metric(
                f"sufficiency{end}",
                1,
                "[-1, 1]",
                "lower" if not end else "neither",
                f"median of p(class) - p(class | only {what}), p of f",
            )
            for end, what in tokens.items()
        ),
        Metric(
            "word_gain",
            1,
            "nats per word",
            "higher",
            "-ln p(word) of the unigram model less that given phi, held out",
        ),
        Metric(
            "gradient_agreement",
            1,
            "[-1, 1]",
            "higher",
            "mean Spearman over tokens of acts with integrated gradients of the top attribute",
        ),
        Metric("attribute_flips", 1, "[0, 1]", "lower", "share of edits that change argmax_j r_j"),
        Metric(
            "attribute_overlap", 1, "[0, 1]", "higher", "mean Jaccard of {j: r_j > 1/3} over edits"
        ),
        Metric(
            "attribute_distance",
            1,
            "[0, 1]",
            "lower",
            "mean |phi(x) - phi(x')|_1 / (|phi(x)|_1 + |phi(x')|_1 + 1e-6)",
        ),
        Metric("relevance_distance", 1, "[0, 2]", "lower", "mean 1 - cos(r(x), r(x'))"),
        Metric(
            "attribute_relevance",
            1,
            "[-1, 1]",
            "neither",
            "mean r_j over texts of the class that f and g agree on",
        ),
        Metric("attribute_norm", 1, ">= 0", "neither", "mean |phi(x)|_1"),
        Metric("edited_norm", 1, ">= 0", "neither", "mean |phi(x')|_1 of edited texts"),
        Metric("mcc_shuffled", 1, "[-1, 1]", "neither", "mcc with the features of other tokens"),
        Metric(
            "mcc_untrained", 1, "[-1, 1]", "neither", "mcc of the same code with random weights"
        ),
        Metric(
            "mcc_texts",
            1,
            "[-1, 1]",
            "higher",
            "mean correlation over texts of a feature's share of tokens with its match, held out",
        ),
    ]


def _sided(scorer: str, counted: str, weighted: str) -> list[Metric]:
    """Return the measures of a scorer on records of both sides, and their means where defined."""
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
        ]
    )


_CLASSIFIED = (
    ("detection", "records that fire against silent ones"),
    ("detection_near_miss", "records that fire against silent ones with the favourite token"),
    ("fuzz", "firing tokens marked against marks in silent records"),
    ("fuzz_active", "firing tokens marked against other tokens of firing records"),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", 1, "nats per token", "lower", "mean of -ln p(next token)"),
        Metric("lr", 1, "per step", "neither", "learning rate of the step"),
        Metric(
            "continuity_distance",
            1,
            "nats",
            "neither",
            "mean over texts of KL(p | q) + KL(q | p), p and q the outputs for a text and for the "
            "same text changed",
        ),
        Metric("flip_rate", 1, "[0, 1]", "neither", "share of texts whose class a change changes"),
        Metric(
            "consistency",
            1,
            "[0, 1]",
            "higher",
            "share of texts whose class is right without noise and under each of some noises",
        ),
        Metric(
            "meaning_ratio",
            1,
            ">= 0",
            "higher",
            "continuity_distance of edits that change an attribute in every replaced word, over "
            "that of edits of as many words that change none",
        ),
        Metric("confidence", 1, "[0, 1]", "neither", "mean over texts of the largest probability"),
        Metric(
            "gradient_norm",
            1,
            ">= 0",
            "neither",
            "mean over texts of |d loss / d e| |e|, e the token embeddings; beside confidence, for "
            "gradients vanish where a model saturates",
        ),
        Metric(
            "gradient_change",
            1,
            ">= 0",
            "lower",
            "mean over texts of |g(e + noise) - g(e)| / |g(e)|, g = d loss / d e, noise of 0.05 of "
            "the root mean square of e",
        ),
        Metric(
            "saliency_spearman",
            1,
            "[-1, 1]",
            "higher",
            "mean over texts of the rank correlation of gradient x input before and after a "
            "change, on the tokens that both texts have",
        ),
        Metric(
            "saliency_overlap",
            1,
            "[0, 1]",
            "higher",
            "the same of Jaccard's index of the tenth of the tokens of largest |gradient x input|",
        ),
        Metric(
            "attacked_accuracy",
            1,
            "[0, 1]",
            "higher",
            "share of texts right before and after an attack",
        ),
        Metric(
            "transfer_accuracy",
            1,
            "[0, 1]",
            "higher",
            "share right of the texts that an attack on the first model of a suite has made",
        ),
        Metric(
            "objective",
            1,
            "its own",
            "neither",
            "objective/NAME: mean of a loss term before its weight, over the steps that had it; "
            "objective/NAME/COLUMN: a further number of it",
        ),
        Metric("grad_norm", 1, "1", "neither", "L2 norm of all gradients before clipping"),
        Metric("minimal_pairs", 1, "[0, 1]", "higher", "share of pairs with p(good) > p(bad)"),
        Metric("accuracy", 1, "[0, 1]", "higher", "share of texts whose likeliest class is true"),
        Metric("density", 1, "[0, 1]", "neither", "share of (token, unit) pairs above threshold"),
        Metric("dead_fraction", 1, "[0, 1]", "lower", "share of units never above threshold"),
        Metric("kurtosis", 1, ">= 1", "neither", "median over units of m4 / m2^2 (normal: 3)"),
        Metric("ista_step_norm", 1, "1", "neither", "step_size * sigma_max(D)^2; stable below 2"),
        Metric("reconstruction_error", 1, ">= 0", "lower", "sum|x - D a|^2 / sum|x|^2"),
        Metric("fvu", 1, ">= 0", "lower", "sum|x - xhat|^2 / sum|x - mean(x)|^2 over the set"),
        Metric("l0", 1, "units per token", "neither", "mean number of non-zero acts per token"),
        Metric("cosine", 1, "[-1, 1]", "higher", "mean over tokens of cos(x, xhat)"),
        Metric("shrinkage", 1, "1", "neither", "sum|xhat|^2 / sum<x, xhat>; 1 is none"),
        Metric("kl", 1, "nats per token", "lower", "mean of KL(clean || spliced)"),
        Metric(
            "ce_loss_recovered",
            1,
            "<= 1",
            "higher",
            "(CE_ablated - CE_spliced) / (CE_ablated - CE_clean); the preset names the ablation",
        ),
        Metric("stability_cosine", 1, "[-1, 1]", "higher", "mean cosine of matched directions"),
        Metric("stability_share", 1, "[0, 1]", "higher", "share of matched cosines above 0.9"),
        Metric("mcc", 1, "[-1, 1]", "higher", "mean correlation of matched units, held out"),
        Metric(
            "fisher_ratio", 1, ">= 0", "higher", "d' (S1 + S0)^-1 d, mean of class against rest"
        ),
        Metric("feature_auroc", 1, "[0, 1]", "higher", "mean AUROC of best units, held out"),
        Metric("feature_f1", 1, "[0, 1]", "higher", "mean F1 of best units, held out"),
        Metric("unit_density", 1, "[0, 1]", "neither", "share of tokens with act > threshold"),
        Metric("unit_kurtosis", 1, ">= 1", "neither", "m4 / m2^2 of one unit (normal: 3)"),
        Metric(
            "token_purity",
            2,
            "[0, 1]",
            "higher",
            "share of strong acts (>= half the maximum) on the token chosen on other documents",
        ),
        Metric(
            "ngram_consistency",
            2,
            "[0, 1]",
            "higher",
            "share of strong acts that end the n-gram chosen on other documents",
        ),
        Metric(
            "monosemanticity_scale",
            1,
            ">= 0",
            "higher",
            "mean of (z - mean)^2 / variance over the 1 % of tokens with the largest z "
            "(arXiv 2312.11560, there per token)",
        ),
        Metric(
            "feature_decorrelation",
            1,
            "[0, 2]",
            "higher",
            "1 - mean cosine of the activations of two tokens of different documents",
        ),
        Metric("unit_correlation", 1, "[0, 1]", "lower", "mean r^2 over tokens of two units"),
        Metric(
            "class_selectivity",
            1,
            "[-1, 1]",
            "higher",
            "(mean act with the concept - without) / (with + without); chosen on other documents",
        ),
        *(
            Metric(f"semantic_consistency{name}", 2, scale, "higher", f"{formula}; {items}")
            for name, items in (("", "items where |act| > 1e-5"), ("_top", "the top 1 % of items"))
            for name, scale, formula in (
                (name, "<= 1", "(SC - E) / (1 - E), E the mean SC of shuffled labels"),
                (f"{name}_raw", "[0, 1]", "SC: largest share of a concept"),
            )
        ),
        *(
            Metric(
                f"sparse_probing_auc_{k}",
                1,
                "[0, 1]",
                "higher",
                f"mean over concepts of the AUROC of a probe on the best {k} units, held out",
            )
            for k in (1, 2, 5)
        ),
        Metric("fms", 1, "[0, 1]", "higher", "mean over concepts of acc (local + global) / 2"),
        Metric("fms_corrected", 1, "[0, 1]", "higher", "FMS with 2 acc - 1 for acc: 0 at chance"),
        *_with_defined(
            [
                Metric(f"population_{name}", 1, scale, "higher", formula)
                for name, scale, formula in (
                    ("f1", "[0, 1]", "2 TP / (2 TP + FP + FN) over every stored token"),
                    ("precision", "[0, 1]", "TP / (TP + FP) over every stored token"),
                    ("recall", "[0, 1]", "TP / (TP + FN) over every stored token"),
                    ("iou", "[0, 1]", "TP / (TP + FP + FN) over every stored token"),
                    ("auprc", "[0, 1]", "sum (R_k - R_{k-1}) P_k over levels of the prediction"),
                    ("cosine", "[-1, 1]", "sum t p / sqrt(sum t^2 sum p^2), every stored token"),
                    ("pearson", "[-1, 1]", "Pearson of t and p over every stored token"),
                )
            ]
        ),
        *_with_defined(
            [
                Metric("intruder", 1, "[0, 1]", "higher", "share of trials, by a language model"),
                Metric("intruder_program", 1, "[0, 1]", "higher", "share of trials, by a program"),
                Metric(
                    "intervention",
                    1,
                    "[-1, 1]",
                    "higher",
                    "Pearson of logit changes at matched KL with ln p(v | unit's tokens) / p(v)",
                ),
                Metric(
                    "intervention_own",
                    1,
                    "[-1, 1]",
                    "higher",
                    "Pearson of logit changes at matched KL with the program's act on each token",
                ),
                *(
                    Metric(name, 1, "[0, 1]", "higher", f"AUROC of the {what} of records that fire")
                    for name, what in (
                        ("embedding", "cosine with the explanation"),
                        ("embedding_near_miss", "cosine with it, against near misses,"),
                        ("surprisal", "gain in mean log-probability by the explanation"),
                        ("surprisal_near_miss", "gain by it, against near misses,"),
                    )
                ),
                Metric(
                    "anthropic_intervals",
                    1,
                    "[-1, 1]",
                    "higher",
                    "Spearman over 60 examples of 9 tokens; 0 where not defined",
                ),
            ]
        ),
        Metric("ablation_kl", 1, "nats", "neither", "KL(clean || act = 0) where the unit fires"),
        Metric("steering_kl", 1, "nats", "neither", "KL(clean || act + the unit's maximum)"),
        Metric("steering_strength", 1, "maxima", "neither", "what to add for a KL of the target"),
        Metric(
            "token_selectivity",
            2,
            "<= 1",
            "higher",
            "1 - H(token | act) / H(token), H(token | act) a cross-entropy between documents",
        ),
        *(metric for scorer, records in _SIMULATED for metric in _simulated(scorer, records)),
        *(metric for name, contrast in _CLASSIFIED for metric in _classified(name, contrast)),
        *(metric for name, _ in _SIMULATED for metric in _sided(name, "tokens", "Pearson")),
        *_sided("detection", "records", "F1"),
        *_interpreters(),
    )
}
