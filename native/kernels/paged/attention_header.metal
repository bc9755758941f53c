// Nothing that attention.metal needs from outside.
