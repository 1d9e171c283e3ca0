"""Measure a model: metrics, intervals, generation, the untuned model at its best, and what tuning forgets."""
