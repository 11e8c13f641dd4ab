-- What is asked of a person is whether a call may run, or a question of the model's own: then this is
-- what it asks, as JSON (question, options, multiple), and `{}` once it has been answered.

ALTER TABLE permissions ADD COLUMN question TEXT;
