"""Surface normals from one image: a task of real vectors outside the package.

Everywhere in this file a normal is a unit vector in camera coordinates, x right, y up, z back (from the scene to the
camera), as in OpenGL; a zero vector means that the pixel has no normal.

Shapes: B batch, P pixels, S label size, H and W native size.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from uvim_fsq.data.arrays import check_npy
from uvim_fsq.data.decoded import decoded
from uvim_fsq.data.folders import IMAGE_SUFFIXES, files_by_stem, split_folder
from uvim_fsq.data.images import check_pixels, decode_png, read_image, write_png
from uvim_fsq.data.resize import resize_linear, resize_nearest
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample
from uvim_fsq.data.splits import SPLITS, split_rows
from uvim_fsq.data.tiles import blend
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole
from uvim_fsq.tasks.base import Baseline, Metric, Real, Task
from uvim_fsq.tasks.legend import beside, draw_legend
from uvim_fsq.tasks.registry import register_task

#: Direction -> unit vector.
DIRECTIONS = {
    "right": (1, 0, 0),
    "left": (-1, 0, 0),
    "up": (0, 1, 0),
    "down": (0, -1, 0),
    "back": (0, 0, 1),
    "front": (0, 0, -1),
}
#: Upper limits of the angular error whose shares of pixels are reported, in degrees.
LIMITS = (11.25, 22.5, 30)
#: Intervals of the angular error per degree, from which the median is computed.
PER_DEGREE = 20
#: Angular error of equal directions, at most, in degrees: that of float32.
ROUNDING = 5e-5
#: Angular error at the end of the color scale of errors, in degrees.
WORST = 45
INFERNO = (matplotlib.colormaps["inferno"](range(256))[:, :3] * 255).astype(np.uint8)


# ---------------------------------------------------------------- vectors


def unit(vectors):
    """(..., 3) real -> float32 of length 1; vectors of length 0 and those that are not finite become 0."""
    vectors = np.nan_to_num(np.asarray(vectors, np.float32), nan=0, posinf=0, neginf=0)
    return vectors / np.maximum(np.sqrt((vectors * vectors).sum(-1, keepdims=True)), np.float32(1e-12))


def angle(one, two):
    """Angles between unit vectors (..., 3), in degrees, float64; 90 where one of them is 0.

    The arc cosine of the scalar product would be off by 0.02 degrees at small angles, because of its rounding.
    """
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    degrees = np.degrees(np.arctan2(np.linalg.norm(np.cross(one, two), axis=-1), (one * two).sum(-1)))
    return np.where(one.any(-1) & two.any(-1), degrees, 90)


def fit(normals, size):
    """(h, w, 3) -> (height, width, 3): resized bilinearly, then made unit vectors again."""
    return unit(resize_linear(np.asarray(normals, np.float32), size))


def paint(normals):
    """(..., 3) -> uint8 colors, as in most normal maps: n * 127.5 + 127.5; gray where there is no normal."""
    return (normals * 127.5 + 127.5).round().clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- data


def axis_matrix(axes):
    """(3, 3) float32: stored row vectors times this matrix are in our coordinates; its transpose leads back."""
    matrix = np.float32([DIRECTIONS.get(name, (0, 0, 0)) for name in axes])
    if matrix.shape != (3, 3) or not np.linalg.det(matrix):
        known = ", ".join(DIRECTIONS)
        raise UserError(f"task.axes={list(axes)}: name a direction of each axis, three of {known}, e.g. [left,up,back]")
    return matrix


def read_normals(file, matrix):
    """A normal map, .npy or PNG of 8 or 16 bits, as (H, W, 3) float32. `matrix`: see `axis_matrix`."""
    try:
        stored = _from_npy(file) if file.suffix.lower() == ".npy" else _from_png(file)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; each image needs its normal map") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read as a normal map ({error}); replace or remove it") from error
    # What has no normal is 0, NaN, black (-1, -1, -1) or white, none of which is about as long as a unit vector.
    length = np.sqrt((stored * stored).sum(-1, keepdims=True))
    return unit(np.where((length > 0.5) & (length < 1.5), stored, 0) @ matrix)


def _from_npy(file):
    with file.open("rb") as opened:
        shape = check_npy(opened, file.stat().st_size, file)
    if len(shape) != 3 or shape[2] != 3:
        raise UserError(f"{file} has shape {shape}, expected (H, W, 3)")
    check_pixels(shape[1], shape[0], file)
    return np.load(file, allow_pickle=False).astype(np.float32)


def _from_png(file):
    pixels = decode_png(file.read_bytes(), file)
    if pixels is None or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise UserError(f"{file} is not a PNG with three channels, or damaged; replace or remove it")
    vectors = pixels[..., 2::-1] / np.float32(np.iinfo(pixels.dtype).max / 2) - 1  # OpenCV has blue first
    return vectors if pixels.shape[2] == 3 else np.where(pixels[..., 3:] > 0, vectors, 0)


class Normals:
    """ROOT/{train,val}/images/NAME.jpg or .png with ROOT/{train,val}/normals/NAME.png or .npy."""

    def __init__(self, root, split, config):
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        folder = split_folder(find_data_root(root), "val" if split == "val" else "train")
        places = {"image_dir": folder / config.image_dir, "normal_dir": folder / config.normal_dir}
        for key, place in places.items():
            if not place.is_dir():
                raise UserError(f"{place}: no such folder; set task.{key}")

        def is_image(path):
            own = not config.normal_suffix or not path.stem.endswith(config.normal_suffix)
            return path.suffix.lower() in IMAGE_SUFFIXES and (own or places["image_dir"] != places["normal_dir"])

        images = files_by_stem(places["image_dir"], is_image, config.image_suffix)
        maps = files_by_stem(
            places["normal_dir"], lambda path: path.suffix.lower() in (".png", ".npy"), config.normal_suffix
        )
        missing = sorted(images.keys() - maps.keys())
        if missing or not images:
            first = f"; {len(missing)} have no normal map, the first is {missing[0]}" if missing else ""
            raise UserError(f"{places['image_dir']}: {len(images)} images{first}")
        names = list(images)
        self.files = [(names[row], images[names[row]], maps[names[row]]) for row in split_rows(split, names)]
        self.axes = tuple(config.axes)
        self.info = {"layout": "normals", "split": split, "count": len(self.files), "root": root}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        name, photo, file = self.files[index]
        matrix = axis_matrix(self.axes)
        normals = decoded(file, np.float32, ["normals", *self.axes], lambda: read_normals(file, matrix))
        image = read_image(photo)
        if normals.shape[:2] != image.shape[:2]:
            raise UserError(f"{file} is {normals.shape[:2]}, but its image {image.shape[:2]}; fix or remove them")
        return Sample(name, image, {"normals": normals})


# ---------------------------------------------------------------- metric


class AngularError(Metric):
    """Angular error over the pixels of all images that have a normal, at the images' own size (Eigen and Fergus, 2015):
    mean and median in degrees, and the percentage of pixels below 11.25, 22.5 and 30 degrees.

    Predictions are resized bilinearly. Where there is none (0 or not finite), the error is 90 degrees. The median is
    exact to 1/40 degree, because it is computed from counts.
    """

    protocol = "surface_normals/eigen_fergus"

    def __init__(self):
        #: Pixels by error: none but that of rounding, then in each 1/20 degree.
        self.histogram = np.zeros(180 * PER_DEGREE + 1)
        #: Images, images without a normal, pixels, sum of their errors, and those below each of the limits.
        self.sums = np.zeros(4 + len(LIMITS))

    def update(self, prediction, sample):
        truth = sample.maps["normals"]
        known = truth.any(-1)
        errors = angle(fit(prediction, truth.shape[:2])[known], truth[known])
        rows = np.ceil((errors - ROUNDING).clip(0) * PER_DEGREE).astype(int)
        self.histogram += np.bincount(rows, minlength=len(self.histogram))
        below = [(errors < limit).sum() for limit in LIMITS]
        self.sums += [1, not len(errors), len(errors), errors.sum(), *below]
        if not len(errors):
            return {"valid_pixels": 0.0}
        figures = _figures(len(errors), errors.mean(), np.median(errors), below)
        return {**figures, "valid_pixels": float(len(errors))}

    def state(self):
        return {"histogram": self.histogram.copy(), "sums": self.sums.copy()}

    def load_state(self, state):
        self.histogram, self.sums = np.array(state["histogram"]), np.array(state["sums"])

    def compute(self):
        images, without, pixels, total, *below = self.sums.tolist()
        if not pixels:
            raise UserError(f"no pixel with a normal was evaluated, in {images:.0f} images")
        # The interval of each of the two middle pixels, which are the same one of an odd number. Interval 0: error 0.
        middle = np.searchsorted(self.histogram.cumsum(), [(pixels + 1) // 2, pixels // 2 + 1])
        median = np.maximum(middle - 0.5, 0).mean() / PER_DEGREE
        figures = _figures(pixels, total / pixels, median, below)
        return {**figures, "images": images, "images_without_normals": without}


def _figures(pixels, mean, median, below):
    shares = {f"below_{limit:g}": float(100 * count / pixels) for limit, count in zip(LIMITS, below, strict=True)}
    return {"mean_angle": float(mean), "median_angle": float(median), **shares}


# ---------------------------------------------------------------- task


@dataclass(frozen=True)
class Config:
    changeable = ("axes", "image_dir", "normal_dir", "image_suffix", "normal_suffix")

    axes: tuple[str, ...] = ("right", "up", "back")
    """Where the three channels of the files point to: [left,up,back] for DSINE and its NYU and ScanNet normals,
    [right,down,back] for 2D-3D-S and Omnidata, [right,down,front] for normals in OpenCV's coordinates. Predictions are
    saved in the same way."""
    image_dir: str = "images"
    """Folder of the images in ROOT/train and ROOT/val; empty: these folders themselves."""
    normal_dir: str = "normals"
    """Folder of the normal maps; may be that of the images."""
    image_suffix: str = ""
    """What the names of images end with, e.g. _img for 000001_img.png."""
    normal_suffix: str = ""
    """What the names of normal maps end with, e.g. _normal for 000001_normal.png."""


@register_task("surface_normals")
class SurfaceNormals(Task):
    Config = Config
    main_metric, smaller_is_better = "mean_angle", True
    secondary_metrics = ("median_angle", *(f"below_{limit:g}" for limit in LIMITS))

    def __init__(self, config):
        super().__init__(config)
        self.matrix = axis_matrix(config.axes)

    @property
    def label_channels(self):
        return {"normals": Real(3)}

    def source(self, root, split):
        return Normals(root, split, self.config)

    def adjust(self, maps, scale, *, mirrored):
        """A mirrored surface faces the other side. A normal is a direction in space, so resizing does not change it.

        Labels are resized by nearest neighbor, because the mean of two faces' normals is that of neither. So they stay
        unit vectors; if `linear_maps` named them, they would have to be made so here.
        """
        return {**maps, "normals": maps["normals"] * np.float32([-1 if mirrored else 1, 1, 1])}

    def encode(self, sample):
        return {"normals": sample.maps["normals"]}

    def loss(self, logits, labels):
        """Negative log-likelihood (nats) of a von Mises-Fisher distribution, whose natural parameters are the logits v.

        Its density is k / (4 pi sinh k) exp(v . n) with k = |v|, the confidence. Pixels without a normal contribute 0.
        The gradient is the expected normal minus the true one, as for softmax and cross-entropy. So it is bounded, and
        defined at v = 0, where training begins; those of the cosine and the angle (Bae et al., 2021) are not.
        """
        v, normals = logits["normals"], labels["normals"]
        k = (v.square().sum(-1) + 1e-6).sqrt()
        dot = (v * normals).sum(-1)
        loss = k + torch.log(-torch.expm1(-2 * k) / k) + math.log(2 * math.pi) - dot
        known = normals.any(-1)
        degrees = torch.rad2deg(torch.acos((dot / k).detach().clamp(-1, 1)))
        return (loss * known).mean(1), {"angle": (degrees * known).mean(1)}

    def decode(self, logits):
        """(B, S, S, 3) logits -> (S, S, 3) float32 unit vectors per image."""
        return list(F.normalize(logits["normals"].float(), dim=-1).cpu().numpy())

    def metric(self, source):
        return AngularError()

    def to_size(self, prediction, image):
        return fit(prediction, image.shape[:2])

    def tiled(self):
        return self

    def merge_tiles(self, whole, parts, image):
        """The blended vectors, made unit vectors again; `whole` is not used."""
        return unit(blend(image.shape[:2], ((tile, fit(part, (tile.height, tile.width))) for tile, part in parts)))

    def spread(self, predictions):
        """The mean angle to the mean direction, in degrees."""
        middle = unit(np.mean(np.stack(predictions), axis=0))
        return np.mean([angle(prediction, middle) for prediction in predictions], axis=0).astype(np.float32)

    def render(self, image, prediction, truth=None):
        """Normals as colors; the error's colors go from 0 (black) to 45 degrees, gray without a normal."""
        pictures = {"prediction": paint(prediction)}
        if truth is None:
            return pictures
        normals = truth.maps["normals"]
        error = INFERNO[(angle(prediction, normals) * 255 / WORST).clip(0, 255).astype(np.uint8)]
        error = np.where(normals.any(-1, keepdims=True), error, paint(np.zeros(3)))
        return {"ground truth": paint(normals), **pictures, "error": error}

    def captions(self, prediction, truth):
        known = truth.maps["normals"].any(-1)
        if not known.any():
            return {"ground truth": "no normal"}
        errors = angle(prediction[known], truth.maps["normals"][known])
        return {"error": f"mean {errors.mean():.1f} degrees, colors 0 to {WORST}"}

    def legend(self):
        """The colors of a ball's normals, and their names."""
        y, x = np.mgrid[1:-1:109j, -1:1:109j]
        ball = paint(np.stack([x, y, np.sqrt(np.maximum(1 - x * x - y * y, 0))], -1))
        ball[x * x + y * y > 1] = 255
        names = ["faces right", "faces left", "faces up", "faces down", "faces the camera", "no normal"]
        return beside(ball, draw_legend(names, paint(np.array([*list(DIRECTIONS.values())[:5], (0, 0, 0)]))))

    def prediction_files(self, stem):
        return {"png": f"{stem}_normal.png", "npy": f"{stem}_normal.npy"}

    def save_prediction(self, prediction, image, stem):
        """stem_normal.png: 8-bit RGB, n * 127.5 + 127.5; stem_normal.npy: float32; both along `axes`."""
        paths = self.prediction_files(stem)
        stored = (prediction @ self.matrix.T).astype(np.float32)
        write_png(paths["png"], paint(stored))
        write_whole(Path(paths["npy"]), lambda file: _save(file, stored), durable=False)
        return paths

    def baseline(self, source, size):
        total = np.zeros((size, size, 3))
        for i in range(len(source)):
            total += resize_nearest(source[i].maps["normals"], (size, size))
        mean = unit(np.where(total.any(-1, keepdims=True), total, total.sum((0, 1))))
        return Baseline("mean normal map of the training set", lambda image: mean)

    def check_sample(self, sample):
        normals = sample.maps["normals"][sample.maps["normals"].any(-1)]
        if not len(normals):
            return f"{sample.id}: no pixel has a normal"
        # A surface that is seen faces the camera; where the picture ends, z may nevertheless be a little below 0.
        if np.median(normals[:, 2]) < 0:
            return f"{sample.id}: most normals point away from the camera; set task.axes to those of the files"
        return None


def _save(file, array):
    with file.open("wb") as opened:  # np.save adds a suffix to a path
        np.save(opened, array)
