"""Input and output: files that are written completely or not at all, and readers that execute nothing."""
