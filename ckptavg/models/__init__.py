"""Models on a device: loading weights, memory, precision, and calls on a batch."""
