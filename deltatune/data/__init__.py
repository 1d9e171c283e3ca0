"""Where rows come from, what they mean, how they become tensors: sources -> formats -> encode -> batch."""
