"""Records to rows: the tokenizer, chat templates, the columnar encoder, packing."""
