"""Keys and values in blocks, which rows own and share."""
