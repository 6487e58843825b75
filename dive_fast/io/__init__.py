"""Files: complete or absent when written, nothing executed when read."""
