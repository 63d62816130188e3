"""Files of weights, by every name they go by."""
