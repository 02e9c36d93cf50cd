"""Figures of landscapes: ``Landscape.plot`` and ``Landscape.save_figure`` draw them here."""
