"""A run, a checkpoint or a Hugging Face folder as a model with its tokenizer."""
