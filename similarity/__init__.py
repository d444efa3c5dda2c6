"""The instrument: record what the layers of PyTorch models compute, and compare it.

It knows nothing of lesions, files, figures or studies, and can be used on any `nn.Module`.
"""

from similarity import calibration, measures, moments
from similarity.hooks import list_sites
from similarity.merging import gather, merge
from similarity.plane import Plane, plane
from similarity.policies import estimate_bytes
from similarity.reading import Reader, open_reader
from similarity.recording import Recording, Site, record, record_models
from similarity.sites import resolve_sites
from similarity.streaming import stream_plane

__all__ = [
    "Plane",
    "Reader",
    "Recording",
    "Site",
    "calibration",
    "estimate_bytes",
    "gather",
    "list_sites",
    "measures",
    "merge",
    "moments",
    "open_reader",
    "plane",
    "record",
    "record_models",
    "resolve_sites",
    "stream_plane",
]
