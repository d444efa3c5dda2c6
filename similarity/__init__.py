"""The instrument: record what the layers of PyTorch models compute, and compare it.

It knows nothing of lesions, files, figures or studies, and can be used on any `nn.Module`.
"""

from similarity import calibration, measures, moments
from similarity.hooks import list_sites
from similarity.plane import Plane, plane
from similarity.recording import Recording, Site, record, record_models
from similarity.sites import resolve_sites

__all__ = [
    "Plane",
    "Recording",
    "Site",
    "calibration",
    "list_sites",
    "measures",
    "moments",
    "plane",
    "record",
    "record_models",
    "resolve_sites",
]
