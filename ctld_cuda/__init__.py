"""Continuously tempered Langevin dynamics (Ye, Zhu and Mantiuk, NIPS 2017) as a PyTorch optimizer."""

from .backends import backend_info
from .optimizer import CTLD
from .tempering import AdaptiveForce, Metadynamics, Tempering

__all__ = ["CTLD", "AdaptiveForce", "Metadynamics", "Tempering", "backend_info"]
__version__ = "0.1.0"
