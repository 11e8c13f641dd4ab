-- Sub-agents: a run may be another run's, under the name that its profile has for the agent.
-- `rests_on` is what a run without a task waits for: 'person', 'agents', or 'line' (to ask a person
-- while another agent of the thread does); null where there is something to do, so that a start
-- looks at those only.

ALTER TABLE runs ADD COLUMN parent_key INTEGER REFERENCES runs (key);
ALTER TABLE runs ADD COLUMN name TEXT;
ALTER TABLE runs ADD COLUMN rests_on TEXT;
UPDATE runs SET rests_on = 'person' WHERE status = 'waiting';

CREATE INDEX runs_by_parent ON runs (parent_key) WHERE parent_key IS NOT NULL;
