"""The delivery protocol: keys, calls, scripts, and the client that runs them."""
