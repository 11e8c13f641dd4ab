-- Every statement of the log, by name.

-- stream --
SELECT streams.key, streams.head
FROM streams JOIN threads ON threads.key = streams.thread_key
WHERE threads.id = ? AND streams.agent_id = ?;

-- head --
SELECT streams.head,
       (SELECT CASE type WHEN 'stream.gap'
                    THEN json_extract(CAST(payload AS TEXT), '$.fromSeq') ELSE seq END
        FROM events WHERE stream_key = streams.key ORDER BY seq LIMIT 1)
FROM streams JOIN threads ON threads.key = streams.thread_key
WHERE threads.id = ? AND streams.agent_id = ?;

-- thread_exists --
SELECT 1 FROM threads WHERE id = ?;

-- add_thread --
INSERT INTO threads (id, profile_id, model, title, created_at, updated_at)
VALUES (:id, :profile_id, :model, :title, :now, :now)
ON CONFLICT (id) DO UPDATE SET
    profile_id = excluded.profile_id,
    model = excluded.model,
    title = CASE WHEN threads.title = '' THEN excluded.title ELSE threads.title END,
    updated_at = excluded.updated_at;

-- open_thread --
-- How a new thread begins: with events that are history already, and out of sight perhaps.
UPDATE threads SET history_to = :history_to, hidden = :hidden WHERE id = :id;

-- add_stream --
INSERT INTO streams (thread_key, agent_id)
SELECT key, ? FROM threads WHERE id = ?
ON CONFLICT DO NOTHING;

-- add_event --
INSERT INTO events (stream_key, seq, type, payload) VALUES (?, ?, ?, ?);

-- add_private --
INSERT INTO private (stream_key, seq, kind, body) VALUES (?, ?, ?, ?);

-- move_head --
UPDATE streams SET head = ? WHERE key = ?;

-- add_run --
INSERT INTO runs (id, thread_key, agent_id, profile_id, model, status, start_seq, timeout_ms,
                  accepted_at, updated_at, parent_key, name)
SELECT :id, key, :agent_id, :profile_id, :model, 'accepted', :start_seq, :timeout_ms, :now, :now,
       (SELECT key FROM runs WHERE id = :parent_run_id), :agent_name
FROM threads WHERE id = :thread_id;

-- fence --
SELECT runs.generation, runs.terminal_at IS NOT NULL, streams.key, streams.head
FROM runs
JOIN streams ON streams.thread_key = runs.thread_key AND streams.agent_id = runs.agent_id
WHERE runs.id = ?;

-- take_over --
UPDATE runs SET generation = generation + 1, under_way = 1 WHERE id = ? AND terminal_at IS NULL;

-- park --
-- The run rests, if nothing has happened that whoever drives it has not seen.
UPDATE runs SET rests_on = :rests_on, under_way = 0
WHERE id = :run_id AND (cancel_requested_at IS NOT NULL) = :cancelled
  AND (SELECT count(*) FROM runs AS child
       WHERE child.parent_key = runs.key AND child.terminal_at IS NULL) = :agents
  AND (:rests_on <> 'line'
       OR EXISTS (SELECT 1 FROM runs AS other INDEXED BY one_run_at_a_time
                  JOIN permissions ON permissions.run_key = other.key
                  WHERE other.thread_key = runs.thread_key AND other.terminal_at IS NULL
                    AND permissions.granted IS NULL))
  AND (:rests_on <> 'person'
       OR EXISTS (SELECT 1 FROM permissions WHERE run_key = runs.key AND granted IS NULL));

-- parent_goes_on --
UPDATE runs SET rests_on = NULL, under_way = 1
WHERE key = (SELECT parent_key FROM runs WHERE id = :run_id) AND terminal_at IS NULL;

-- line_moves --
UPDATE runs INDEXED BY one_run_at_a_time SET rests_on = NULL, under_way = 1
WHERE thread_key = (SELECT thread_key FROM runs WHERE id = :run_id)
  AND terminal_at IS NULL AND rests_on = 'line';

-- ready --
SELECT id FROM runs INDEXED BY one_run_at_a_time
WHERE thread_key = (SELECT key FROM threads WHERE id = ?)
  AND terminal_at IS NULL AND rests_on IS NULL ORDER BY key;

-- asked_in_thread --
-- The question that is open in the thread of a run, whichever of its agents asks.
SELECT permissions.request_id
FROM runs INDEXED BY one_run_at_a_time JOIN permissions ON permissions.run_key = runs.key
WHERE runs.thread_key = (SELECT thread_key FROM runs WHERE id = ?)
  AND runs.terminal_at IS NULL AND permissions.granted IS NULL LIMIT 1;

-- agents_above --
WITH RECURSIVE above (key, depth) AS (
    SELECT parent_key, 1 FROM runs WHERE id = ?
    UNION ALL
    SELECT runs.parent_key, depth + 1 FROM runs JOIN above ON runs.key = above.key
)
SELECT runs.id, threads.id, runs.agent_id
FROM above JOIN runs ON runs.key = above.key JOIN threads ON threads.key = runs.thread_key
ORDER BY depth;

-- agents_below --
WITH RECURSIVE below (key) AS (
    SELECT key FROM runs WHERE id = ?
    UNION ALL
    SELECT runs.key FROM runs JOIN below ON runs.parent_key = below.key
)
SELECT count(*) - 1 FROM below;

-- stream_of_agent --
INSERT INTO streams (thread_key, agent_id)
SELECT thread_key, :agent_id FROM runs WHERE id = :run_id
ON CONFLICT DO NOTHING;

-- agent_waits --
UPDATE runs SET status = 'waiting', updated_at = :now WHERE id = :run_id AND status = 'running';

-- agent_goes_on --
UPDATE runs SET status = 'running', updated_at = :now WHERE id = :run_id AND status = 'waiting';

-- charge --
UPDATE runs SET deaths = deaths + 1 WHERE terminal_at IS NULL AND under_way;

-- rest --
UPDATE runs SET under_way = 0 WHERE terminal_at IS NULL;

-- kept_start --
SELECT fingerprint, run_id, fallback FROM idempotency WHERE caller = ? AND route = ? AND key = ?;

-- keep_start --
INSERT INTO idempotency (caller, route, key, fingerprint, run_id, fallback, created_at)
VALUES (?, ?, ?, ?, ?, ?, ?);

-- forget_starts --
-- Some at a time: after a long rest there may be very many, and a start waits for it.
DELETE FROM idempotency WHERE (caller, route, key) IN
    (SELECT caller, route, key FROM idempotency WHERE created_at < ? ORDER BY created_at LIMIT 100);

-- tombstone --
SELECT thread_id, deleted_by, deleted_at FROM tombstones WHERE thread_id = ?;

-- rename --
UPDATE threads SET title = ?, updated_at = ? WHERE id = ?;

-- run_active_ms --
UPDATE runs SET active_ms = ? WHERE id = ?;

-- run_starts --
UPDATE runs SET status = 'running', started_at = :now, updated_at = :now
WHERE id = :run_id AND status = 'accepted';

-- run_usage --
UPDATE runs SET usage = :usage, updated_at = :now WHERE id = :run_id;

-- run_waits --
UPDATE runs SET status = 'waiting', under_way = 0, rests_on = 'person', updated_at = :now
WHERE id = :run_id AND status = 'running';

-- run_goes_on --
UPDATE runs SET status = 'running', under_way = 1, rests_on = NULL, updated_at = :now
WHERE id = :run_id AND status = 'waiting';

-- run_cancel --
UPDATE runs SET status = 'cancel_requested', cancel_requested_at = :now, updated_at = :now,
                rests_on = NULL
WHERE id = :run_id;

-- run_ends --
UPDATE runs SET status = :status, code = :code, end_seq = :seq, usage = :usage,
                terminal_at = :now, updated_at = :now
WHERE id = :run_id;

-- touch_thread --
UPDATE threads SET updated_at = :now
WHERE key = (SELECT thread_key FROM runs WHERE id = :run_id);

-- ask --
INSERT INTO permissions (request_id, run_key, tool_name, operation_hash, turn_index, requested_at,
                         expires_at, question)
SELECT :request_id, key, :tool_name, :operation_hash, :turn_index, :now, :expires_at, :question
FROM runs WHERE id = :run_id;

-- decide --
-- What was asked stands in its event from then on, which is removed with the run's others.
UPDATE permissions SET granted = :granted, decided_by = :decided_by, decided_at = :now,
                       question = CASE WHEN question LIKE '{"calls":%' THEN '{"calls": []}'
                                       WHEN question IS NOT NULL THEN '{}' END
WHERE request_id = :request_id AND granted IS NULL;

-- records --
SELECT seq, type, payload FROM events
WHERE stream_key = ? AND seq > ? ORDER BY seq LIMIT ?;

-- chunk --
-- As `records`, for one who follows a stream: looked up and read at once.
SELECT seq, type, payload FROM events
WHERE stream_key = (SELECT streams.key
                    FROM streams JOIN threads ON threads.key = streams.thread_key
                    WHERE threads.id = ? AND streams.agent_id = ?)
  AND seq > ? ORDER BY seq LIMIT ?;

-- facts --
-- Named, for the planner takes the primary key and walks over every delta.
SELECT seq, type, payload FROM events INDEXED BY facts
WHERE stream_key = ? AND seq > ?
  AND type NOT IN ('text.delta', 'thinking.delta', 'tool.call.progress')
ORDER BY seq LIMIT ?;

-- private --
SELECT seq, kind, body FROM private
WHERE stream_key = ? AND kind >= ? AND kind < ? AND (seq, kind) > (?, ?) ORDER BY seq, kind;

-- last_summary --
SELECT seq, body FROM private INDEXED BY summaries
WHERE stream_key = ? AND seq <= ? AND kind = 'summary.00' ORDER BY seq DESC LIMIT 1;

-- add_spent --
-- Before the run's row: what the run has been active since then is the difference, but for what it
-- was charged with, which its agents have counted.
INSERT INTO spent (profile_id, day, cost_usd, turns, active_ms)
SELECT profile_id, :day, :cost_usd, :turns, max(:active_ms - :charged_ms - active_ms, 0)
FROM runs WHERE id = :run_id
ON CONFLICT (profile_id, day) DO UPDATE SET
    cost_usd = cost_usd + excluded.cost_usd,
    turns = turns + excluded.turns,
    active_ms = active_ms + excluded.active_ms;

-- spent --
SELECT cost_usd, turns, active_ms FROM spent WHERE profile_id = ? AND day = ?;

-- private_at --
SELECT body FROM private WHERE stream_key = ? AND seq = ? AND kind = ?;

-- kept_output --
-- The events of kept outputs alone are looked into, the latest first.
SELECT private.body
FROM private JOIN events ON events.stream_key = private.stream_key AND events.seq = private.seq
WHERE private.stream_key = ? AND private.kind = 'output.00'
  AND json_extract(CAST(events.payload AS TEXT), '$.toolCallId') = ?
ORDER BY private.seq DESC LIMIT 1;

-- agents --
SELECT streams.agent_id, streams.head
FROM streams JOIN threads ON threads.key = streams.thread_key
WHERE threads.id = ? ORDER BY streams.key;

-- run_columns --
SELECT runs.id, threads.id, runs.agent_id, runs.profile_id, runs.model, runs.status, runs.code,
       runs.generation, runs.start_seq, runs.end_seq, runs.timeout_ms, runs.active_ms, runs.deaths,
       runs.usage, runs.accepted_at, runs.started_at, runs.updated_at, runs.terminal_at,
       runs.cancel_requested_at, runs.key, parent.id, runs.name, runs.rests_on
FROM runs JOIN threads ON threads.key = runs.thread_key
LEFT JOIN runs AS parent ON parent.key = runs.parent_key;

-- thread_columns --
SELECT threads.id, threads.profile_id, threads.model, threads.title, threads.created_at,
       threads.updated_at, threads.history_to, threads.forked_from,
       (SELECT runs.id FROM runs
        WHERE runs.thread_key = threads.key AND runs.agent_id = 'root' AND terminal_at IS NULL),
       threads.hidden, threads.key
FROM threads;

-- permission_columns --
SELECT permissions.request_id, runs.id, threads.id, runs.agent_id, permissions.tool_name,
       permissions.operation_hash, permissions.turn_index, permissions.requested_at,
       permissions.expires_at,
       permissions.granted, permissions.decided_by, permissions.decided_at, permissions.question
FROM permissions
JOIN runs ON runs.key = permissions.run_key
JOIN threads ON threads.key = runs.thread_key;

-- count_commit --
-- Counts nothing for one that is not the owner any more.
UPDATE meta SET value = value + 1
WHERE name = 'commits'
  AND (:owner IS NULL OR :owner = (SELECT value FROM meta WHERE name = 'owner'))
RETURNING CAST(value AS INTEGER);

-- commits --
SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'commits';

-- own --
INSERT INTO meta (name, value) VALUES ('owner', ?)
ON CONFLICT (name) DO UPDATE SET value = excluded.value;

-- next_event --
SELECT seq, type, payload FROM events WHERE stream_key = ? AND seq > ? ORDER BY seq LIMIT 1;

-- copy_events --
INSERT INTO events (stream_key, seq, type, payload)
SELECT :to_key, seq, type, payload FROM events WHERE stream_key = :from_key AND seq <= :at;

-- copy_private --
INSERT INTO private (stream_key, seq, kind, body)
SELECT :to_key, seq, kind, body FROM private
WHERE stream_key = :from_key AND seq <= :at AND kind NOT LIKE 'profile.%'
  AND kind NOT LIKE 'options.%';

-- copy_thread --
INSERT INTO threads (id, profile_id, model, title, created_at, updated_at, history_to, forked_from)
SELECT :id, profile_id, model, title, :now, :now, :at, id FROM threads WHERE id = :from_id;

-- adopt_thread --
INSERT INTO threads (id, title, created_at, updated_at, history_to)
VALUES (:id, :title, :now, :now, :at);

-- ends_a_run --
SELECT 1 FROM events WHERE stream_key = ? AND seq = ? AND type = 'session.end';

-- forks --
SELECT id FROM threads WHERE forked_from = ? ORDER BY key;

-- thread_streams --
SELECT streams.key, streams.agent_id, streams.head
FROM streams JOIN threads ON threads.key = streams.thread_key
WHERE threads.id = ? ORDER BY streams.key;

-- delete_events --
DELETE FROM events WHERE stream_key = ?;

-- delete_private --
DELETE FROM private WHERE stream_key = ?;

-- delete_stream --
DELETE FROM streams WHERE key = ?;

-- delete_permissions --
DELETE FROM permissions WHERE run_key IN
    (SELECT runs.key FROM runs JOIN threads ON threads.key = runs.thread_key WHERE threads.id = ?);

-- delete_runs --
DELETE FROM runs WHERE thread_key = (SELECT key FROM threads WHERE id = ?);

-- delete_thread --
DELETE FROM threads WHERE id = ?;

-- add_tombstone --
INSERT INTO tombstones (thread_id, heads, deleted_by, deleted_at) VALUES (?, ?, ?, ?);

-- inbox_of_thread --
SELECT seq FROM events
WHERE stream_key = ? AND type <> 'stream.gap'
  AND json_extract(CAST(payload AS TEXT), '$.threadId') = ?;

-- inbox_of_runs --
SELECT seq FROM events
WHERE stream_key = ? AND type <> 'stream.gap'
  AND json_extract(CAST(payload AS TEXT), '$.runId') IN
      (SELECT id FROM runs WHERE key IN (SELECT value FROM json_each(?)));

-- asked_in_runs --
SELECT 1 FROM permissions WHERE run_key IN (SELECT value FROM json_each(?)) LIMIT 1;

-- replace_event --
UPDATE events SET type = ?, payload = ? WHERE stream_key = ? AND seq = ?;

-- old_runs --
-- The history of a hidden thread came with its run, and goes with it.
SELECT runs.key, streams.key,
       CASE WHEN threads.hidden AND runs.start_seq = threads.history_to
            THEN 0 ELSE runs.start_seq END,
       runs.end_seq
FROM runs
JOIN streams ON streams.thread_key = runs.thread_key AND streams.agent_id = runs.agent_id
JOIN threads ON threads.key = runs.thread_key
WHERE runs.terminal_at < :before AND runs.pruned = :pruned
  -- What a run has said to one that has not ended is still to be told there.
  AND (runs.parent_key IS NULL
       OR (SELECT terminal_at FROM runs AS parent WHERE parent.key = runs.parent_key) IS NOT NULL)
ORDER BY runs.terminal_at LIMIT :limit;

-- run_pruned --
UPDATE runs SET pruned = ? WHERE key = ?;

-- events_between --
SELECT seq, type FROM events WHERE stream_key = ? AND seq > ? AND seq <= ? ORDER BY seq;

-- delete_between --
DELETE FROM events WHERE stream_key = ? AND seq >= ? AND seq <= ?;

-- delete_private_between --
DELETE FROM private WHERE stream_key = ? AND seq >= ? AND seq <= ?;

-- all_streams --
SELECT key, head FROM streams;

-- mark_restored --
UPDATE runs SET code = 'restored' WHERE terminal_at IS NULL;

-- add_meta --
INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING;

-- is_scrubbed --
DELETE FROM meta WHERE name = 'unscrubbed';
