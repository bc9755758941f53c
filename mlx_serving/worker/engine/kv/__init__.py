"""KV caches of a batch that rows join and leave."""
