"""Two runs behind a server, with texts that would do something on a page that let them."""

from pathlib import Path

from planted_store import planted_store
from small_store import HOOK, small_store

import activation_store as astore
from lmmono.reports.server.served import Served

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b]0;t\x07‮\"'`{{7*7}}</textarea>"
"""HTML, script, an attribute, a terminal's title, a turned line, quotes, a template, an end tag."""


def small_served(root: Path) -> Served:
    """Return runs `crate` and `gpt2`, and a file beside them whose line must not be seen."""
    (root / "secret.txt").write_text("the-secret\n")
    small = small_store(root / "crate")
    planted_store(root / "gpt2")
    with astore.open(small.path, "a") as store:
        said = {"seed": 0, "rank": 1, "split": "explain"}
        store.append(
            "explanations",
            [
                {
                    "hook": HOOK,
                    "unit": 1,
                    "explainer": "token_lookup",
                    "text": "cats " + NASTY,
                    **said,
                },
                {"hook": HOOK, "unit": 2, "explainer": NASTY[:60], "text": "a dog", **said},
            ],
        )
        score = {"metric": "m", "metric_version": 1, "hook": HOOK, "explainer": "token_lookup"}
        values = [(None, 1, 0.9), ("shuffled", 1, 0.2), (None, 2, 0.95), ("shuffled", 2, 0.9)]
        store.append(
            "all_scores",
            [score | {"control": c, "unit": u, "value": v, "ci_low": v} for c, u, v in values],
        )
    return Served([root / "crate", root / "gpt2"])
