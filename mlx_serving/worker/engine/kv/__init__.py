"""KV caches of a batch whose members come and go."""
