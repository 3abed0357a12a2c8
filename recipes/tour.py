"""A tour in Python: train, capture, query, and ask which neuron knows which planted feature.

python recipes/tour.py
"""

# %% Train a CRATE on the embedded language; a finished run is taken up.
import numpy as np
import torch

import activation_store as astore
import lmmono as lm
from lmmono.data.truth import planted_language, row_truth

changes = ("name=tour", "model.arch=crate", "train.steps=50")
recipe = lm.Recipe.load("recipes/quickstart.yaml", *changes)
run = lm.train(recipe)
print(f"{run}: {run.val_loss:.3f} nats per token on held-out documents")

# %% Capture its neurons on documents kept for explaining, and ask in SQL.
HOOK = "blocks.1.mlp.hook_post"
rows = run.tokens("explain").limit(min(20_000, run.tokens("explain").ids.size))
with astore.open(run.dir / "tour.duckdb", mode="w", overwrite=True) as store:
    lm.capture(run.model, rows, hooks=HOOK, into=store, max_density=1.0)
store = astore.open(run.dir / "tour.duckdb")
print(
    store.sql("SELECT unit, density, kurtosis FROM unit_stats ORDER BY kurtosis DESC LIMIT 5").df()
)
print(store.unit(HOOK, 0))

# %% The truth: which features each token has. A neuron is judged by its AUROC for a feature.
language = planted_language(run.corpus)


def aurocs(rows: lm.data.TokenRows, shift: int = 0) -> np.ndarray:
    """Return [features, neurons]: chance that a token with the feature is the more active."""
    _, acts = lm.run_with_cache(run.model, torch.from_numpy(rows.ids.astype(np.int64)), HOOK)
    x = acts[HOOK].flatten(0, 1).numpy()
    truth = np.roll(row_truth(run.corpus, rows), shift, axis=0).reshape(len(x), -1).T.astype(float)
    order = x.argsort(axis=0, kind="stable")
    ranks = np.empty(x.shape)
    np.put_along_axis(ranks, order, np.arange(1.0, len(x) + 1)[:, None], axis=0)
    for unit in range(x.shape[1]):  # tokens of equal activation share their mean rank
        _, place, n = np.unique(x[:, unit], return_inverse=True, return_counts=True)
        ranks[:, unit] = (np.bincount(place, ranks[:, unit]) / n)[place]
    n_on = truth.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (truth @ ranks - n_on * (n_on + 1) / 2) / (n_on * (len(x) - n_on))


# %% Choose each feature's neuron on `explain` documents, judge it on `score` documents.
unseen = run.tokens("score").limit(min(20_000, run.tokens("score").ids.size))
chosen = np.nan_to_num(aurocs(rows)).argmax(axis=1)
features = np.arange(len(language.features))
found, control = aurocs(unseen)[features, chosen], aurocs(unseen, shift=1)[features, chosen]
print(f"median AUROC over {len(features)} features: {np.nanmedian(found):.3f}")
print(f"the same neurons against the truth of the next row: {np.nanmedian(control):.3f}")
for i in np.argsort(-np.nan_to_num(found))[:10]:
    print(f"  {found[i]:.3f}  neuron {chosen[i]:4d}  {language.features[i].name}")
