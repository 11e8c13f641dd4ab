-- What grew with the log is found at once: runs that may be pruned, without those that have been,
-- and what was asked in a run, without the questions of all others.

DROP INDEX runs_by_end;
CREATE INDEX runs_by_end ON runs (pruned, terminal_at) WHERE terminal_at IS NOT NULL;

CREATE INDEX permissions_by_run ON permissions (run_key);
