"""Templates and label words: a task as a gap that the language model fills."""
