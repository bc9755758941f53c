"""A job: its schema, its messages, the form of its output, and their checks."""
