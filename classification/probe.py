"""A linear probe: how well classes can be told from a network's frozen features, by multinomial logistic regression."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from classification.classifiers import Classifier
from classification.training import Photos, predict
from utils import InputError

STEPS = 5000  # of the optimizer at most


def linear_probe(model: Classifier, train: Photos, images: Tensor) -> np.ndarray:
    """(N,) the class that a probe, fitted to the features of the training photographs, gives every image.

    model : without a head, so that it answers features; they are standardised by the training photographs' mean and
        deviation. The penalty is scikit-learn's default: nothing is chosen on the images that are asked about.
    """
    if model.spec.classes:
        raise InputError(f"{model.spec.name} has a head of {model.spec.classes} classes; a probe is of one without")
    if len(train[1].unique()) < 2:
        raise InputError("a linear probe tells classes apart; give training photographs of at least 2")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS))
    probe.fit(predict(model, train[0]).double().numpy(), train[1].numpy())
    return probe.predict(predict(model, images).double().numpy())
