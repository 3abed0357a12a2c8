"""Where scorers mislead: controls on planted units, and two measures on stores of trained models.

    python benchmarks/scorer_limits.py [STORE ...]

Without stores: 55 planted units at four levels, as `lmmono audit-scorer` writes them, with their
true explanations; means of `anthropic_intervals` and `detection` beside their controls,
`centre_token` among them. With stores: `feature_decorrelation` and `unit_correlation` of each hook
beside the shuffled control, and how many units leave fewer than five windows of 32 tokens silent,
or none.
"""

import sys
import tempfile
from pathlib import Path

import activation_store as astore
import lmmono as lm
from lmmono.records.record_reader import RecordReader
from lmmono.registry.scorers import find_scorer
from lmmono.scores.decorrelation import score_decorrelation
from lmmono.scores.planted_units import add_explanations, explainer_of, write_planted
from lmmono.scores.score_job import ScoreJob

MEANS = """SELECT metric, hook, control, value, ci_low, ci_high, nan_fraction FROM all_scores
    WHERE unit IS NULL AND metric IN ('anthropic_intervals', 'detection', 'detection_near_miss',
        'detection_defined', 'detection_near_miss_defined') ORDER BY ALL"""

WINDOWS = "SELECT count(DISTINCT (seq_id, pos // 32)) FROM token_ids WHERE split = 'score'"

NEVER_SILENT = """WITH firing AS (
        SELECT a.hook, a.unit, count(DISTINCT (a.seq_id, a.pos // 32)) AS n FROM acts a
        JOIN token_ids t ON t.seq_id = a.seq_id AND t.pos = a.pos AND t.split = 'score'
        WHERE a.act > 0 GROUP BY ALL)
    SELECT u.hook, count(*), count(*) FILTER (n > $n - 5), count(*) FILTER (n = $n)
    FROM unit_stats u LEFT JOIN firing USING (hook, unit) GROUP BY u.hook ORDER BY u.hook"""


def planted(seed: int = 0) -> None:
    """Print the means of two scorers of true explanations, and of their controls."""
    with (
        tempfile.TemporaryDirectory() as place,
        astore.open(Path(place) / "store", mode="w") as store,
    ):
        add_explanations(store, write_planted(store, 600, seed), seed)
        lm.score(store, scorer=["anthropic_intervals", "detection"], explainer=explainer_of("true"))
        for metric, hook, control, value, low, high, undefined in store.sql(MEANS).fetchall():
            ends = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            print(f"{metric} {hook} {control}: {value:.3f}{ends}, {undefined:.1%} not defined")


def trained(path: str) -> None:
    """Print what a store of a trained model says of the two measures."""
    with astore.open(path) as store:
        row = store.sql(WINDOWS).fetchone()
        n = row[0] if row else 0
        for hook, d, few, none in store.sql(NEVER_SILENT, n=n).fetchall():
            print(f"{path} {hook}: of {d} units {few} leave < 5 of {n} windows silent, {none} none")
            settings = find_scorer("feature_decorrelation").settings
            job = ScoreJob(store, hook, RecordReader(store), settings=settings)
            for each in score_decorrelation(job):
                ends = f"[{each['ci_low']:.4f}, {each['ci_high']:.4f}]"
                print(f"  {each['metric']} {each['control']}: {each['value']:.4f} {ends}")


def main() -> None:
    if not sys.argv[1:]:
        planted()
    for path in sys.argv[1:]:
        trained(path)


if __name__ == "__main__":
    main()
