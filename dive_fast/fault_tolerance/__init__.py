"""What keeps a long run from being lost or silently wrong."""
