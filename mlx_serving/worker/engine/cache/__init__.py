"""KV caches of a batch whose members come and go; the paged one has a room of its own."""
