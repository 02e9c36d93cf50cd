"""Directories of ``torch.distributed.checkpoint``, read and written."""
