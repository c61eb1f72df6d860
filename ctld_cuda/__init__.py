"""Continuously tempered Langevin dynamics (Ye, Zhu and Mantiuk, NIPS 2017) as a PyTorch optimizer."""

from .backends import backend_info
from .optimizer import CTLD
from .posterior import Draws, PosteriorSamples
from .preconditioner import RMSPreconditioner
from .recipe import settings_from, suggest_temperature, suggest_tempering
from .schedules import explore_then_finetune
from .tempering import AdaptiveForce, Metadynamics, Tempering

__all__ = [
    "CTLD",
    "AdaptiveForce",
    "Draws",
    "Metadynamics",
    "PosteriorSamples",
    "RMSPreconditioner",
    "Tempering",
    "backend_info",
    "explore_then_finetune",
    "settings_from",
    "suggest_temperature",
    "suggest_tempering",
]
__version__ = "0.1.0"
