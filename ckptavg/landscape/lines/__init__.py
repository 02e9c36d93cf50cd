"""Lines through weight space: segments with their barriers, rays with their widths."""
