-- Threads that nobody asked for by name: what a client sends whole with each request. They are kept
-- as all others and left out of lists.

ALTER TABLE threads ADD COLUMN hidden INTEGER NOT NULL DEFAULT 0;

-- A list is found at once, however many hidden ones lie between.
CREATE INDEX threads_shown ON threads (updated_at, key) WHERE hidden = 0;
DROP INDEX threads_by_profile;
CREATE INDEX threads_by_profile ON threads (profile_id, hidden, updated_at, key);
