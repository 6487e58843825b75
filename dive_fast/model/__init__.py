"""The model: two towers, their features, a head, their weights' files."""
