"""Reader and writer of ``torch.save`` files."""
