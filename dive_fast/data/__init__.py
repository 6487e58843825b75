"""Samples in, batches out: sources of samples, views of images, prompts of classes, and the loaders."""
