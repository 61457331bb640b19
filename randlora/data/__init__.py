"""Data sets to batches: sources, subsets, images, order."""
