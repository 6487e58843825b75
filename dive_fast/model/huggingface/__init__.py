"""Conversions between models of transformers (CLIPModel, SiglipModel) and of open_clip, in both directions."""
