"""Kinds of figures, a module per kind of landscape.

============  ========================================================================  ===========
kind          shows                                                                     module
============  ========================================================================  ===========
curve         error and loss over training, recorded learning rates below               curve
plane, pca    training loss with the L2 term, and evaluation error, over a plane        surface
segment       loss and error between two points, with the barrier                       segment
rays          loss and error in random directions, with the width of the minimum        rays
ensemble      average and ensemble over the number of checkpoints                       ensemble
geometry      distances to the mean, norms, cosines of steps, distances of all pairs    geometry
reliability   share that is right over confidence, and samples per bin                  reliability
============  ========================================================================  ===========

An accuracy in percent is shown as the error, 100 − accuracy, as in the papers. Bands are 95 %
intervals. Hatched areas are points whose outputs were not finite. ``arrange`` of a module tells the
panels that a landscape needs, and ``draw`` draws on them.
"""
