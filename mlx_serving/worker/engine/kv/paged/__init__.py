"""The paged KV cache: keys and values in blocks, which rows own and share."""
