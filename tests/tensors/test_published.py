"""The authors' layouts, both ways, to the last bit."""

import json

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT
from ttsnap_lib import import_published, open_rewards, save_rewards
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import TensorError
from ttsnap_lib.tensors.published import (
    export_ground_truth,
    export_published,
    find_published,
    import_ground_truth,
    published_tensor,
    read_values,
)
from ttsnap_lib.tensors.tensor import RepeatedImagesWarning, drop_repeats, make_rewards


def write(folder, values, step):
    folder.mkdir(parents=True, exist_ok=True)
    content = {p: [float(x) for x in row] for p, row in enumerate(values)}
    (folder / f"p{len(values)}_i{values.shape[1]}_s{step:02d}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture
def published(tmp_path):
    rng = np.random.default_rng(1)
    base = rng.standard_normal((3, 4, 2)).astype(np.float32)
    aware = rng.standard_normal((3, 4)).astype(np.float32)
    for step in range(2):
        write(tmp_path / "flux_imr_val_base", base[:, :, step], step)
        write(tmp_path / "flux_pick_val_base", base[:, :, step] + 1, step)
    write(tmp_path / "flux_imr_val_naft", aware, 0)
    return tmp_path, base, aware


def test_import_to_the_last_bit(published, tmp_path):
    folder, base, aware = published
    (tmp_path / "prompts.json").write_text(json.dumps(["a", "b", "c", "d"]))
    seen = []
    dataset = import_published(
        folder, "flux", ["image_reward"], prompts=tmp_path / "prompts.json", progress=lambda *n: seen.append(n)
    )
    assert np.array_equal(dataset["base"].values[0], base)
    assert np.array_equal(dataset["noise_aware"].values[0, :, :, 0], aware)
    assert np.array_equal(dataset["noise_aware"].values[0, :, :, 1], base[:, :, 1])
    assert dataset["noise_aware_source"].values.tolist() == [["finetuned", "copied_from_base"]]
    assert dataset["prompt_text"].values.tolist() == ["a", "b", "c"]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_all_rewards_and_both_short_names(published):
    assert find_published(published[0]) == {"flux": ["image_reward", "pickscore"]}
    assert import_published(published[0], "flux")["reward"].values.tolist() == ["image_reward", "pickscore"]


def test_missing_folder_and_step(published):
    folder, *_ = published
    with pytest.raises(TensorError, match="sdxl"):
        import_published(folder, "sdxl")
    with pytest.raises(TensorError, match="hpsv2"):
        import_published(folder, "flux", ["hpsv2"])
    (folder / "flux_pick_val_base" / "p3_i4_s00.yaml").unlink()
    with pytest.raises(TensorError, match="published steps"):
        import_published(folder, "flux")


def test_repeats_warn_and_drop(published):
    folder, base, _ = published
    for step in range(2):
        write(folder / "sdxl_imr_val_base", base[:, [0, 1, 0, 1]][:, :, step], step)
    with pytest.warns(RepeatedImagesWarning, match="2 distinct trajectories of 4"):
        import_published(folder, "sdxl")
    assert import_published(folder, "sdxl", distinct=True)["image"].values.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("0: [1.0, true]\n", "prompt 0, image 1"),
        ("0: 3\n", "prompt 0"),
        ("0: []\n", "prompt 0"),
        ("- 1\n", "content"),
        ("p0000: [1.0]\nq1: [1.0]\n", "got 'q1'"),
        ("0: [1.0]\np0001: [1.0]\n", "got 0"),
        ("", "content"),
        ("0:\n- 1.0\n- 2.0\n1:\n- 1.0\n", "prompt 1"),  # cut off between two lines
        ("0: !!python/object/apply:os.system ['true']\n", "cannot be read"),
    ],
)
def test_bad_files_name_file_prompt_and_remedy(tmp_path, text, named):
    path = tmp_path / "p2_i2_s00.yaml"
    path.write_text(text)
    with pytest.raises(TensorError, match="Fetch the file again") as caught:
        read_values(path)
    assert str(path) in str(caught.value) and named in str(caught.value)


def test_keys_as_in_the_folders_of_pictures():
    dataset = import_published(ROOT / "tests" / "cases" / "published", "flux")
    assert dataset["base"].shape == (1, 4, 5, 4)
    assert dataset["base"].values[0, 1, 0, 0] == np.float32(-0.476376747401162)


def test_another_shape_is_named(published):
    folder, base, _ = published
    write(folder / "flux_pick_val_base", base[:2, :, 1], 1)
    (folder / "flux_pick_val_base" / "p3_i4_s01.yaml").unlink()
    with pytest.raises(TensorError, match="shape of .*p2_i4_s01"):
        import_published(folder, "flux")


def test_reference_pools(reference, pools):
    sdxl = pools["sdxl"]
    assert sdxl["noise_aware_source"].values[0].tolist().count("finetuned") == 12
    assert drop_repeats(sdxl)["image"].values.tolist() == [*range(32), *range(128, 144), *range(192, 200)]
    one = read_values(reference / "values" / "sdxl_pic_val_naft" / "p200_i200_s07.yaml")
    assert np.array_equal(sdxl["noise_aware"].values[0, :, :, 7], one)


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
        ("- 1\n", "a mapping from p "),
        ("p0000: {image: 1.0}\n", "id and digits"),
        ("p0000: {id000: high}\n", "p0000, id 0"),
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
    save_rewards(dataset, tmp_path / "r.zarr")
    assert main(["export", str(tmp_path / "r.zarr"), "--out", str(tmp_path / "values"), "--reward", "pickscore"]) == 0
    assert "6 files" in capsys.readouterr().out
    assert import_published(tmp_path / "values", "flux").sizes["reward"] == 1
    own = dataset.assign_coords(reward=["image_reward", "my-own"])
    save_rewards(own, tmp_path / "own.zarr")
    assert main(["export", str(tmp_path / "own.zarr"), "--out", str(tmp_path / "own"), "--model", "mine"]) == 0
    words = capsys.readouterr().out.split("next: ttsnap ")[1].split()  # what it says to do next works
    assert main([*words, "--out", str(tmp_path / "back.zarr")]) == 0
    assert open_rewards(tmp_path / "back.zarr")["reward"].values.tolist() == ["image_reward", "my-own"]
    truth = ["export", str(tmp_path / "r.zarr"), "-o", str(tmp_path / "gt.yaml"), "--layout", "ground-truth"]
    assert main([*truth, "--reward", "image_reward"]) == 0
    assert main(truth) == 1


def test_a_published_folder_becomes_a_tensor_in_the_data_cache(published, tmp_path, monkeypatch):
    folder, base, _ = published
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))
    path, rewards = published_tensor(folder)
    assert path == tmp_path / "cache" / "published" / "flux.zarr" and rewards == ["image_reward", "pickscore"]
    np.testing.assert_array_equal(open_rewards(path)["base"].sel(reward="image_reward").values, base)
    write(folder / "flux_imr_val_base", base[:, :, 0] + 2, 0)  # values that changed are not taken from before
    published_tensor(folder, "flux")
    assert open_rewards(path)["base"].values[0, 0, 0, 0] == base[0, 0, 0] + 2
    with pytest.raises(TensorError, match="flux_imr_val_base"):
        published_tensor(tmp_path / "cache")
