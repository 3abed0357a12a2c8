-- placeholder views, replaced when the access paths are measured
CREATE OR REPLACE VIEW acts AS SELECT * FROM acts_shards;
CREATE OR REPLACE VIEW token_ids AS SELECT * FROM tokens_shards;
CREATE OR REPLACE VIEW vectors AS SELECT * FROM vectors_shards;
