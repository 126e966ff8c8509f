"""The authors' layouts, both ways, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from ttsnap_lib import import_published
from ttsnap_lib.errors import TensorError
from ttsnap_lib.tensors.published import export_ground_truth, export_published, import_ground_truth, read_values
from ttsnap_lib.tensors.tensor import make_rewards


def hard_values(shape, seed=0) -> np.ndarray:
    """Return float32 values that decimal notation has trouble with: tiny, huge, subnormal, whole, negative zero."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, shape, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = np.where(np.isfinite(bits), bits, np.float32(0.1))
    special = np.array([1e-5, 1e-45, 3.4e38, 2.0, -0.0, 1 / 3, -1e16, 123456789.0], np.float32)
    values.ravel()[: len(special)] = special
    return values


@pytest.fixture
def dataset():
    """Two rewards, one of them with two noise-aware steps."""
    base = hard_values((2, 3, 5, 4))
    aware = base.copy()
    aware[0, :, :, 1:3] = hard_values((3, 5, 2), seed=1)
    source = np.full((2, 4), "copied_from_base")
    source[0, 1:3] = "finetuned"
    return make_rewards(
        base, aware, rewards=["pickscore", "image_reward"], noise_aware_source=source, attributes={"model": "flux"}
    )


def test_published_layout_both_ways(dataset, tmp_path):
    files = export_published(dataset, tmp_path, "flux")
    names = {str(path.relative_to(tmp_path)) for path in files}
    assert "flux_pic_val_base/p3_i5_s00.yaml" in names and "flux_imr_val_base/p3_i5_s03.yaml" in names
    assert {name for name in names if "naft" in name} == {
        "flux_pic_val_naft/p3_i5_s01.yaml", "flux_pic_val_naft/p3_i5_s02.yaml",
    }  # fmt: skip
    back = import_published(tmp_path, "flux", ["pickscore", "image_reward"])
    for variable in ("base", "noise_aware"):
        assert back[variable].values.tobytes() == dataset[variable].values.tobytes()
    assert np.array_equal(back["noise_aware_source"].values, dataset["noise_aware_source"].values)
    # Any YAML reader sees numbers, also in what YAML 1.1 would take for text (1e-05).
    content = yaml.safe_load((tmp_path / "flux_pic_val_base" / "p3_i5_s00.yaml").read_text())
    assert all(isinstance(value, float) for row in content.values() for value in row)


def test_published_files_come_out_as_they_were(reference, tmp_path):
    """Published files read and exported again: the same bytes as the authors' files."""
    files = [reference / "values" / f"flux_pic_val_{variant}" / "p200_i200_s06.yaml" for variant in ("base", "naft")]
    base, aware = (read_values(file)[None, :, :, None] for file in files)
    written = export_published(make_rewards(base, aware, rewards=["pickscore"]), tmp_path, "flux")
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "flux_pic_val_base/p200_i200_s00.yaml", "flux_pic_val_naft/p200_i200_s00.yaml",
    ]  # fmt: skip
    assert [path.read_bytes() for path in written] == [file.read_bytes() for file in files]


def test_ground_truth_both_ways(dataset, tmp_path):
    path = export_ground_truth(dataset, tmp_path / "gt.yaml", reward="pickscore")
    assert path.read_text().startswith("p0000:\n  id000: ")
    back = import_ground_truth(path)
    expected = dataset["base"].sel(reward="pickscore").isel(step=-1).transpose("prompt", "image").values
    assert back.dims == ("prompt", "image") and back.values.tobytes() == expected.tobytes()


def test_published_ground_truth(reference, tmp_path):
    path = reference / "ground_truth" / "imr_gt_flux_val_i88.yaml"
    values = import_ground_truth(path)
    assert values.shape == (200, 88)
    base = np.broadcast_to(values.values[None, :, :, None], (1, *values.shape, 1))
    dataset = make_rewards(base, rewards=["image_reward"])
    again = export_ground_truth(dataset, tmp_path / "gt.yaml")
    assert import_ground_truth(again).values.tobytes() == values.values.tobytes()
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "a mapping from prompts"),
        ("x0: {id000: 1.0}\n", "p and digits"),
        ("p0000: {image: 1.0}\n", "id and digits"),
        ("p0000: {id000: high}\n", "p0000, id000"),
        ("p0000: {id000: .nan}\n", "finite"),
        ("p0000: {id000: 1.0}\np0001: {id001: 1.0}\n", "images of prompt 1"),
        ("p0000: {id000: 1.0\n", "cannot be read"),
        ("p0000: !!python/object/apply:os.system ['true']\n", "cannot be read"),
    ],
)
def test_bad_ground_truth(content, message, tmp_path):
    (tmp_path / "gt.yaml").write_text(content)
    with pytest.raises(TensorError, match=message):
        import_ground_truth(tmp_path / "gt.yaml")


def test_what_cannot_be_exported(dataset, tmp_path):
    gap = dataset.copy(deep=True)
    gap["base"].values[1, 2, 3, 0] = np.nan
    with pytest.raises(TensorError, match="prompt 2, image 3"):
        export_published(gap, tmp_path, "flux", rewards=["image_reward"])
    with pytest.raises(TensorError, match="without gaps"):
        export_published(dataset.isel(step=[0, 2]), tmp_path, "flux")
    with pytest.raises(TensorError, match="one of"):
        export_published(dataset, tmp_path, "flux", rewards=["hpsv2"])
    with pytest.raises(TensorError, match="Name the reward"):
        export_ground_truth(dataset, tmp_path / "gt.yaml")


def test_export_command(dataset, tmp_path, capsys):
    from ttsnap_lib import save_rewards
    from ttsnap_lib.__main__ import main

    save_rewards(dataset, tmp_path / "r.zarr")
    assert main(["export", str(tmp_path / "r.zarr"), "--out", str(tmp_path / "values"), "--reward", "pickscore"]) == 0
    assert "6 files" in capsys.readouterr().out
    assert import_published(tmp_path / "values", "flux").sizes["reward"] == 1
    truth = ["export", str(tmp_path / "r.zarr"), "-o", str(tmp_path / "gt.yaml"), "--layout", "ground-truth"]
    assert main([*truth, "--reward", "image_reward"]) == 0
    assert main(truth) == 1
