-- Views and macros over `acts`, `token_ids` and `vectors`, which `views.py` makes from the shards.
-- A macro looks names up where it is called, not where it was made, so it could answer with the rows of
-- another store. Where a store is open, the mark `at` is the name of its catalogue with a dot. In the
-- catalogue file, whose name when it is attached nobody knows, it is empty, and the mark `own` raises
-- an error unless the tables found are those of this store. Parameters have names of their own (of_hook)
-- because DuckDB refuses one that is also a column.

-- A mean over rows of a metric must not take in its controls, nor means beside the units that they are of:
-- so neither is in `scores`, and a query that asks there for a control fails instead of finding nothing.
CREATE OR REPLACE VIEW {at}scores AS
SELECT * EXCLUDE (control)
FROM {at}all_scores
WHERE control IS NULL AND (unit IS NOT NULL OR dictionary IS NOT NULL);
COMMENT ON VIEW {at}scores IS 'Scores of units and of dictionaries, without controls and means; all_scores has those too';

CREATE OR REPLACE VIEW {at}hook_scores AS
SELECT * EXCLUDE (control, unit, dictionary)
FROM {at}all_scores
WHERE control IS NULL AND unit IS NULL AND dictionary IS NULL;
COMMENT ON VIEW {at}hook_scores IS 'Means of hooks, and of all blocks (hook blocks.*. ...), over their units, and what only hooks have; without controls';

CREATE OR REPLACE VIEW {at}tokens AS
SELECT t.seq_id, t.pos, t.doc_id, t.split, t.token_id, v.token
FROM {at}token_ids t
LEFT JOIN {at}vocabulary v ON v.token_id = t.token_id;
COMMENT ON VIEW {at}tokens IS 'Tokens in order, with their document, split and string';

CREATE OR REPLACE VIEW {at}activations AS
SELECT a.hook, a.unit, a.seq_id, a.pos, t.doc_id, t.split, t.token_id, v.token, a.act
FROM {at}acts a
LEFT JOIN {at}token_ids t ON t.seq_id = a.seq_id AND t.pos = a.pos
LEFT JOIN {at}vocabulary v ON v.token_id = t.token_id;
COMMENT ON VIEW {at}activations IS 'Stored acts with their tokens; act > hooks.threshold';

CREATE OR REPLACE VIEW {at}vector_shards AS
SELECT s.file, s.hook, s.n_rows, s.n_bytes, s.checksum, s.seq_min, s.seq_max
FROM {at}shards s
WHERE s.kind = 'vectors';
COMMENT ON VIEW {at}vector_shards IS 'Parquet files of the dense vectors';

-- a text whose bytes are joined to characters, where a character is of several tokens: bytes of UTF-8
-- that a vocabulary shows as <0xE5>. The marks of the peak, which can stand within the bytes of its
-- character, are moved around it. `read/characters.py` does the same for lists of tokens.
CREATE OR REPLACE MACRO {at}whole_text(text) AS
CASE WHEN NOT contains(text, '<0x') THEN text ELSE array_to_string(list_transform(
    regexp_extract_all(text, '<0x[0-7C-F][0-9A-F]>(?:[«»]*<0x[89AB][0-9A-F]>)*|[^<]+|<'),
    lambda part: CASE WHEN starts_with(part, '<0x') THEN coalesce(
        regexp_extract(part, '«')
        || TRY(decode(unhex(regexp_replace(part, '<0x|>|«|»', '', 'g'))))
        || regexp_extract(part, '»'),
        part
    ) ELSE part END
), '') END;

-- the peak's token within « »; spaces before it stay before them
CREATE OR REPLACE MACRO {at}marked(token) AS
    CASE WHEN trim(token) = '' THEN '«' || token || '»'
    ELSE repeat(' ', length(token) - length(ltrim(token))) || '«' || ltrim(token) || '»' END;

-- the token to show: its string, or its id in brackets where the vocabulary is not known
CREATE OR REPLACE MACRO {at}shown(token, token_id) AS coalesce(token, '[' || token_id || ']');

CREATE OR REPLACE MACRO {at}excerpt(at_seq, at_pos, before := 16, after := 8) AS TABLE
WITH peak AS MATERIALIZED (
    SELECT p.seq_id, p.pos, p.doc_id FROM {at}token_ids p WHERE p.seq_id = at_seq AND p.pos = at_pos
),
near AS MATERIALIZED (
    SELECT p.seq_id, p.pos AS peak, p.doc_id, t.pos, t.token_id
    FROM {at}token_ids t, peak p
    WHERE t.seq_id = at_seq AND t.pos BETWEEN at_pos - before AND at_pos + after
        AND t.doc_id = p.doc_id
),
named AS (
    SELECT n.*, {at}shown(v.token, n.token_id) AS token
    FROM near n
    LEFT JOIN {at}vocabulary v ON v.token_id = n.token_id
)
SELECT
    n.seq_id, n.peak AS pos, n.doc_id, min(n.pos) AS first_pos,
    {at}whole_text(string_agg(
        CASE WHEN n.pos = n.peak THEN {at}marked(n.token) ELSE n.token END, '' ORDER BY n.pos
    )) AS text,
    list(n.token ORDER BY n.pos) AS tokens
FROM named n
WHERE {own}
GROUP BY ALL;
COMMENT ON MACRO TABLE {at}excerpt IS 'The tokens around a position, within its document: one row';

-- a row per token of the windows around exemplars, within their documents: the one text that every
-- reader of exemplars goes through. The exemplar's own token has at_pos = pos; at_pos is NULL where the
-- tokens are lost; of_kind NULL gives all kinds. Strings are looked up last, for the few tokens that
-- are shown: 5.9 ms instead of 7.8 ms of processor time for 20 exemplars of 100 M acts.
CREATE OR REPLACE MACRO {at}exemplar_tokens(
    of_hook, first_unit, last_unit, of_kind, k, before, after
) AS TABLE
WITH chosen AS MATERIALIZED (
    SELECT e.unit, e.kind, e.rank, e.act, e.bin, e.doc_id, e.seq_id, e.pos
    FROM {at}exemplars e
    WHERE {own} AND e.hook = of_hook AND e.unit BETWEEN first_unit AND last_unit
        AND e.rank <= k AND (of_kind IS NULL OR e.kind = of_kind)
),
near AS MATERIALIZED (
    SELECT c.*, t.pos AS at_pos, t.token_id
    FROM chosen c
    LEFT JOIN {at}token_ids t
        ON t.seq_id = c.seq_id AND t.doc_id = c.doc_id
        AND t.pos BETWEEN c.pos - before AND c.pos + after
)
SELECT
    n.unit, n.kind, n.rank, n.act, n.bin, n.doc_id, n.seq_id, n.pos, n.at_pos,
    {at}shown(v.token, n.token_id) AS token
FROM near n
LEFT JOIN {at}vocabulary v ON v.token_id = n.token_id;
COMMENT ON MACRO TABLE {at}exemplar_tokens IS 'The tokens around exemplars of units, a row each; at_pos = pos is the exemplar';

CREATE OR REPLACE MACRO {at}exemplars(
    of_hook, of_unit, k := 8, of_kind := 'top', before := 16, after := 8
) AS TABLE
SELECT
    n.rank, n.act, n.bin, n.doc_id, n.seq_id, n.pos,
    any_value(n.token) FILTER (n.at_pos = n.pos) AS token,
    {at}whole_text(string_agg(
        CASE WHEN n.at_pos = n.pos THEN {at}marked(n.token) ELSE n.token END, '' ORDER BY n.at_pos
    )) AS excerpt
FROM {at}exemplar_tokens(of_hook, of_unit, of_unit, of_kind, k, before, after) n
WHERE {own}
GROUP BY ALL
ORDER BY n.rank;
COMMENT ON MACRO TABLE {at}exemplars IS 'The exemplars of a unit with their text, best first; of_kind is top, random or quantile';

CREATE OR REPLACE MACRO {at}unit(of_hook, of_unit) AS TABLE
SELECT s.*, h.threshold, h.dtype, h.quantile_error
FROM {at}unit_stats s
LEFT JOIN {at}hooks h ON h.hook = s.hook AND h.kind = 'rows'
WHERE {own} AND s.hook = of_hook AND s.unit = of_unit;
COMMENT ON MACRO TABLE {at}unit IS 'The statistics of a unit and the settings they depend on: one row';

CREATE OR REPLACE MACRO {at}coactivation(of_hook, a, b) AS TABLE
WITH stored AS (
    -- a reader per unit: of `unit IN (a, b)` only the smallest and largest reach the row groups
    SELECT x.seq_id, x.pos, x.act AS act_a, NULL::FLOAT AS act_b
    FROM {at}acts x
    WHERE x.hook = of_hook AND x.unit = a
    UNION ALL
    SELECT y.seq_id, y.pos, NULL::FLOAT AS act_a, y.act AS act_b
    FROM {at}acts y
    WHERE y.hook = of_hook AND y.unit = b
),
pairs AS (SELECT max(act_a) AS act_a, max(act_b) AS act_b FROM stored GROUP BY seq_id, pos),
sums AS (
    SELECT
        count(act_a) AS n_a, count(act_b) AS n_b,
        count(*) FILTER (act_a IS NOT NULL AND act_b IS NOT NULL) AS n_both,
        sum(act_a::DOUBLE * act_b) AS dot,
        sqrt(sum(act_a::DOUBLE ^ 2)) * sqrt(sum(act_b::DOUBLE ^ 2)) AS norms
    FROM pairs
)
SELECT
    h.n_tokens, s.n_a, s.n_b, s.n_both,
    s.n_a::DOUBLE * s.n_b / h.n_tokens AS expected_both,
    s.n_both * h.n_tokens / (s.n_a::DOUBLE * s.n_b) AS lift,
    s.n_both / (s.n_a + s.n_b - s.n_both) AS jaccard,
    coalesce(s.dot, 0) / s.norms AS cosine
FROM sums s, {at}hooks h
WHERE {own} AND h.hook = of_hook AND h.kind = 'rows';
COMMENT ON MACRO TABLE {at}coactivation IS 'How often two units of a hook are stored at the same token, against chance: one row';

CREATE OR REPLACE MACRO {at}token_profile(of_hook, of_unit) AS TABLE
WITH counts AS (
    SELECT t.token_id, count(*) AS n_tokens FROM {at}token_ids t GROUP BY t.token_id
),
firing AS (
    SELECT t.token_id, count(*) AS n_acts, avg(x.act) AS mean_act, max(x.act) AS max_act
    FROM {at}acts x
    JOIN {at}token_ids t ON t.seq_id = x.seq_id AND t.pos = x.pos
    WHERE x.hook = of_hook AND x.unit = of_unit
    GROUP BY t.token_id
)
SELECT
    f.token_id, v.token, f.n_acts, c.n_tokens, f.n_acts / c.n_tokens AS density,
    f.mean_act, f.max_act
FROM firing f
JOIN counts c ON c.token_id = f.token_id
LEFT JOIN {at}vocabulary v ON v.token_id = f.token_id
WHERE {own}
ORDER BY f.mean_act DESC, f.token_id;
COMMENT ON MACRO TABLE {at}token_profile IS 'The tokens that a unit is stored at: how often, of how many, how strongly; strongest first';
