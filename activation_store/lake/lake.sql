-- What the catalogue of a lake has beyond `schema.sql`, which it follows without its CHECK clauses:
-- DuckLake has none. The views `acts`, `token_ids` and `vectors` over the listed shards are replaced
-- with every commit that lists shards, so any DuckLake client reads them.

CREATE TABLE IF NOT EXISTS publications (
    file VARCHAR NOT NULL,
    store_id VARCHAR NOT NULL,
    n_rows BIGINT NOT NULL
);
COMMENT ON TABLE publications IS 'Shards of stores that the lake has taken in, each once';
COMMENT ON COLUMN publications.file IS 'Name of the shard in the store it comes from; key';
COMMENT ON COLUMN publications.store_id IS 'Store it comes from';
COMMENT ON COLUMN publications.n_rows IS 'Rows of the shard, >= 0';

CREATE TABLE IF NOT EXISTS retired (
    file VARCHAR NOT NULL,
    retired_at TIMESTAMP NOT NULL
);
COMMENT ON TABLE retired IS 'Shards that a compaction replaced and that are still there for its readers';
COMMENT ON COLUMN retired.file IS 'Name of the shard; key';
COMMENT ON COLUMN retired.retired_at IS 'When it was replaced, UTC';
