"""Looking at prepared shards: verify, repair, inspect."""
