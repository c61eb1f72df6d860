"""Draws from the posterior: taken while exploring, then used for predictions, weights and diagnostics."""

from .draws import Draw, Draws
from .samples import PosteriorSamples

__all__ = ["Draw", "Draws", "PosteriorSamples"]
