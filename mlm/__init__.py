"""mlm: a language model whose weights are a memory, rewritten while it reads."""
