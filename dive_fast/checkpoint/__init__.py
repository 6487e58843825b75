"""A run on disk: what training needs to go on, and the model for open_clip."""
