"""The models that a worker serves: loading, budget, memory."""
