"""Where text comes from: the table of sources, the Hub, local files, and their records."""
