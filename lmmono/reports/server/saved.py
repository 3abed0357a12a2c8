"""Queries to begin with, in the console and where a program asks what can be asked."""

from typing import NamedTuple


class Saved(NamedTuple):
    """One query with the question that it answers."""

    question: str
    query: str


SAVED = (
    Saved("What was captured?", "FROM hooks"),
    Saved(
        "Which units fire on a word?",
        "FROM units_on('the') LIMIT 20",
    ),
    Saved(
        "Which units are the most peaked of those that fire often enough?",
        "SELECT hook, unit, density, kurtosis, max_act FROM unit_stats\n"
        "WHERE n_active >= 20 ORDER BY kurtosis DESC LIMIT 20",
    ),
    Saved(
        "Which units never fire?",
        "SELECT hook, count(*) AS dead FROM unit_stats\n"
        "WHERE n_active = 0 GROUP BY hook ORDER BY hook",
    ),
    Saved(
        "Which scores beat their best control by most?",
        "SELECT s.metric, s.hook, s.unit, any_value(s.value) AS value, max(c.value) AS control,\n"
        "    any_value(s.value) - max(c.value) AS gain\n"
        "FROM scores s JOIN all_scores c ON c.metric = s.metric AND c.hook = s.hook\n"
        "    AND c.unit = s.unit AND c.control IS NOT NULL\n"
        "GROUP BY s.metric, s.hook, s.unit ORDER BY gain DESC LIMIT 20",
    ),
    Saved(
        "What is said of units, and how well does it score?",
        "SELECT e.hook, e.unit, e.explainer, e.text, s.metric, s.value, s.ci_low\n"
        "FROM explanations e JOIN scores s USING (hook, unit, explainer)\n"
        "WHERE e.text IS NOT NULL ORDER BY s.ci_low DESC NULLS LAST LIMIT 20",
    ),
    Saved(
        "Which tokens are frequent?",
        "SELECT token, count(*) AS n FROM tokens GROUP BY token ORDER BY n DESC LIMIT 20",
    ),
)
