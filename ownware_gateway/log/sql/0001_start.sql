-- The log as it starts: events, and beside them only what must be found quickly.

-- What identifies this log: log_id (part of every epoch), secret (keys operation hashes).
CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE threads (
    key        INTEGER PRIMARY KEY,
    id         TEXT    NOT NULL UNIQUE,
    profile_id TEXT,
    model      TEXT,
    title      TEXT    NOT NULL,
    created_at INTEGER NOT NULL,  -- milliseconds since 1970, as all times here
    updated_at INTEGER NOT NULL,
    -- Events up to here are copies (of another thread, or from a file): history that is never
    -- driven and grants nothing.
    history_to  INTEGER NOT NULL DEFAULT 0,
    forked_from TEXT
);
CREATE INDEX threads_by_parent ON threads (forked_from) WHERE forked_from IS NOT NULL;
CREATE INDEX threads_by_update ON threads (updated_at, key);
CREATE INDEX threads_by_profile ON threads (profile_id, updated_at, key);

-- A deleted thread leaves its name, so that it is never used again, and its last numbers.
CREATE TABLE tombstones (
    thread_id  TEXT PRIMARY KEY,
    heads      TEXT    NOT NULL,  -- JSON: agent id to last seq
    deleted_by TEXT    NOT NULL,
    deleted_at INTEGER NOT NULL
) WITHOUT ROWID;

-- One row per (thread, agent). `head` is the last number given out: numbers are never given twice,
-- whatever becomes of the events that had them.
CREATE TABLE streams (
    key        INTEGER PRIMARY KEY,
    thread_key INTEGER NOT NULL REFERENCES threads (key),
    agent_id   TEXT    NOT NULL,
    head       INTEGER NOT NULL DEFAULT 0,
    UNIQUE (thread_key, agent_id)
);

-- `payload` is the exact JSON of the wire, seq included, so a replay joins bytes.
CREATE TABLE events (
    stream_key INTEGER NOT NULL REFERENCES streams (key),
    seq        INTEGER NOT NULL,
    type       TEXT    NOT NULL,
    payload    BLOB    NOT NULL,
    PRIMARY KEY (stream_key, seq)
) WITHOUT ROWID;

-- Folds skip the deltas; on a long thread they are nearly everything.
CREATE INDEX facts ON events (stream_key, seq)
    WHERE type NOT IN ('text.delta', 'thinking.delta', 'tool.call.progress');

-- What a run needs to go on and nobody may see: exact provider messages, the profile it started
-- with, attachments. Belongs to the event with the same seq; never served.
CREATE TABLE private (
    stream_key INTEGER NOT NULL REFERENCES streams (key),
    seq        INTEGER NOT NULL,
    kind       TEXT    NOT NULL,
    body       BLOB    NOT NULL
);
CREATE UNIQUE INDEX private_by_event ON private (stream_key, seq, kind);

-- A run is the interval of its stream from start_seq (exclusive) to end_seq (inclusive).
-- `generation` is the fence: only the engine that holds the latest one may append.
CREATE TABLE runs (
    key                 INTEGER PRIMARY KEY,
    id                  TEXT    NOT NULL UNIQUE,
    thread_key          INTEGER NOT NULL REFERENCES threads (key),
    agent_id            TEXT    NOT NULL,
    profile_id          TEXT    NOT NULL,
    model               TEXT    NOT NULL,
    status              TEXT    NOT NULL,
    code                TEXT,
    generation          INTEGER NOT NULL DEFAULT 1,
    start_seq           INTEGER NOT NULL,
    end_seq             INTEGER,
    timeout_ms          INTEGER NOT NULL,
    active_ms           INTEGER NOT NULL DEFAULT 0,
    under_way           INTEGER NOT NULL DEFAULT 1,  -- a process drives it, or died doing so
    deaths              INTEGER NOT NULL DEFAULT 0,  -- of processes that drove it
    usage               TEXT    NOT NULL DEFAULT '{}',
    pruned              INTEGER NOT NULL DEFAULT 0,  -- 1: its deltas are gone, 2: all its events
    accepted_at         INTEGER NOT NULL,
    started_at          INTEGER,
    updated_at          INTEGER NOT NULL,
    terminal_at         INTEGER,
    cancel_requested_at INTEGER
);
CREATE UNIQUE INDEX one_run_at_a_time ON runs (thread_key, agent_id) WHERE terminal_at IS NULL;
CREATE INDEX runs_by_thread ON runs (thread_key, key);
CREATE INDEX runs_by_status ON runs (status, key);
CREATE INDEX runs_by_end ON runs (terminal_at, pruned) WHERE terminal_at IS NOT NULL;

-- Who started which run with which key; outlives the run, so a retry never starts another one.
CREATE TABLE idempotency (
    caller      TEXT    NOT NULL,
    route       TEXT    NOT NULL,
    key         TEXT    NOT NULL,
    fingerprint TEXT    NOT NULL,  -- of the request's body
    run_id      TEXT    NOT NULL,
    fallback    TEXT,              -- part of the answer that the run's row does not hold
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (caller, route, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_by_age ON idempotency (created_at);

CREATE TABLE permissions (
    key            INTEGER PRIMARY KEY,
    request_id     TEXT    NOT NULL UNIQUE,
    run_key        INTEGER NOT NULL REFERENCES runs (key),
    tool_name      TEXT    NOT NULL,
    operation_hash TEXT    NOT NULL,
    turn_index     INTEGER NOT NULL,
    requested_at   INTEGER NOT NULL,
    expires_at     INTEGER NOT NULL,
    granted        INTEGER,           -- null until it is decided
    decided_by     TEXT,
    decided_at     INTEGER
);
CREATE UNIQUE INDEX one_question_at_a_time ON permissions (run_key) WHERE granted IS NULL;
