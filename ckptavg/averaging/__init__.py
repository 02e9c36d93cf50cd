"""Coefficients × one streaming pass."""
