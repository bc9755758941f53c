"""Bulk files: OpenAI Batch requests in, results out, over nights and crashes. See docs/bulk.md."""
