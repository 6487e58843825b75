"""The loaders: plain (PIL), DALI and FFCV. All of them return equal samples and batches."""
