// Nothing that paged_attention.metal needs from outside.
