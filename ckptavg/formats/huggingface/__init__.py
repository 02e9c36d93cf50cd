"""Reader and writer of Hugging Face directories."""
