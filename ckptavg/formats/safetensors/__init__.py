"""The safetensors format: a JSON header, followed by the bytes of all tensors."""
