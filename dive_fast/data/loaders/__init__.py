"""The loaders: plain PIL, DALI, FFCV; equal samples and batches."""
