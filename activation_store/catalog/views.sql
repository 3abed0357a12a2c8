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

CREATE OR REPLACE VIEW {at}unit_history AS
SELECT
    s.hook, s.unit, s.step, s.density, s.correlation, s.ci_low, s.ci_high, s.other_unit,
    s.step >= l.birth AS is_born, coalesce(s.step >= l.death, false) AS is_dead,
    s.n_tokens, s.n_documents
FROM {at}unit_steps s
LEFT JOIN {at}unit_lives l ON l.hook = s.hook AND l.unit = s.unit;
COMMENT ON VIEW {at}unit_history IS 'Each unit at each kept step of the training: how often it fires, how much it is its final self';

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

CREATE OR REPLACE MACRO {at}birth(of_hook, of_unit) AS TABLE
SELECT l.birth, l.birth_low, l.birth_high, l.n_documents
FROM {at}unit_lives l
WHERE {own} AND l.hook = of_hook AND l.unit = of_unit;
COMMENT ON MACRO TABLE {at}birth IS 'The first kept step at which a unit correlates above 0.5 with its final self, with its interval: one row';

CREATE OR REPLACE MACRO {at}death(of_hook, of_unit) AS TABLE
SELECT l.death, l.death_low, l.death_high, l.n_documents
FROM {at}unit_lives l
WHERE {own} AND l.hook = of_hook AND l.unit = of_unit;
COMMENT ON MACRO TABLE {at}death IS 'The first kept step from which a unit fires on no token, with its interval: one row';

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

-- a unit as it is written everywhere, HOOK:UNIT, taken apart. DuckDB works both out before it plans a
-- query, so that the hook and the unit still reach the files.
CREATE OR REPLACE MACRO {at}hook_of(named) AS
    CASE WHEN regexp_full_match(named, '.+:[0-9]{1,9}') THEN regexp_extract(named, '^(.*):[0-9]+$', 1)
    ELSE error('want HOOK:UNIT, such as blocks.1.mlp.hook_post:17, got ' || named) END;
CREATE OR REPLACE MACRO {at}index_of(named) AS
    CASE WHEN regexp_full_match(named, '.+:[0-9]{1,9}') THEN regexp_extract(named, ':([0-9]+)$', 1)
    ELSE error('want HOOK:UNIT, such as blocks.1.mlp.hook_post:17, got ' || named) END::INTEGER;

CREATE OR REPLACE MACRO {at}fires(of_hook, of_unit) AS TABLE
SELECT x.seq_id, x.pos, t.doc_id, t.split, t.token_id, {at}shown(v.token, t.token_id) AS token, x.act
FROM {at}acts x
LEFT JOIN {at}token_ids t ON t.seq_id = x.seq_id AND t.pos = x.pos
LEFT JOIN {at}vocabulary v ON v.token_id = t.token_id
WHERE {own} AND x.hook = of_hook AND x.unit = of_unit
ORDER BY x.act DESC, x.seq_id, x.pos;
COMMENT ON MACRO TABLE {at}fires IS 'Every token that a unit is stored at, strongest first';

-- BOTH and ONLY are words of SQL that no table function can have as its name without quotes
CREATE OR REPLACE MACRO {at}fires_both(a, b) AS TABLE
SELECT
    x.seq_id, x.pos, t.doc_id, t.split, t.token_id, {at}shown(v.token, t.token_id) AS token,
    x.act AS act_a, y.act AS act_b
FROM {at}acts x
JOIN {at}acts y ON y.seq_id = x.seq_id AND y.pos = x.pos
LEFT JOIN {at}token_ids t ON t.seq_id = x.seq_id AND t.pos = x.pos
LEFT JOIN {at}vocabulary v ON v.token_id = t.token_id
WHERE {own} AND x.hook = {at}hook_of(a) AND x.unit = {at}index_of(a)
    AND y.hook = {at}hook_of(b) AND y.unit = {at}index_of(b)
ORDER BY x.act::DOUBLE * y.act DESC, x.seq_id, x.pos;
COMMENT ON MACRO TABLE {at}fires_both IS 'Tokens that two units, each HOOK:UNIT, are both stored at; largest product of acts first';

CREATE OR REPLACE MACRO {at}fires_only(a, b) AS TABLE
SELECT x.seq_id, x.pos, t.doc_id, t.split, t.token_id, {at}shown(v.token, t.token_id) AS token, x.act
FROM {at}acts x
ANTI JOIN (
    SELECT y.seq_id, y.pos
    FROM {at}acts y
    WHERE y.hook = {at}hook_of(b) AND y.unit = {at}index_of(b)
) off ON off.seq_id = x.seq_id AND off.pos = x.pos
LEFT JOIN {at}token_ids t ON t.seq_id = x.seq_id AND t.pos = x.pos
LEFT JOIN {at}vocabulary v ON v.token_id = t.token_id
WHERE {own} AND x.hook = {at}hook_of(a) AND x.unit = {at}index_of(a)
ORDER BY x.act DESC, x.seq_id, x.pos;
COMMENT ON MACRO TABLE {at}fires_only IS 'Tokens that unit a is stored at and unit b is not, each HOOK:UNIT; strongest first';

CREATE OR REPLACE MACRO {at}follows(a, b, within := 5) AS TABLE
WITH pairs AS (
    -- one row per token of a, so that the rows count how often a is followed
    SELECT
        x.seq_id, x.pos, any_value(x.act) AS act_a, min(y.pos) AS pos_b, arg_min(y.act, y.pos) AS act_b
    FROM {at}acts x
    JOIN {at}acts y ON y.seq_id = x.seq_id AND y.pos > x.pos AND y.pos <= x.pos + within
    WHERE x.hook = {at}hook_of(a) AND x.unit = {at}index_of(a)
        AND y.hook = {at}hook_of(b) AND y.unit = {at}index_of(b)
    GROUP BY x.seq_id, x.pos
),
-- materialized, or DuckDB joins all tokens of a document with each other first: 10 times as long
placed AS MATERIALIZED (
    SELECT p.*, t.doc_id, t.split, t.token_id
    FROM pairs p
    JOIN {at}token_ids t ON t.seq_id = p.seq_id AND t.pos = p.pos
)
SELECT
    p.seq_id, p.pos, p.doc_id, p.split, {at}shown(v.token, p.token_id) AS token, p.act_a,
    p.pos_b - p.pos AS distance, p.pos_b, {at}shown(w.token, u.token_id) AS token_b, p.act_b
FROM placed p
JOIN {at}token_ids u ON u.seq_id = p.seq_id AND u.pos = p.pos_b
LEFT JOIN {at}vocabulary v ON v.token_id = p.token_id
LEFT JOIN {at}vocabulary w ON w.token_id = u.token_id
WHERE {own} AND u.doc_id = p.doc_id
ORDER BY p.act_a::DOUBLE * p.act_b DESC, p.seq_id, p.pos;
COMMENT ON MACRO TABLE {at}follows IS 'Tokens of unit a with the first token of unit b at most `within` tokens later in the document, each HOOK:UNIT';

-- Macros that join or group whole hooks do so by hash(hook), a number that DuckDB works out once per batch
-- of rows: by the name and the unit, a join takes 50 and a group 74 ms of processor time for 1.7 M acts, by
-- two numbers 29 and 37.

-- one pass over the acts gives the dot product with the code and the length of every other code
CREATE OR REPLACE MACRO {at}like_this(
    at_seq, at_pos, k := 10, of_hook := NULL, before := 16, after := 8
) AS TABLE
WITH code AS MATERIALIZED (
    SELECT hash(c.hook) AS hook_key, c.unit, c.act
    FROM {at}acts c
    WHERE c.seq_id = at_seq AND c.pos = at_pos AND (of_hook IS NULL OR c.hook = of_hook)
),
sums AS (
    SELECT
        x.seq_id, x.pos, sum(x.act * c.act) AS dot, sum(x.act * x.act) AS squares, count(c.act) AS n_shared
    FROM {at}acts x
    LEFT JOIN code c ON c.hook_key = hash(x.hook) AND c.unit = x.unit
    WHERE (of_hook IS NULL OR x.hook = of_hook)
    GROUP BY x.seq_id, x.pos
),
nearest AS MATERIALIZED (
    SELECT
        s.seq_id, s.pos, s.n_shared,
        s.dot / sqrt(s.squares * (SELECT sum(c.act * c.act) FROM code c)) AS cosine
    FROM sums s
    WHERE s.n_shared > 0
    ORDER BY cosine DESC, s.seq_id, s.pos
    -- the token itself goes last: a filter on its place would be asked of every act
    LIMIT k + 1
)
SELECT
    n.seq_id, n.pos, p.doc_id, n.cosine, n.n_shared,
    {at}whole_text(string_agg(
        CASE WHEN t.pos = n.pos THEN {at}marked({at}shown(v.token, t.token_id))
        ELSE {at}shown(v.token, t.token_id) END, '' ORDER BY t.pos
    )) AS excerpt
FROM (
    SELECT s.* FROM nearest s WHERE s.seq_id <> at_seq OR s.pos <> at_pos ORDER BY s.cosine DESC, s.seq_id, s.pos LIMIT k
) n
LEFT JOIN {at}token_ids p ON p.seq_id = n.seq_id AND p.pos = n.pos
LEFT JOIN {at}token_ids t
    ON t.seq_id = n.seq_id AND t.doc_id = p.doc_id AND t.pos BETWEEN n.pos - before AND n.pos + after
LEFT JOIN {at}vocabulary v ON v.token_id = t.token_id
WHERE {own}
GROUP BY ALL
ORDER BY n.cosine DESC, n.seq_id, n.pos;
COMMENT ON MACRO TABLE {at}like_this IS 'The k tokens whose stored acts have the largest cosine with those of a token; of_hook NULL takes all hooks';

-- where the tokens of a document spell a text, and which units fire there. A unit is judged as a
-- detector of the text: recall is the share of places it fires in, precision the share of its acts
-- that lie there, and the rows are ordered by their harmonic mean.
CREATE OR REPLACE MACRO {at}units_on(text, of_hook := NULL) AS TABLE
WITH begun AS MATERIALIZED (
    SELECT t.seq_id, t.pos, t.doc_id
    FROM {at}token_ids t
    JOIN {at}vocabulary v ON v.token_id = t.token_id
    WHERE trim(v.token) <> '' AND starts_with(trim(text), trim(v.token))
),
spelled AS (
    SELECT
        b.seq_id, b.pos AS first_pos, t.pos,
        trim(string_agg(v.token, '') OVER (PARTITION BY b.seq_id, b.pos ORDER BY t.pos)) AS so_far
    FROM begun b
    JOIN {at}token_ids t
        ON t.seq_id = b.seq_id AND t.doc_id = b.doc_id
        -- no token is shorter than a character
        AND t.pos BETWEEN b.pos AND b.pos + least(length(trim(text)), 64)
    JOIN {at}vocabulary v ON v.token_id = t.token_id
),
places AS MATERIALIZED (
    SELECT s.seq_id, s.first_pos, min(s.pos) AS last_pos
    FROM spelled s
    WHERE s.so_far = trim(text)
    GROUP BY s.seq_id, s.first_pos
),
spans AS MATERIALIZED (
    SELECT p.seq_id, p.first_pos, unnest(range(p.first_pos, p.last_pos + 1))::INTEGER AS pos
    FROM places p
),
counted AS (SELECT count(*) AS n_places FROM places),
firing AS (
    SELECT
        x.hook, x.unit, count(DISTINCT (s.seq_id, s.first_pos)) AS n_fired, count(*) AS n_acts,
        avg(x.act) AS mean_act, max(x.act) AS max_act
    FROM {at}acts x
    JOIN spans s ON s.seq_id = x.seq_id AND s.pos = x.pos
    WHERE (of_hook IS NULL OR x.hook = of_hook)
    GROUP BY x.hook, x.unit
)
SELECT
    f.hook, f.unit, f.n_fired, c.n_places,
    f.n_fired / c.n_places AS recall,
    f.n_acts / greatest(u.n_active, f.n_acts) AS precision,
    2 * recall * precision / (recall + precision) AS f1,
    f.mean_act, f.max_act
FROM firing f
CROSS JOIN counted c
JOIN {at}unit_stats u ON u.hook = f.hook AND u.unit = f.unit
WHERE {own}
ORDER BY f1 DESC, f.hook, f.unit;
COMMENT ON MACRO TABLE {at}units_on IS 'The units that fire where the tokens spell a text, best detector first; of_hook NULL takes all hooks';

-- The name of a store cannot be anything but letters, digits and _, so that query_table finds its
-- tables and nothing else; '' is the store itself. Pearson's correlation is over the tokens that the
-- two stores share, with 0 where no act is stored.
CREATE OR REPLACE MACRO {at}table_of(run, name) AS
    CASE WHEN run = '' THEN name ELSE regexp_replace(run, '\W', '', 'g') || '.' || name END;

CREATE OR REPLACE MACRO {at}twins(
    run_a, run_b, of_hook := NULL, of_unit := NULL, k := 1, in_hook := NULL
) AS TABLE
WITH checked AS MATERIALIZED (
    SELECT CASE
        WHEN count(*) = 0 THEN error('twins: the two stores have no token in common')
        WHEN bool_or(s.token_id <> t.token_id) THEN
            error('twins: the two stores hold other tokens at the same places; capture the same text in both')
        ELSE count(*) END AS n_tokens
    FROM query_table({at}table_of(run_a, 'token_ids')) s
    JOIN query_table({at}table_of(run_b, 'token_ids')) t ON t.seq_id = s.seq_id AND t.pos = s.pos
),
sums_a AS (
    SELECT hash(x.hook) AS hook_key, x.unit, sum(x.act::DOUBLE) AS total, sum(x.act::DOUBLE * x.act) AS squares
    FROM query_table({at}table_of(run_a, 'acts')) x
    WHERE (of_hook IS NULL OR x.hook = of_hook) AND (of_unit IS NULL OR x.unit = of_unit)
    GROUP BY hook_key, x.unit
),
sums_b AS (
    SELECT hash(y.hook) AS hook_key, y.unit, sum(y.act::DOUBLE) AS total, sum(y.act::DOUBLE * y.act) AS squares
    FROM query_table({at}table_of(run_b, 'acts')) y
    WHERE (coalesce(in_hook, of_hook) IS NULL OR y.hook = coalesce(in_hook, of_hook))
    GROUP BY hook_key, y.unit
),
dots AS (
    SELECT
        hash(x.hook) AS key_a, x.unit AS unit_a, hash(y.hook) AS key_b, y.unit AS unit_b,
        sum(x.act::DOUBLE * y.act) AS dot, count(*) AS n_both
    FROM query_table({at}table_of(run_a, 'acts')) x
    JOIN query_table({at}table_of(run_b, 'acts')) y
        ON y.seq_id = x.seq_id AND y.pos = x.pos AND hash(y.hook) = hash(coalesce(in_hook, x.hook))
    WHERE (of_hook IS NULL OR x.hook = of_hook) AND (of_unit IS NULL OR x.unit = of_unit)
        AND (coalesce(in_hook, of_hook) IS NULL OR y.hook = coalesce(in_hook, of_hook))
    GROUP BY key_a, unit_a, key_b, unit_b
)
SELECT
    g.hook AS hook_a, d.unit_a, h.hook AS hook_b, d.unit_b, d.n_both,
    (d.dot * c.n_tokens - a.total * b.total)
        / sqrt((a.squares * c.n_tokens - a.total ^ 2) * (b.squares * c.n_tokens - b.total ^ 2))
        AS correlation
FROM dots d
CROSS JOIN checked c
JOIN sums_a a ON a.hook_key = d.key_a AND a.unit = d.unit_a
JOIN sums_b b ON b.hook_key = d.key_b AND b.unit = d.unit_b
JOIN query_table({at}table_of(run_a, 'hooks')) g ON hash(g.hook) = d.key_a AND g.kind = 'rows'
JOIN query_table({at}table_of(run_b, 'hooks')) h ON hash(h.hook) = d.key_b AND h.kind = 'rows'
WHERE {own}
QUALIFY row_number() OVER (
    PARTITION BY hook_a, d.unit_a ORDER BY correlation DESC NULLS LAST, hook_b, d.unit_b
) <= k
ORDER BY hook_a, d.unit_a, correlation DESC;
COMMENT ON MACRO TABLE {at}twins IS 'The units of store run_b that correlate most with each unit of store run_a over the same tokens; name of_hook and of_unit for one unit';
