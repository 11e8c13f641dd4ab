-- Where the last summary of a conversation is, and what each profile has spent on which day.

CREATE INDEX summaries ON private (stream_key, seq) WHERE kind = 'summary.00';

-- Grows with each answer, in its transaction. It stays when a thread is deleted: what was spent is.
CREATE TABLE spent (
    profile_id TEXT    NOT NULL,
    day        INTEGER NOT NULL,  -- of UTC, counted from 1970
    cost_usd   REAL    NOT NULL,  -- as far as prices are known
    turns      INTEGER NOT NULL,  -- answers of models
    active_ms  INTEGER NOT NULL,
    PRIMARY KEY (profile_id, day)
) WITHOUT ROWID;
