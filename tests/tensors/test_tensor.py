import numpy as np
import pandas as pd
import pytest
import xarray as xr

from ttsnap_lib import CostModel, open_rewards, save_rewards, simulate
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import ConfigError, DiskError, TensorError
from ttsnap_lib.tensors.tensor import (
    PROMPT_CHUNK,
    check_rewards,
    describe,
    drop_missing,
    drop_repeats,
    from_array,
    import_rewards,
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


def test_a_tensor_is_told_in_two_lines(tensor):
    def source(*rows):
        named = [["finetuned" if step in row else "copied_from_base" for step in range(5)] for row in rows]
        return describe(tensor.assign(noise_aware_source=(("reward", "step"), named)))

    assert source([0, 1, 2], [0, 1, 2]) == (
        "30 prompts x 8 images x 5 steps, rewards a, b\nNoise-aware scores exist for steps 0 to 2. "
        "At other checks TTSnap uses the base reward, so it equals TTSp there."
    )
    assert "for a: steps 0, 1 and 3; b: no step. " in source([0, 1, 3], [4])
    assert source([], [4]).endswith("There are no noise-aware scores: TTSnap equals TTSp here.")
    assert describe(tensor.isel(prompt=[0], reward=[0])).startswith("1 prompt x 8 images x 5 steps, reward a\n")


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


# A tensor of one's own


def long_table(scores, **more) -> pd.DataFrame:
    """Return scores (prompt, image, step) as a long table."""
    prompt, image, step = (axis.ravel() for axis in np.indices(scores.shape))
    return pd.DataFrame({"prompt": prompt, "image": image, "step": step, "reward": scores.ravel(), **more})


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def test_an_array_becomes_a_tensor_that_simulates(scores):
    made = from_array(scores, name="mine", steps=[0, 3, 6, 9, 19], prompts=["a", "b", "c", "more"], model="my-model")
    assert np.array_equal(made["base"].values[0], scores) and made["reward"].values.tolist() == ["mine"]
    assert made["step"].values.tolist() == [0, 3, 6, 9, 19] and made["prompt_text"].values.tolist() == ["a", "b", "c"]
    assert made.attrs["model"] == "my-model" and noise_aware_steps(made) == {"mine": []}
    named = xr.DataArray(scores.transpose(2, 0, 1), dims=("step", "prompt", "image"))
    assert np.array_equal(from_array(named)["base"].values[0], scores)
    cost = CostModel(step=1, verify=0, decode=0, n_steps=20)
    got = simulate(made, "best_of_n", budget=4 * cost.total(1), cost=cost, rng=0)
    assert np.allclose(got.mean, scores[..., -1].max(axis=1).mean(), atol=1e-6)


def test_several_rewards_and_noise_aware_scores_at_some_steps(scores):
    aware = np.full_like(scores, np.nan)
    aware[..., 1] = scores[..., 1] + 1
    made = from_array({"a": scores, "b": 2 * scores}, noise_aware={"b": aware})
    assert noise_aware_steps(made) == {"a": [], "b": [1]}
    expected = 2 * scores
    expected[..., 1] = aware[..., 1]
    assert np.array_equal(made["noise_aware"].values[1], expected)


def test_a_long_table_in_any_order_with_texts_or_indices(scores):
    aware = np.where(np.arange(5) == 2, scores, np.nan).ravel()
    table = long_table(scores, noise_aware=aware)
    shuffled = from_array(table.sample(frac=1, random_state=0), prompts=["a", "b", "c"])
    assert np.array_equal(shuffled["base"].values[0], scores) and noise_aware_steps(shuffled) == {"reward": [2]}
    texts = table.assign(prompt=table["prompt"].map(["z", "17", "a"].__getitem__), image=table["image"] + 4)
    made = from_array(texts)
    assert made["prompt_text"].values.tolist() == ["z", "17", "a"] and made["image"].values.tolist() == [4, 5, 6, 7]
    assert np.array_equal(made["base"].values[0], scores)


def test_a_masked_score_is_missing(scores):
    masked = np.ma.masked_array(scores, np.arange(scores.size).reshape(scores.shape) == 7)
    assert int(from_array(masked)["base"].isnull().sum()) == 1


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "spreadsheet", "tsv", "parquet", "categories"])
def test_a_file_of_scores_on_the_command_line(kind, scores, tmp_path, capsys):
    scores[1, 2, 3] = np.nan
    path = tmp_path / f"scores.{ {'categories': 'parquet', 'spreadsheet': 'csv'}.get(kind, kind) }"
    table = long_table(scores)
    if kind == "npy":
        np.save(path, scores)
    elif kind == "npz":
        np.savez(path, reward=scores)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "categories":
        table.assign(prompt=table["prompt"].map("abc".__getitem__).astype("category")).to_parquet(path)
    elif kind == "spreadsheet":  # where the comma is the decimal mark
        table.to_csv(path, sep=";", decimal=",", index=False)
    else:
        table.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    words = ["import", str(path), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "own.zarr")]
    assert main([*words, "--reward", "mine", "--model", "my-model"]) == 0
    said = capsys.readouterr().out
    assert "1 rewards x 3 prompts x 4 images x 5 steps" in said and "1 of 60 scores are missing" in said
    opened = open_rewards(tmp_path / "own.zarr")
    assert opened["base"].sel(reward="mine").values.tobytes() == scores.tobytes()
    assert opened["prompt_text"].values.tolist() == ["a", "b", "c"] and opened.attrs["model"] == "my-model"
    assert main(words) == 1 and "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop(index=7), "prompt 0, image 1, step 2: got 0 rows"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "prompt 0, image 0, step 0: got 2 rows"),
        (lambda t: t.rename(columns={"reward": "score"}), "Rename the column that is reward"),
        (lambda t: t.assign(step=t["step"] + 0.5), "step of row 0: got 0.5"),
        (lambda t: t.assign(image="id000"), "image of row 0: got 'id000'"),
        (lambda t: t.assign(reward="good"), "expected numbers"),
        (lambda t: t.assign(reward=np.inf), "expected finite numbers"),
        (lambda t: t.assign(prompt=None), "table: prompt"),
        (lambda t: t.iloc[:0], "no rows"),
    ],
)
def test_a_table_that_is_not_whole_is_refused(change, says, scores):
    with pytest.raises(TensorError, match=says):
        from_array(change(long_table(scores)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rewards": np.zeros((3, 4))}, r"got shape \(3, 4\)"),
        ({"rewards": [[["a"]]]}, "expected numbers"),
        ({"rewards": {}}, "one reward or more"),
        ({"rewards": {"a": np.zeros((3, 4, 5)), "b": np.zeros((3, 4, 6))}}, "all of one shape"),
        ({"noise_aware": np.zeros((3, 4, 2))}, "all of one shape"),
        ({"noise_aware": {"other": np.zeros((3, 4, 5))}}, "noise_aware: got 'other'"),
        ({"steps": [0, 1, 2]}, "steps: got 3"),
        ({"steps": [4, 3, 2, 1, 0]}, "increasing"),
        ({"prompts": ["a", "b"]}, "got 2 entries, expected 3"),
        ({"prompts": "abc"}, "expected 3 texts"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(given, says, scores):
    with pytest.raises(TensorError, match=says):
        from_array(**{"rewards": scores, **given})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("s.npy", b"no", "cannot be read as npy"),
        ("s.csv", b"prompt,image,step,reward\n0,0,0,1,9\n", "cannot be read as csv"),
        ("s.csv", b"a;b\n", "Rename the column that is prompt"),
        ("s.xlsx", b"", "ending of the scores"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_a_file_of_scores_that_cannot_be_read_is_refused(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TensorError, match=says):
        import_rewards(tmp_path / name)
