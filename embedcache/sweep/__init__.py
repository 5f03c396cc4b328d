"""A grid of heads over a cache: stacked training, honest selection, statistics."""
