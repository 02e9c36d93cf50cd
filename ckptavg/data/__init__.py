"""Loading of samples: subset, order, batches and the share of each process."""
