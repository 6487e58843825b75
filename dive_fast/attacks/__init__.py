"""Adversarial attacks on images in [0, 1]. Each sample is attacked apart, whatever its batch and rank."""
