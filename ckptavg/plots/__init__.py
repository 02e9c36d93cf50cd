"""Figures of landscapes: ``Landscape.plot`` and ``Landscape.save_figure`` draw them here.

A module per kind of figure reads all that it shows from the ``Landscape``. Colours are Okabe and
Ito's for lines, told apart by dashes and markers, too, and cividis for surfaces: every kind of
colour vision, and a printer without colours, can tell them apart.
"""
