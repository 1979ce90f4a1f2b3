"""The errors that users meet: each message names what was wrong, what was expected and what to do, in a sentence.

Each has a `code` too, which stays the same when a sentence is worded anew, so that programs can act on it. Those of
inputs, the checks that a study goes through on its way to a network, are the keys of REFUSALS and WARNINGS.
"""

from __future__ import annotations

from typing import Any

REFUSALS = {
    "missing_file": "There is no such file or folder, or nothing in the folder that could be read.",
    "unknown_format": "Not NIfTI, DICOM, PNG or TIFF by its name.",
    "wrong_format": "The content is of another format than the name says, e.g. a .nii that is compressed.",
    "mixed_formats": "Files of several formats in one input.",
    "corrupt_file": "Truncated, or bytes that can't be parsed.",
    "broken_header": "A header field has a value that the standard does not know.",
    "undecodable_pixels": "DICOM pixel data truncated, damaged or compressed in a way that nothing here decodes.",
    "no_image": "A DICOM file without an image.",
    "localiser": "A DICOM localiser (scout) among the slices.",
    "colour": "Colour, transparency, a palette or complex numbers where one number a pixel is expected.",
    "bit_depth": "PNG or TIFF samples of a depth that would be rescaled on reading.",
    "white_is_zero": "A TIFF of more than 8 bits in which zero is white.",
    "exif_rotation": "A rotation in the metadata that viewers apply differently.",
    "lossy_mask": "A mask that went through lossy compression.",
    "several_volumes": "Time points, frames, pages or several NIfTI files where one volume is expected.",
    "too_large": "More voxels than this package reads, or than memory holds.",
    "missing_uid": "A DICOM file without an identifier that tells what it belongs to.",
    "missing_geometry": "PixelSpacing, position or orientation of a DICOM slice is absent or not numbers.",
    "broken_orientation": "Direction cosines or a quaternion that are no rotation.",
    "mixed_series": "DICOM files of several studies, series or modalities.",
    "mixed_frames_of_reference": "DICOM files of several frames of reference.",
    "mixed_grids": "Slices or channels of different size, spacing, orientation or place.",
    "duplicate_slice": "Two DICOM slices of one position.",
    "missing_slice": "A gap between DICOM slices.",
    "misplaced_slice": "A DICOM slice off the line of the others.",
    "duplicate_name": "Two slices whose masks would have the same name.",
    "broken_affine": "An affine that holds NaN or infinity.",
    "zero_spacing": "An axis of no extent.",
    "singular_affine": "Two axes of one direction.",
    "sheared_affine": "Axes that are not perpendicular, as of a tilted gantry.",
    "non_finite": "NaN or infinity among the voxels.",
    "constant_image": "The same value everywhere, in the file or within the window.",
    "wrong_channels": "Another number of channels than the network takes.",
    "input_folder": "Masks would be written into the input's own folder.",
    "wrong_modality": "DICOM of another Modality than the training images, which --ood refuse does not let pass.",
    "output_name_taken": "The mask of another study in the same folder has the name.",
    "unreadable": "The file system does not let the input be read: permissions, or a name that is too long.",
    "name_too_long": "The mask's name would be longer than the file system takes.",
    "unlike_training": "Further from the images that the networks were trained on than --ood allows.",
    "non_finite_result": "The network gave NaN or infinity.",
}
"""Why an input is refused: the codes of a DataError that concerns a user's own file. `cldf-fast predict` writes them to
summary.json and audit.jsonl."""

WARNINGS = {
    "qform_sform_disagree": "NIfTI's two statements of the geometry differ; the sform is used.",
    "no_orientation": "A NIfTI header without orientation; left, anterior, superior are assumed.",
    "single_slice": "A DICOM slice alone has no slice distance; 1 mm is assumed.",
    "lossy_compression": "DICOM images that were compressed with loss.",
    "derived_image": "DICOM images that were computed from others (ImageType DERIVED).",
    "turned_images": "Axial DICOM images whose rows do not run to the patient's left, or columns not to the back.",
    "equal_channels": "Two channels hold the same image: a sequence is missing or given twice.",
    "constant_channel": "One of several channels is the same value everywhere.",
    "other_modality": "DICOM of another Modality than the training images.",
    "other_pixel_size": "Pixels, as networks see them, twice as large as any of the training images, or half as large.",
    "implausible_intensities": "Nearly nothing lies within the window, or all of it in a small part: other units?",
}
"""Why an input is doubtful though used: the codes of an InputWarning. `cldf-fast predict` writes them likewise."""


class CLDFError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback."""

    code = "error"


class DataError(CLDFError, ValueError):
    """An input file or array can't be used: corrupt, truncated, wrong shape or geometry, not finite, constant.

    code: one of REFUSALS, or "data" for arrays and data sets, which go through no checks of inputs.
    """

    def __init__(self, message: str, *, code: str = "data") -> None:
        super().__init__(message)
        self.code = code


class UnlikeTrainingError(DataError):
    """A study is unlike the images that the networks were trained on, further than a policy allows."""

    def __init__(self, message: str, scores: dict[str, Any]) -> None:
        super().__init__(message, code="unlike_training")
        self.scores = scores
        """As `deploy.ood.Judgement.to_json` gives them."""


class SplitError(DataError):
    """A split is inconsistent: a patient in two parts, an unknown patient, an empty part."""


class ConfigError(CLDFError, ValueError):
    """A configuration value or combination of values is not allowed."""

    code = "configuration"


class CheckpointError(CLDFError, RuntimeError):
    """A weights file or run directory is missing, incomplete, or does not fit the network it is loaded into."""

    code = "checkpoint"


class TrainingError(CLDFError, RuntimeError):
    """A training went wrong: its weights are not finite any more."""

    code = "training"


class BackendError(CLDFError, RuntimeError):
    """A backend was asked for by name and can't serve the input, or is not available on this machine."""

    code = "backend"


class IntegrityError(CLDFError, RuntimeError):
    """A deployed file, signature or log is not what its manifest or its chain of hashes says, or can't be trusted."""

    code = "integrity"


class EngineMismatchError(CLDFError, RuntimeError):
    """No engine fits: they were built for another GPU, TensorRT, operating system or precision."""

    code = "engine_mismatch"


class ParityError(CLDFError, RuntimeError):
    """An exported graph or engine does not give what the run gives in PyTorch."""

    code = "parity"


class InputWarning(UserWarning):
    """An input is used, and something about it is doubtful. code: one of WARNINGS."""

    def __init__(self, message: str, *, code: str = "data") -> None:
        super().__init__(message)
        self.code = code
