"""The device's memory: how much there is, the guard, and recovery from running out."""
