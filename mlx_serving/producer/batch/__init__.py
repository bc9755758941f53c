"""Bulk files: OpenAI Batch requests in, results out, over crashes. See docs/how-to/bulk.md."""
