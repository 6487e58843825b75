"""Fine-tune CLIP by DiVE (Difference Vector Equalization) without losing its robustness, fast."""
