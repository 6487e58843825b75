"""Fine-tuning a small CLIP on real pictures: its data, its pre-training, what a run left of it."""
