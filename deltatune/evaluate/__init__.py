"""Measure a model: metrics with intervals, generation, the best untuned prompt, what was forgotten."""
