"""A paged KV cache: every layer's keys and values in blocks, which rows own and share."""
