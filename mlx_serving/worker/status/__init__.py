"""What a worker says of itself: to its parent, to Redis, to operators."""
