"""A unit in the shape of Neuronpedia's `GET /api/feature/<model>/<layer>/<unit>`.

So that clients and notebooks written against the site work against a laptop. What lmmono does not
know (comments, lists, vectors) is there and empty.
"""

import re
from typing import Any

from activation_store.errors import ContentError
from activation_store.pages import UnitPage
from lmmono.errors import RunError
from lmmono.reports.server.served import ServedRun


def hook_of_layer(run: ServedRun, layer: str) -> str:
    """Return the hook that a source means: its own name, or `<layer>-<set>` as in exports.

    Of several hooks of a layer, the one whose name ends like the set is meant, with `.` and `_`
    written `-`; else the neurons of the MLP.

    Raises:
        ContentError: There is none of that layer.
        RunError: Several fit.
    """
    if layer in run.hooks:
        return layer
    number, _, name = layer.partition("-")
    of_layer = [h for h in run.hooks if re.search(rf"(?:^|\.){re.escape(number)}\.", h)]
    if not number.isdigit() or not of_layer:
        listing = ", ".join(run.hooks)
        raise ContentError(f"{run.name}: no layer {layer!r}; want N-set or one of {listing}.")
    ends = [h for h in of_layer if name and re.sub(r"[._]", "-", h).endswith(name)]
    neurons = [h for h in of_layer if h.endswith(".mlp.hook_post")]
    for fitting in (ends, neurons, of_layer):
        if len(fitting) == 1:
            return fitting[0]
    raise RunError(f"{layer}: several hooks fit: {', '.join(of_layer)}; name one in its place")


def feature_json(model: str, layer: str, page: UnitPage) -> dict[str, Any]:
    """Return what Neuronpedia's API returns of a feature.

    Args:
        model: Name of the run.
        layer: Source, as it was asked for.
        page: What is known of the unit.
    """
    data, stats = page.data, page.data["stats"]
    largest = stats["max_act"] or 0.0
    name = {"modelId": model, "layer": layer, "index": str(page.unit)}
    bars = data["histogram"]
    promoted = {sign: data["promotes"].get(sign, []) for sign in ("up", "down")}
    return {
        **name,
        "sourceSetName": layer.partition("-")[2] or None,
        "creatorName": "lmmono",
        "hookName": page.hook,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "maxActApprox": largest,
        "frac_nonzero": stats["density"] or 0.0,
        "freq_hist_data_bar_heights": [float(n) for n in bars],
        "freq_hist_data_bar_values": [(i + 0.5) * largest / len(bars) for i in range(len(bars))],
        "pos_str": [row["token"] for row in promoted["up"]],
        "pos_values": [row["logit"] for row in promoted["up"]],
        "neg_str": [row["token"] for row in promoted["down"]],
        "neg_values": [row["logit"] for row in promoted["down"]],
        "correlated_neurons_indices": [],
        "correlated_features_indices": [
            row["neighbour"] for row in data["neighbours"].get("coactivation", [])
        ],
        "comments": [],
        "lists": [],
        "activations": [
            _activation(name, kind, row) for kind, rows in data["exemplars"].items() for row in rows
        ],
        "explanations": [
            _explanation(name, n, row, data["scores"])
            for n, row in enumerate(data["explanations"])
            if row["text"] is not None
        ],
    }


def _activation(name: dict[str, str], kind: str, row: dict[str, Any]) -> dict[str, Any]:
    acts = [float(act) for act in row["acts"]]
    return {
        **name,
        "id": f"{kind}-{row['rank']}",
        "tokens": list(row["tokens"]),
        "values": acts,
        "maxValue": max(acts),
        "maxValueTokenIndex": acts.index(max(acts)),
        "minValue": min(acts),
        "dataSource": kind,
        "dataIndex": str(row["rank"]),
        "qualifyingTokenIndex": row["peak"],
    }


def _explanation(
    name: dict[str, str], n: int, row: dict[str, Any], scores: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        **name,
        "id": f"explanation-{n}",
        "description": row["text"],
        "typeName": row["explainer"],
        "explanationModelName": row["model"],
        "scores": [
            {
                "value": score["value"],
                "explanationScoreTypeName": ":".join(
                    filter(None, (score["metric"], score["preset"]))
                ),
                "explanationScoreModelName": score["judge"] or "program",
            }
            for score in scores
            if score["explainer"] == row["explainer"] and score["value"] is not None
        ],
    }
