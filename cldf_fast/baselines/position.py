"""What the place of a slice in its stack says about its label: a floor for image-level classifiers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cldf_fast.data.packing import PackedSlices
from cldf_fast.evaluation import auc

_BINS = 20


def position_label_auc(train: PackedSlices, test: PackedSlices) -> float | None:
    """AUC of image-level labels predicted from the relative height in the stack alone, the mean over classes.

    The prediction is the share of training slices at that height that carry the class. No image and no mask is read.
    Classes that all or none of the test slices carry are left out; None if that leaves none.
    """
    labels, truth = train.require_labels().numpy(), test.require_labels().numpy()
    seen, asked = relative_height(train), relative_height(test)
    bin_of = np.minimum((seen * _BINS).astype(np.intp), _BINS - 1)
    slices = np.bincount(bin_of, minlength=_BINS)
    centres = (np.arange(_BINS) + 0.5) / _BINS
    values = []
    for k in range(labels.shape[1]):
        positive = np.bincount(bin_of, labels[:, k], minlength=_BINS)
        share = positive[slices > 0] / slices[slices > 0]
        values.append(auc(np.interp(asked, centres[slices > 0], share), truth[:, k]))
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def relative_height(data: PackedSlices) -> npt.NDArray[np.float64]:
    """Height of every slice in its study, from 0 (first slice at hand) to 1 (last), [N]; 0 for a single slice."""
    _, study = np.unique(np.asarray(data.studies), return_inverse=True)
    place = np.asarray(data.indices, np.float64)
    first = np.full(int(study.max()) + 1, np.inf)
    last = np.full_like(first, -np.inf)
    np.minimum.at(first, study, place)
    np.maximum.at(last, study, place)
    return (place - first[study]) / np.maximum(last - first, 1)[study]
