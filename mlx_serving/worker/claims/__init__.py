"""From a queue to the engine: which jobs a worker takes, and what their payloads ask for."""
