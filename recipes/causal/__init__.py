"""Half of a causal language model's layers, with and without a teacher."""
