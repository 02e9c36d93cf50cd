"""Filter grafting: two networks averaged with coefficients of each layer's own."""
