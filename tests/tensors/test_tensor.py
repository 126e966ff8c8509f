import numpy as np
import pytest
import xarray as xr

from ttsnap_lib import open_rewards, save_rewards, simulate
from ttsnap_lib.errors import ConfigError, DiskError, TensorError
from ttsnap_lib.tensors.tensor import (
    PROMPT_CHUNK,
    check_rewards,
    drop_missing,
    drop_repeats,
    make_rewards,
    noise_aware_steps,
    repeated_images,
    select_rewards,
    synthetic_rewards,
)


@pytest.fixture
def tensor():
    return synthetic_rewards(30, 8, 5, rewards=("a", "b"))


def test_round_trip_to_the_last_bit(tensor, tmp_path):
    tensor = tensor.assign_coords(prompt_text=("prompt", [f"ein Bild, {k} — Größe" for k in range(30)]))
    path = save_rewards(tensor, tmp_path / "t.zarr")
    opened = open_rewards(path)
    assert opened.identical(tensor)
    assert opened["base"].dtype == np.float32
    assert opened["base"].encoding["chunks"][1] == PROMPT_CHUNK
    assert not [entry for entry in tmp_path.iterdir() if entry.name != "t.zarr"]


def test_open_is_lazy(tensor, tmp_path):
    opened = open_rewards(save_rewards(tensor, tmp_path / "t.zarr"))
    assert not opened["base"]._in_memory
    resaved = save_rewards(opened.isel(prompt=slice(3, 7)), tmp_path / "part.zarr")
    assert open_rewards(resaved)["base"].equals(tensor["base"].isel(prompt=slice(3, 7)))


def test_save_refuses_a_taken_path(tensor, tmp_path):
    save_rewards(tensor, tmp_path / "t.zarr")
    with pytest.raises(TensorError, match="overwrite"):
        save_rewards(tensor, tmp_path / "t.zarr")
    save_rewards(tensor.isel(prompt=[0]), tmp_path / "t.zarr", overwrite=True)
    assert open_rewards(tmp_path / "t.zarr").sizes["prompt"] == 1


def test_a_full_disk_leaves_the_old_tensor(tensor, tmp_path, monkeypatch):
    save_rewards(tensor, tmp_path / "t.zarr")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_zarr", full)
    with pytest.raises(DiskError, match="disk full"):
        save_rewards(tensor, tmp_path / "t.zarr", overwrite=True)
    assert open_rewards(tmp_path / "t.zarr").identical(tensor)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.zarr"]


@pytest.mark.parametrize("damage", ["nowhere", "a file", "an empty folder", "format 2", "metadata cut off"])
def test_what_cannot_be_opened(tensor, tmp_path, damage):
    path = tmp_path / "t.zarr"
    if damage == "a file":
        path.write_text("x")
    elif damage == "an empty folder":
        path.mkdir()
    elif damage == "format 2":  # whose chunks can be pickles
        tensor.drop_vars(["noise_aware_source", "status"]).astype(float).to_zarr(path, zarr_format=2)
    elif damage == "metadata cut off":
        save_rewards(tensor, path)
        about = path / "base" / "zarr.json"
        about.write_text(about.read_text()[:100])
    with pytest.raises(TensorError, match="expected a Zarr folder|cannot be opened"):
        open_rewards(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensor: tensor.drop_vars("noise_aware"), "variable 'noise_aware'"),
        (lambda tensor: tensor.drop_vars(["base", "noise_aware", "status", "noise_aware_source"]), "variable 'base'"),
        (lambda tensor: tensor.assign(status=("image", ["scored"] * 8)), "variable 'status'"),
        (lambda tensor: tensor.drop_vars("image"), "coordinate 'image'"),
    ],
)
def test_not_a_tensor(tensor, change, named):
    with pytest.raises(TensorError, match=named):
        check_rewards(change(tensor))


@pytest.mark.parametrize(("lost", "told"), [(False, "base cannot be read"), (True, "missing")])  # no row of zeros
def test_a_damaged_or_lost_chunk_is_told(tensor, tmp_path, lost, told):
    path = save_rewards(tensor, tmp_path / "t.zarr")
    chunk = next(found for found in path.glob("base/c/**/*") if found.is_file())
    if lost:
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(TensorError, match=told):
        simulate(open_rewards(path), "best_of_n", n=3)


def test_without_noise_aware_rewards_they_are_copies():
    copied = make_rewards(np.zeros((1, 3, 4, 5)), rewards=["a"])
    assert set(copied["noise_aware_source"].values.ravel()) == {"copied_from_base"}
    assert noise_aware_steps(copied) == {"a": []}
    assert noise_aware_steps(copied.drop_vars("noise_aware_source")) == {"a": [0, 1, 2, 3, 4]}


def test_a_reward_that_the_tensor_lacks_is_named(tensor):
    assert select_rewards(tensor, ["b"])["reward"].values.tolist() == ["b"] and select_rewards(tensor, []) is tensor
    with pytest.raises(ConfigError, match="got 'bb', expected one of .*Did you mean 'b'"):
        select_rewards(tensor, ["bb"])


def test_repeats_are_found_and_dropped(tensor):
    repeated = tensor.isel(image=[0, 1, 0, 2, 1, 3]).assign_coords(image=np.arange(6))
    assert repeated_images(repeated).tolist() == [0, 1, 0, 3, 1, 5]
    assert drop_repeats(repeated)["image"].values.tolist() == [0, 1, 3, 5]
    assert drop_repeats(tensor).identical(tensor)


def test_drop_missing(tensor):
    tensor["base"][0, 4, 2, 1] = np.nan
    tensor["base"][:, 7] = np.nan
    cleaned = drop_missing(tensor)
    assert cleaned.sizes["prompt"] == 29 and 7 not in cleaned["prompt"].values
    assert cleaned["image"].values.tolist() == [0, 1, 3, 4, 5, 6, 7]
    with pytest.raises(TensorError, match="one or more"):
        drop_missing(tensor.assign(base=tensor["base"] * np.nan))
