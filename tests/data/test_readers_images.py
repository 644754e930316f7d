"""Picture reader against transformers' Pillow processors and plain numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.data.images import ImageSamples, in_turns
from calibrators.data.open import open_data
from calibrators.data.preprocessing import Preprocessing, preprocessing
from calibrators.data.spec import DataSpec
from pipeline.errors import DataError
from pipeline.notices import collecting
from pipeline.types import CalibrationData, TensorInfo

pil = pytest.importorskip("PIL.Image")
PIXELS = TensorInfo(name="pixels", dtype=np.dtype(np.float32), shape=("batch", 3, "h", "w"))


def picture(width: int = 37, height: int = 23, mode: str = "RGB", seed: int = 0) -> Any:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return pil.fromarray(noise).convert(mode)


def read(folder: Path, how: dict[str, Any] | None, info: TensorInfo = PIXELS, **options: Any) -> CalibrationData:
    return open_data(DataSpec(data=str(folder), preprocessing=how, **options), [info])


def test_values_follow_the_formula(tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    how = {"scale": 1 / 255, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "channels": "bgr", "layout": "nhwc"}
    info = TensorInfo(name="pixels", dtype=np.dtype(np.float32), shape=("batch", "h", "w", 3))
    (batch,) = read(tmp_path, how, info)
    expected = (np.asarray(image)[..., ::-1] / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(batch["pixels"], expected[None], rtol=1e-5, atol=1e-6)


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessorPil", {"size": {"height": 20, "width": 24}, "resample": 2}),
    ("ViTImageProcessorPil", {"size": {"height": 16, "width": 16}, "resample": 3, "image_mean": [0.4, 0.5, 0.6]}),
    (
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}, "do_center_crop": True},
    ),
    (
        "CLIPImageProcessorPil",  # the crop is larger than the picture: padded with zeros
        {"size": {"shortest_edge": 15}, "crop_size": {"height": 22, "width": 17}, "do_center_crop": True},
    ),
    ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 21}, "crop_pct": 0.875, "resample": 3}),
]


@pytest.mark.parametrize(("processor", "config"), CONFIGS)
@pytest.mark.parametrize("size", [(37, 23), (23, 37), (30, 30)])
def test_huggingface_configs_give_what_transformers_gives(
    tmp_path: Path, processor: str, config: dict[str, Any], size: tuple[int, int]
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, processor)(**config)
    theirs.save_pretrained(tmp_path)
    ours = preprocessing({"huggingface": str(tmp_path)}, None, "")
    image = picture(*size)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(ours.apply(image), expected, rtol=1e-4, atol=1e-4)
    assert ours.shape(*size) == expected.shape


def test_legacy_config_keys(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": 24, "crop_size": 20, "do_center_crop": True})
    )
    how = preprocessing(None, tmp_path, "")
    assert (how.size, how.resize, how.crop) == (24, "shortest-edge", (20, 20))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 24, "do_flip_channel_order": True}))
    how = preprocessing({"huggingface": tmp_path, "scale": 2.0}, None, "")
    assert (how.size, how.resize, how.channels, how.scale) == (24, "exact", "bgr", 2.0)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_pad": True}))
    with pytest.raises(DataError, match="do_pad"):
        preprocessing(None, tmp_path, "")


def test_gray_and_odd_modes(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        picture(mode=mode).save(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    info = TensorInfo(name="x", dtype=np.dtype(np.float32), shape=("b", 1, 8, 8))
    data = read(tmp_path, {"size": 8, "resize": "exact", "channels": "gray"}, info)
    assert [batch["x"].shape for batch in data] == [(5, 1, 8, 8)]
    pil.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="8 bits") as caught:
        read(tmp_path, {"size": 8, "resize": "exact", "channels": "gray"}, info)
    assert "deep.png" in caught.value.where


def test_pictures_of_different_sizes_keep_their_order(tmp_path: Path) -> None:
    for index, width in enumerate((10, 10, 12, 10)):
        picture(width, 9, seed=index).save(tmp_path / f"{index}.png")
    data = read(tmp_path, {"scale": 1})
    assert [batch["pixels"].shape for batch in data] == [(2, 3, 9, 10), (1, 3, 9, 12), (1, 3, 9, 10)]
    assert len(data) == 4
    got = [sample for batch in data for sample in batch["pixels"]]
    for index, width in enumerate((10, 10, 12, 10)):
        np.testing.assert_array_equal(got[index], np.asarray(picture(width, 9, seed=index)).transpose(2, 0, 1))


def test_classes_take_turns() -> None:
    files = [Path(p) for p in ("b/2.png", "b/10.png", "a/1.png", "a/2.png", "a/3.png")]
    assert [f.as_posix() for f in in_turns(files)] == ["a/1.png", "b/2.png", "a/2.png", "b/10.png", "a/3.png"]


def test_fixed_size_and_batch(tmp_path: Path) -> None:
    for index in range(3):
        picture(seed=index).save(tmp_path / f"{index}.png")
    info = TensorInfo(name="x", dtype=np.dtype(np.float32), shape=(2, 3, 8, 8))
    with pytest.raises(DataError, match="fixed at 8"):
        read(tmp_path, {"size": 9, "resize": "exact"}, info)
    with collecting() as notices:
        data = read(tmp_path, {"size": 9, "crop": 8}, info)
    assert [batch["x"].shape for batch in data] == [(2, 3, 8, 8)]
    assert [n.code for n in notices] == ["dropped-samples"]


def test_integer_models_take_whole_pixels_only(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    info = TensorInfo(name="x", dtype=np.dtype(np.uint8), shape=(None, 3, None, None))
    (batch,) = read(tmp_path, {"scale": 1}, info)
    np.testing.assert_array_equal(batch["x"][0], np.asarray(picture()).transpose(2, 0, 1))
    assert batch["x"].dtype == np.uint8
    with pytest.raises(DataError, match="uint8"):
        list(read(tmp_path, {"scale": 0.5}, info))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (None, "Nothing says"),
        ({"sise": 8}, "sise"),
        ({"size": 0}, "size"),
        ({"mean": [0.1, 0.2]}, "2 numbers for 3 channels"),
        ({"std": 0}, "std"),
        ({"interpolation": "best"}, "interpolation"),
        ({"huggingface": "/nowhere"}, "cannot be read"),
    ],
)
def test_wrong_preprocessing_is_named(tmp_path: Path, how: dict[str, Any] | None, said: str) -> None:
    picture().save(tmp_path / "a.png")
    with pytest.raises(DataError, match=said):
        read(tmp_path, how)


def test_models_that_take_no_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="4 dimensions"):
        read(tmp_path, {"size": 8}, TensorInfo(name="x", dtype=np.dtype(np.float32), shape=(None, 3)))


@pytest.mark.parametrize("keep", [0, 20, 400])
def test_broken_pictures_are_named(tmp_path: Path, keep: int) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:keep])
    with pytest.raises(DataError, match="decoded") as caught:
        list(read(tmp_path, {"size": 8}))
    assert "b.png" in caught.value.where


def test_digest_follows_pictures_and_preprocessing(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    one = read(tmp_path, {"size": 8}).digest()
    assert read(tmp_path, {"size": 8}).digest() == one
    assert read(tmp_path, {"size": 9}).digest() != one
    picture(seed=1).save(tmp_path / "a.png")
    assert read(tmp_path, {"size": 8}).digest() != one


def test_files_are_listed_in_the_order_of_samples(tmp_path: Path) -> None:
    from calibrators.data.fit import Fit

    picture().save(tmp_path / "a.png")
    samples = ImageSamples(tmp_path, [tmp_path / "a.png"], Fit.of([PIXELS]), Preprocessing(size=8))
    assert samples.files == (tmp_path / "a.png",)
    assert samples.where == str(tmp_path)
