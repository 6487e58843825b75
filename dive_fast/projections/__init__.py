"""Methods in weight space: rules that keep tuned weights near their anchors, combined with any objective."""
