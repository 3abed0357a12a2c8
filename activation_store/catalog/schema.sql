-- The contract of a store's catalogue, `store.duckdb`, schema version 5.
--
-- The catalogue lists what exists; bulk data lies beside it in `store/*.parquet`. A shard that
-- `shards` does not list does not exist. Views and macros are in `views.sql`. Rows are unique by the
-- keys that `tables.py` names. Every column has a comment with its unit and range; a test holds it.

CREATE TABLE IF NOT EXISTS meta (
    key VARCHAR NOT NULL,
    value VARCHAR NOT NULL
);
COMMENT ON TABLE meta IS 'Facts about the store itself, one per row';
COMMENT ON COLUMN meta.key IS 'schema_version, store_id, created_at, created_by, and what a writer pins: model_digest, n_ctx';
COMMENT ON COLUMN meta.value IS 'The fact as text';

CREATE TABLE IF NOT EXISTS runs (
    run VARCHAR NOT NULL,
    arch VARCHAR,
    model_digest VARCHAR,
    corpus_digest VARCHAR,
    n_parameters BIGINT,
    n_layers INTEGER,
    d_model INTEGER,
    d_vocab INTEGER,
    n_ctx INTEGER,
    seed BIGINT,
    step BIGINT,
    recipe JSON,
    git_commit VARCHAR,
    versions JSON,
    created_at TIMESTAMP
);
COMMENT ON TABLE runs IS 'Where the activations come from: one row per model that was captured';
COMMENT ON COLUMN runs.run IS 'Name of the run; key';
COMMENT ON COLUMN runs.arch IS 'Architecture, such as crate or gpt2';
COMMENT ON COLUMN runs.model_digest IS 'sha256 of the weights, 64 hexadecimal digits';
COMMENT ON COLUMN runs.corpus_digest IS 'sha256 of the prepared corpus, 64 hexadecimal digits';
COMMENT ON COLUMN runs.n_parameters IS 'Parameters of the model, >= 0';
COMMENT ON COLUMN runs.n_layers IS 'Blocks of the model, >= 0';
COMMENT ON COLUMN runs.d_model IS 'Width of the residual stream, >= 1';
COMMENT ON COLUMN runs.d_vocab IS 'Token ids of the model, >= 1';
COMMENT ON COLUMN runs.n_ctx IS 'Longest sequence of the model in tokens, >= 1';
COMMENT ON COLUMN runs.seed IS 'Seed of the training run';
COMMENT ON COLUMN runs.step IS 'Optimizer steps that the model has taken, >= 0; NULL where it was trained elsewhere';
COMMENT ON COLUMN runs.recipe IS 'Resolved settings as JSON';
COMMENT ON COLUMN runs.git_commit IS 'Commit of the code, 40 hexadecimal digits';
COMMENT ON COLUMN runs.versions IS 'Package versions as a JSON object';
COMMENT ON COLUMN runs.created_at IS 'When the row was written, UTC';

CREATE TABLE IF NOT EXISTS documents (
    doc_id INTEGER NOT NULL,
    split VARCHAR,
    name VARCHAR,
    text_sha256 VARCHAR,
    n_tokens BIGINT
);
COMMENT ON TABLE documents IS 'Documents that the tokens come from';
COMMENT ON COLUMN documents.doc_id IS 'Index of the document, >= 0; key';
COMMENT ON COLUMN documents.split IS 'Part of the corpus: train, val, explain, score';
COMMENT ON COLUMN documents.name IS 'Where the text came from: file and row, title, page id';
COMMENT ON COLUMN documents.text_sha256 IS 'sha256 of the text, 64 hexadecimal digits';
COMMENT ON COLUMN documents.n_tokens IS 'Tokens of the document, end-of-text included, >= 0';

CREATE TABLE IF NOT EXISTS vocabulary (
    token_id INTEGER NOT NULL,
    token VARCHAR NOT NULL
);
COMMENT ON TABLE vocabulary IS 'Token strings';
COMMENT ON COLUMN vocabulary.token_id IS 'Token id, 0 to d_vocab - 1; key';
COMMENT ON COLUMN vocabulary.token IS 'The token as shown to people';

CREATE TABLE IF NOT EXISTS hooks (
    hook VARCHAR NOT NULL,
    kind VARCHAR NOT NULL CHECK (kind IN ('rows', 'vectors')),
    d INTEGER NOT NULL,
    units INTEGER[],
    dtype VARCHAR NOT NULL,
    threshold DOUBLE,
    max_density DOUBLE,
    top_p DOUBLE,
    top_k INTEGER,
    random_k INTEGER,
    quantile_k INTEGER,
    seed BIGINT,
    skip JSON,
    n_tokens BIGINT NOT NULL,
    n_acts BIGINT NOT NULL,
    n_nan BIGINT NOT NULL,
    n_inf BIGINT NOT NULL,
    n_overflow BIGINT NOT NULL,
    quantile_error DOUBLE
);
COMMENT ON TABLE hooks IS 'Hook points captured, with the settings that decide what was kept';
COMMENT ON COLUMN hooks.hook IS 'Name of the tensor, TransformerLens grammar; key with kind';
COMMENT ON COLUMN hooks.kind IS 'rows: sparse acts above the threshold; vectors: dense shards';
COMMENT ON COLUMN hooks.d IS 'Width of the tensor in units, >= 1';
COMMENT ON COLUMN hooks.units IS 'Units kept, each 0 to d - 1; NULL means all, an empty list that acts were dropped';
COMMENT ON COLUMN hooks.dtype IS 'Type that acts were rounded to: float16 or float32';
COMMENT ON COLUMN hooks.threshold IS 'An act is kept and counts as active where act > threshold';
COMMENT ON COLUMN hooks.max_density IS 'Share of kept acts above which the capture refuses, in (0, 1]';
COMMENT ON COLUMN hooks.top_p IS 'Share of the mass per token that is kept, in (0, 1]; NULL keeps all';
COMMENT ON COLUMN hooks.top_k IS 'Top exemplars kept per unit, one per document, >= 0';
COMMENT ON COLUMN hooks.random_k IS 'Random exemplars kept per unit, >= 0';
COMMENT ON COLUMN hooks.quantile_k IS 'Exemplars kept per unit and quantile bin, >= 0';
COMMENT ON COLUMN hooks.seed IS 'Seed of the random and quantile exemplars';
COMMENT ON COLUMN hooks.skip IS 'Tokens left out, as token_ids and first positions of a sequence; NULL for none';
COMMENT ON COLUMN hooks.n_tokens IS 'Tokens seen, without those left out, >= 0';
COMMENT ON COLUMN hooks.n_acts IS 'Acts stored (kind rows) or vectors stored (kind vectors), >= 0';
COMMENT ON COLUMN hooks.n_nan IS 'NaN activations seen, never stored, >= 0';
COMMENT ON COLUMN hooks.n_inf IS 'Infinite activations seen, never stored, >= 0';
COMMENT ON COLUMN hooks.n_overflow IS 'Finite activations beyond the range of dtype, never stored, >= 0';
COMMENT ON COLUMN hooks.quantile_error IS 'Bound on the error of the quantiles in unit_stats, relative to the value';

CREATE TABLE IF NOT EXISTS shards (
    file VARCHAR NOT NULL,
    kind VARCHAR NOT NULL CHECK (kind IN ('acts', 'tokens', 'vectors')),
    hook VARCHAR,
    n_rows BIGINT NOT NULL,
    n_bytes BIGINT NOT NULL,
    checksum VARCHAR NOT NULL,
    unit_min BIGINT,
    unit_max BIGINT,
    seq_min BIGINT,
    seq_max BIGINT
);
COMMENT ON TABLE shards IS 'Parquet files that make up the store; a file not listed here does not exist';
COMMENT ON COLUMN shards.file IS 'File name within the folder store/; key';
COMMENT ON COLUMN shards.kind IS 'acts, tokens or vectors';
COMMENT ON COLUMN shards.hook IS 'The one hook of an acts or vectors shard; NULL for tokens';
COMMENT ON COLUMN shards.n_rows IS 'Rows of the file, >= 0';
COMMENT ON COLUMN shards.n_bytes IS 'Bytes of the file, >= 1';
COMMENT ON COLUMN shards.checksum IS 'sha256 of the bytes of the file, 64 hexadecimal digits';
COMMENT ON COLUMN shards.unit_min IS 'Smallest unit in an acts shard; NULL otherwise or where empty';
COMMENT ON COLUMN shards.unit_max IS 'Largest unit in an acts shard; NULL otherwise or where empty';
COMMENT ON COLUMN shards.seq_min IS 'Smallest seq_id that the shard covers, >= 0';
COMMENT ON COLUMN shards.seq_max IS 'Largest seq_id that the shard covers, >= 0';

CREATE TABLE IF NOT EXISTS unit_stats (
    hook VARCHAR NOT NULL,
    unit INTEGER NOT NULL,
    n_tokens BIGINT NOT NULL,
    n_active BIGINT NOT NULL,
    stored_from DOUBLE,
    density DOUBLE,
    mean DOUBLE,
    variance DOUBLE,
    skewness DOUBLE,
    kurtosis DOUBLE,
    min_act DOUBLE,
    max_act DOUBLE,
    q01 DOUBLE,
    q10 DOUBLE,
    q25 DOUBLE,
    q50 DOUBLE,
    q75 DOUBLE,
    q90 DOUBLE,
    q99 DOUBLE,
    q999 DOUBLE
);
COMMENT ON TABLE unit_stats IS 'Statistics of each unit over all tokens seen, kept or not; NaN and infinite activations left out';
COMMENT ON COLUMN unit_stats.hook IS 'Hook of the unit; key with unit';
COMMENT ON COLUMN unit_stats.unit IS 'Index of the unit, 0 to d - 1';
COMMENT ON COLUMN unit_stats.n_tokens IS 'Finite activations counted, >= 0';
COMMENT ON COLUMN unit_stats.n_active IS 'Tokens with act > threshold, 0 to n_tokens';
COMMENT ON COLUMN unit_stats.stored_from IS 'Acts of at least this are stored; NULL stores all above hooks.threshold';
COMMENT ON COLUMN unit_stats.density IS 'n_active / n_tokens, 0 to 1; NULL where n_tokens is 0';
COMMENT ON COLUMN unit_stats.mean IS 'Mean activation, in units of the hook';
COMMENT ON COLUMN unit_stats.variance IS 'Population variance m2 (divisor n_tokens), >= 0';
COMMENT ON COLUMN unit_stats.skewness IS 'm3 / m2^1.5; NULL where m2 is 0';
COMMENT ON COLUMN unit_stats.kurtosis IS 'm4 / m2^2, >= 1, 3 for a normal distribution; NULL where m2 is 0';
COMMENT ON COLUMN unit_stats.min_act IS 'Smallest activation';
COMMENT ON COLUMN unit_stats.max_act IS 'Largest activation';
COMMENT ON COLUMN unit_stats.q01 IS 'Quantile 0.01 within hooks.quantile_error';
COMMENT ON COLUMN unit_stats.q10 IS 'Quantile 0.10 within hooks.quantile_error';
COMMENT ON COLUMN unit_stats.q25 IS 'Quantile 0.25 within hooks.quantile_error';
COMMENT ON COLUMN unit_stats.q50 IS 'Quantile 0.50 within hooks.quantile_error';
COMMENT ON COLUMN unit_stats.q75 IS 'Quantile 0.75 within hooks.quantile_error';
COMMENT ON COLUMN unit_stats.q90 IS 'Quantile 0.90 within hooks.quantile_error';
COMMENT ON COLUMN unit_stats.q99 IS 'Quantile 0.99 within hooks.quantile_error';
COMMENT ON COLUMN unit_stats.q999 IS 'Quantile 0.999 within hooks.quantile_error';

CREATE TABLE IF NOT EXISTS unit_steps (
    hook VARCHAR NOT NULL,
    unit INTEGER NOT NULL,
    step BIGINT NOT NULL,
    density DOUBLE,
    correlation DOUBLE,
    ci_low DOUBLE,
    ci_high DOUBLE,
    other_unit DOUBLE,
    ci_level DOUBLE,
    ci_method VARCHAR,
    n_tokens BIGINT,
    n_documents BIGINT,
    model_digest VARCHAR,
    created_at TIMESTAMP
);
COMMENT ON TABLE unit_steps IS 'Each unit at each kept step of the training beside its final self, over the same tokens; the view unit_history adds births and deaths';
COMMENT ON COLUMN unit_steps.hook IS 'Hook of the unit; key with unit, step';
COMMENT ON COLUMN unit_steps.unit IS 'Index of the unit, 0 to d - 1';
COMMENT ON COLUMN unit_steps.step IS 'Optimizer steps that the model had taken, >= 0';
COMMENT ON COLUMN unit_steps.density IS 'Share of tokens with act > hooks.threshold at this step, 0 to 1';
COMMENT ON COLUMN unit_steps.correlation IS 'Pearson correlation over tokens of the act at this step with that of the last, -1 to 1; NULL where one is constant';
COMMENT ON COLUMN unit_steps.ci_low IS 'Lower end of the interval of correlation';
COMMENT ON COLUMN unit_steps.ci_high IS 'Upper end of the interval of correlation';
COMMENT ON COLUMN unit_steps.other_unit IS 'The same correlation with the last act of the next unit: what two units have in common anyway';
COMMENT ON COLUMN unit_steps.ci_level IS 'Coverage aimed at by the interval, in (0, 1)';
COMMENT ON COLUMN unit_steps.ci_method IS 'How the interval was made and what was resampled';
COMMENT ON COLUMN unit_steps.n_tokens IS 'Tokens of all documents together, >= 0';
COMMENT ON COLUMN unit_steps.n_documents IS 'Documents, >= 0';
COMMENT ON COLUMN unit_steps.model_digest IS 'sha256 of the weights at this step, 64 hexadecimal digits';
COMMENT ON COLUMN unit_steps.created_at IS 'When the row was written, UTC';

CREATE TABLE IF NOT EXISTS unit_lives (
    hook VARCHAR NOT NULL,
    unit INTEGER NOT NULL,
    birth BIGINT,
    birth_low BIGINT,
    birth_high BIGINT,
    death BIGINT,
    death_low BIGINT,
    death_high BIGINT,
    ci_level DOUBLE,
    ci_method VARCHAR,
    n_documents BIGINT,
    created_at TIMESTAMP
);
COMMENT ON TABLE unit_lives IS 'When each unit became what it is at the end of training, and when it fell silent; macros birth and death';
COMMENT ON COLUMN unit_lives.hook IS 'Hook of the unit; key with unit';
COMMENT ON COLUMN unit_lives.unit IS 'Index of the unit, 0 to d - 1';
COMMENT ON COLUMN unit_lives.birth IS 'First kept step at which unit_steps.correlation is above 0.5; NULL where it never is';
COMMENT ON COLUMN unit_lives.birth_low IS 'Earliest end of the interval of birth, a kept step';
COMMENT ON COLUMN unit_lives.birth_high IS 'Latest end; NULL where the unit is not born in that share of draws';
COMMENT ON COLUMN unit_lives.death IS 'First kept step from which the unit is above hooks.threshold on no token to the end; NULL where it lives';
COMMENT ON COLUMN unit_lives.death_low IS 'Earliest end of the interval of death, a kept step; NULL where the unit lives in that share of draws';
COMMENT ON COLUMN unit_lives.death_high IS 'Latest end; NULL where the unit lives in that share of draws';
COMMENT ON COLUMN unit_lives.ci_level IS 'Coverage aimed at by the intervals, in (0, 1)';
COMMENT ON COLUMN unit_lives.ci_method IS 'How the intervals were made and what was resampled';
COMMENT ON COLUMN unit_lives.n_documents IS 'Documents drawn again, >= 0';
COMMENT ON COLUMN unit_lives.created_at IS 'When the row was written, UTC';

CREATE TABLE IF NOT EXISTS exemplars (
    hook VARCHAR NOT NULL,
    unit INTEGER NOT NULL,
    kind VARCHAR NOT NULL CHECK (kind IN ('top', 'random', 'quantile')),
    rank INTEGER NOT NULL,
    bin INTEGER,
    seq_id BIGINT NOT NULL,
    pos INTEGER NOT NULL,
    doc_id INTEGER NOT NULL,
    act FLOAT NOT NULL
);
COMMENT ON TABLE exemplars IS 'Token positions chosen for each unit; the macro exemplars(hook, unit, k) adds their text';
COMMENT ON COLUMN exemplars.hook IS 'Hook of the unit; key with unit, kind, rank';
COMMENT ON COLUMN exemplars.unit IS 'Index of the unit, 0 to d - 1';
COMMENT ON COLUMN exemplars.kind IS 'top: largest acts, one per document; random: uniform over all tokens; quantile: drawn within bins';
COMMENT ON COLUMN exemplars.rank IS 'Order within hook, unit and kind, 1 is first';
COMMENT ON COLUMN exemplars.bin IS 'Quantile bin, 0 is lowest; NULL unless kind is quantile';
COMMENT ON COLUMN exemplars.seq_id IS 'Sequence of the token, >= 0';
COMMENT ON COLUMN exemplars.pos IS 'Position within the sequence, 0 to n_ctx - 1';
COMMENT ON COLUMN exemplars.doc_id IS 'Document of the token, >= 0';
COMMENT ON COLUMN exemplars.act IS 'Activation of the unit there, in units of the hook';

CREATE TABLE IF NOT EXISTS dictionaries (
    hook VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    latents_hook VARCHAR,
    arch VARCHAR NOT NULL,
    d_in INTEGER NOT NULL,
    d_sae INTEGER NOT NULL,
    seed BIGINT,
    n_tokens BIGINT,
    settings JSON,
    path VARCHAR,
    digest VARCHAR,
    l0 DOUBLE,
    fvu DOUBLE,
    dead_fraction DOUBLE,
    seconds DOUBLE,
    created_at TIMESTAMP
);
COMMENT ON TABLE dictionaries IS 'Learned codes of a hook; their measures with intervals are rows of scores';
COMMENT ON COLUMN dictionaries.hook IS 'Hook whose vectors it was fitted on; key with name';
COMMENT ON COLUMN dictionaries.name IS 'Name of the dictionary';
COMMENT ON COLUMN dictionaries.latents_hook IS 'Hook under which its latents are stored; NULL where they are not';
COMMENT ON COLUMN dictionaries.arch IS 'topk, batchtopk, pca, identity, ...';
COMMENT ON COLUMN dictionaries.d_in IS 'Width of its input, >= 1';
COMMENT ON COLUMN dictionaries.d_sae IS 'Number of its latents, >= 1';
COMMENT ON COLUMN dictionaries.seed IS 'Seed of the fit';
COMMENT ON COLUMN dictionaries.n_tokens IS 'Tokens seen by the fit, repeats counted, >= 0';
COMMENT ON COLUMN dictionaries.settings IS 'Settings of the fit as JSON';
COMMENT ON COLUMN dictionaries.path IS 'Folder of the weights, relative to the store';
COMMENT ON COLUMN dictionaries.digest IS 'sha256 of the weights, 64 hexadecimal digits';
COMMENT ON COLUMN dictionaries.l0 IS 'Mean active latents per token, 0 to d_sae';
COMMENT ON COLUMN dictionaries.fvu IS 'Fraction of variance unexplained over the whole set, >= 0';
COMMENT ON COLUMN dictionaries.dead_fraction IS 'Share of latents that never fired, 0 to 1';
COMMENT ON COLUMN dictionaries.seconds IS 'Wall time of the fit in seconds, >= 0';
COMMENT ON COLUMN dictionaries.created_at IS 'When the row was written, UTC';

CREATE TABLE IF NOT EXISTS promotes (
    hook VARCHAR NOT NULL,
    unit INTEGER NOT NULL,
    sign VARCHAR NOT NULL CHECK (sign IN ('up', 'down')),
    rank INTEGER NOT NULL,
    token_id INTEGER NOT NULL,
    logit DOUBLE NOT NULL,
    control DOUBLE
);
COMMENT ON TABLE promotes IS 'Tokens that a unit makes likelier or less likely: its direction read through the last norm and the unembedding';
COMMENT ON COLUMN promotes.hook IS 'Hook of the unit; key with unit, sign, rank';
COMMENT ON COLUMN promotes.unit IS 'Index of the unit, 0 to d - 1';
COMMENT ON COLUMN promotes.sign IS 'up: the tokens promoted most; down: those suppressed most';
COMMENT ON COLUMN promotes.rank IS 'Order within hook, unit and sign, 1 is strongest';
COMMENT ON COLUMN promotes.token_id IS 'Token id, 0 to d_vocab - 1';
COMMENT ON COLUMN promotes.logit IS 'Change of the logit, less the mean over the vocabulary, for a stream that is the direction scaled to a root mean square of 1';
COMMENT ON COLUMN promotes.control IS 'The same at the same rank of a random direction, the median over those drawn; NULL where none was';

CREATE TABLE IF NOT EXISTS neighbours (
    hook VARCHAR NOT NULL,
    unit INTEGER NOT NULL,
    kind VARCHAR NOT NULL CHECK (kind IN ('coactivation', 'weights')),
    rank INTEGER NOT NULL,
    neighbour INTEGER NOT NULL,
    cosine DOUBLE NOT NULL,
    control DOUBLE
);
COMMENT ON TABLE neighbours IS 'The units of a hook that are most like a unit: by what they fire on, and by what they write';
COMMENT ON COLUMN neighbours.hook IS 'Hook of both units; key with unit, kind, rank';
COMMENT ON COLUMN neighbours.unit IS 'Index of the unit, 0 to d - 1';
COMMENT ON COLUMN neighbours.kind IS 'coactivation: activations on the same tokens; weights: directions in the stream';
COMMENT ON COLUMN neighbours.rank IS 'Order within hook, unit and kind, 1 is nearest';
COMMENT ON COLUMN neighbours.neighbour IS 'Index of the other unit, 0 to d - 1';
COMMENT ON COLUMN neighbours.cosine IS 'Cosine of the two, -1 to 1; activations are taken as they are, on a sample of tokens';
COMMENT ON COLUMN neighbours.control IS 'coactivation: the cosine of two such units if they were independent; weights: the median, over random mixtures of the units, of the cosine at the same rank; NULL where none was drawn';

CREATE TABLE IF NOT EXISTS explanations (
    hook VARCHAR NOT NULL,
    unit INTEGER NOT NULL,
    explainer VARCHAR NOT NULL,
    seed BIGINT,
    rank INTEGER,
    text VARCHAR,
    program JSON,
    failure VARCHAR,
    reason VARCHAR,
    split VARCHAR,
    n_records INTEGER,
    n_tokens BIGINT,
    complexity DOUBLE,
    model VARCHAR,
    prompt_hash VARCHAR,
    n_calls INTEGER,
    n_prompt_tokens BIGINT,
    n_completion_tokens BIGINT,
    cost_usd DOUBLE,
    seconds DOUBLE,
    created_at TIMESTAMP
);
COMMENT ON TABLE explanations IS 'What an explainer says a unit means; a failure is a row without text';
COMMENT ON COLUMN explanations.hook IS 'Hook of the unit; key with unit, explainer, seed, rank, prompt_hash';
COMMENT ON COLUMN explanations.unit IS 'Index of the unit, 0 to d - 1';
COMMENT ON COLUMN explanations.explainer IS 'Name of the explainer, such as token_lookup';
COMMENT ON COLUMN explanations.seed IS 'Seed of the explainer; NULL where it has none';
COMMENT ON COLUMN explanations.rank IS 'Order among the candidates of one explainer, 1 is best; NULL for one';
COMMENT ON COLUMN explanations.text IS 'The explanation for people; NULL where it failed';
COMMENT ON COLUMN explanations.program IS 'What simulates the unit, as JSON; NULL where there is none';
COMMENT ON COLUMN explanations.failure IS 'Type of the failure; NULL where it worked';
COMMENT ON COLUMN explanations.reason IS 'What went wrong, in words; NULL where failure says all';
COMMENT ON COLUMN explanations.split IS 'Split that the excerpts shown came from';
COMMENT ON COLUMN explanations.n_records IS 'Activation records shown, >= 0';
COMMENT ON COLUMN explanations.n_tokens IS 'Tokens that the split held when it was made, >= 0; the store may hold more by now';
COMMENT ON COLUMN explanations.complexity IS 'Size of the program in terms, >= 0';
COMMENT ON COLUMN explanations.model IS 'Language model that wrote it; NULL without one';
COMMENT ON COLUMN explanations.prompt_hash IS 'sha256 of the prompt; NULL without one';
COMMENT ON COLUMN explanations.n_calls IS 'Calls to the language model, >= 0';
COMMENT ON COLUMN explanations.n_prompt_tokens IS 'Tokens sent, >= 0';
COMMENT ON COLUMN explanations.n_completion_tokens IS 'Tokens received, >= 0';
COMMENT ON COLUMN explanations.cost_usd IS 'Money spent in US dollars, >= 0; NULL where no price is known';
COMMENT ON COLUMN explanations.seconds IS 'Wall time in seconds, >= 0';
COMMENT ON COLUMN explanations.created_at IS 'When the row was written, UTC';

CREATE TABLE IF NOT EXISTS all_scores (
    metric VARCHAR NOT NULL,
    metric_version INTEGER NOT NULL,
    preset VARCHAR,
    control VARCHAR,
    hook VARCHAR,
    unit INTEGER,
    dictionary VARCHAR,
    value DOUBLE,
    ci_low DOUBLE,
    ci_high DOUBLE,
    ci_level DOUBLE,
    ci_method VARCHAR,
    n BIGINT,
    n_records BIGINT,
    n_documents BIGINT,
    n_tokens BIGINT,
    seed BIGINT,
    split VARCHAR,
    explainer VARCHAR,
    judge VARCHAR,
    prompt_hash VARCHAR,
    n_failures BIGINT,
    failure VARCHAR,
    reason VARCHAR,
    nan_fraction DOUBLE,
    is_below BOOLEAN,
    n_calls BIGINT,
    n_prompt_tokens BIGINT,
    n_completion_tokens BIGINT,
    cost_usd DOUBLE,
    seconds DOUBLE,
    details JSON,
    created_at TIMESTAMP
);
COMMENT ON TABLE all_scores IS 'Scores, their controls and their means, each with its interval and its origin; the views scores and hook_scores hold no controls';
COMMENT ON COLUMN all_scores.metric IS 'Name of the formula; key with metric_version, preset, control, hook, unit, dictionary, seed, split, explainer, judge, prompt_hash';
COMMENT ON COLUMN all_scores.metric_version IS 'Version of the formula, >= 1';
COMMENT ON COLUMN all_scores.preset IS 'Named settings of the metric; NULL for its defaults';
COMMENT ON COLUMN all_scores.control IS 'Kind of control, such as random_explanation; NULL for the score itself';
COMMENT ON COLUMN all_scores.hook IS 'Hook, or blocks.*. ... for the mean over the hooks of all blocks; NULL for the whole model';
COMMENT ON COLUMN all_scores.unit IS 'Index of the unit, 0 to d - 1; NULL for a hook, a dictionary or the model';
COMMENT ON COLUMN all_scores.dictionary IS 'Name of the dictionary; NULL where none';
COMMENT ON COLUMN all_scores.value IS 'The score on the scale of the metric; of a unit that has none chance (see lmmono ls scorers), with nan_fraction 1; NULL where it failed';
COMMENT ON COLUMN all_scores.ci_low IS 'Lower end of the interval, on the scale of value';
COMMENT ON COLUMN all_scores.ci_high IS 'Upper end of the interval, on the scale of value';
COMMENT ON COLUMN all_scores.ci_level IS 'Coverage aimed at by the interval, in (0, 1)';
COMMENT ON COLUMN all_scores.ci_method IS 'How the interval was made and what was resampled';
COMMENT ON COLUMN all_scores.n IS 'Items that the value averages over, >= 0';
COMMENT ON COLUMN all_scores.n_records IS 'Activation records used, >= 0';
COMMENT ON COLUMN all_scores.n_documents IS 'Documents used, >= 0';
COMMENT ON COLUMN all_scores.n_tokens IS 'Tokens used, >= 0';
COMMENT ON COLUMN all_scores.seed IS 'Seed of the scorer; NULL where it has none';
COMMENT ON COLUMN all_scores.split IS 'Split of the documents used';
COMMENT ON COLUMN all_scores.explainer IS 'Explainer whose explanation was scored; NULL without one';
COMMENT ON COLUMN all_scores.judge IS 'Model or program that judged; NULL without one';
COMMENT ON COLUMN all_scores.prompt_hash IS 'sha256 of the prompt; NULL without one';
COMMENT ON COLUMN all_scores.n_failures IS 'Items that failed and are not in the value, >= 0';
COMMENT ON COLUMN all_scores.failure IS 'Type of the failure where there is no value';
COMMENT ON COLUMN all_scores.reason IS 'What went wrong, in words; NULL where failure says all';
COMMENT ON COLUMN all_scores.nan_fraction IS 'Share of items whose score is not defined, 0 to 1; units and their means count them as chance, measures of dictionaries leave them out';
COMMENT ON COLUMN all_scores.is_below IS 'Whether the unit fires, but more rarely than the least density at which the metric ranks true explanations first (lmmono ls scorers); means leave it out; NULL where that was never measured';
COMMENT ON COLUMN all_scores.n_calls IS 'Calls to the judge, >= 0';
COMMENT ON COLUMN all_scores.n_prompt_tokens IS 'Tokens sent, >= 0';
COMMENT ON COLUMN all_scores.n_completion_tokens IS 'Tokens received, >= 0';
COMMENT ON COLUMN all_scores.cost_usd IS 'Money spent in US dollars, >= 0';
COMMENT ON COLUMN all_scores.seconds IS 'Wall time in seconds, >= 0';
COMMENT ON COLUMN all_scores.details IS 'Further facts of the metric as a JSON object';
COMMENT ON COLUMN all_scores.created_at IS 'When the row was written, UTC';

CREATE TABLE IF NOT EXISTS robustness (
    suite VARCHAR NOT NULL,
    task VARCHAR NOT NULL,
    feature VARCHAR NOT NULL,
    corruption VARCHAR,
    level DOUBLE,
    probe VARCHAR,
    n_shots INTEGER,
    metric VARCHAR NOT NULL,
    metric_version INTEGER NOT NULL,
    seed BIGINT,
    split VARCHAR,
    value DOUBLE,
    ci_low DOUBLE,
    ci_high DOUBLE,
    ci_level DOUBLE,
    ci_method VARCHAR,
    n BIGINT,
    failure VARCHAR,
    settings JSON,
    seconds DOUBLE,
    created_at TIMESTAMP
);
COMMENT ON TABLE robustness IS 'How well a code serves a task when labels, inputs, shots or domain get worse';
COMMENT ON COLUMN robustness.suite IS 'noisy_labels, noisy_inputs, few_shot, ...; key with task, feature, corruption, level, probe, n_shots, metric, metric_version, seed, split';
COMMENT ON COLUMN robustness.task IS 'Name of the task';
COMMENT ON COLUMN robustness.feature IS 'Feature family: the code that the probe reads';
COMMENT ON COLUMN robustness.corruption IS 'Kind of corruption; NULL for none';
COMMENT ON COLUMN robustness.level IS 'Strength of the corruption, 0 is clean';
COMMENT ON COLUMN robustness.probe IS 'Kind of probe';
COMMENT ON COLUMN robustness.n_shots IS 'Labelled examples per class, >= 1; NULL for all';
COMMENT ON COLUMN robustness.metric IS 'Name of the formula';
COMMENT ON COLUMN robustness.metric_version IS 'Version of the formula, >= 1';
COMMENT ON COLUMN robustness.seed IS 'Seed of the repetition; NULL for the summary over seeds';
COMMENT ON COLUMN robustness.split IS 'Split that the value was measured on';
COMMENT ON COLUMN robustness.value IS 'The result on the scale of the metric; NULL where it failed';
COMMENT ON COLUMN robustness.ci_low IS 'Lower end of the interval, on the scale of value';
COMMENT ON COLUMN robustness.ci_high IS 'Upper end of the interval, on the scale of value';
COMMENT ON COLUMN robustness.ci_level IS 'Coverage aimed at by the interval, in (0, 1)';
COMMENT ON COLUMN robustness.ci_method IS 'How the interval was made and what was resampled';
COMMENT ON COLUMN robustness.n IS 'Items that the value averages over, >= 0';
COMMENT ON COLUMN robustness.failure IS 'Type of the failure where there is no value';
COMMENT ON COLUMN robustness.settings IS 'Further settings as a JSON object';
COMMENT ON COLUMN robustness.seconds IS 'Wall time in seconds, >= 0';
COMMENT ON COLUMN robustness.created_at IS 'When the row was written, UTC';

CREATE TABLE IF NOT EXISTS writer_state (
    key VARCHAR NOT NULL,
    value BLOB NOT NULL
);
COMMENT ON TABLE writer_state IS 'What a writer needs to go on exactly where the last commit ended';
COMMENT ON COLUMN writer_state.key IS 'Name of the accumulator; key';
COMMENT ON COLUMN writer_state.value IS 'Its bytes, in a form private to the writer, or as JSON the file in the folder of shards that holds them, with n_bytes and checksum';
