import json

import numpy as np
import pytest
import yaml

from ttsnap_lib import import_published
from ttsnap_lib.errors import TensorError
from ttsnap_lib.tensors.published import find_published, read_values
from ttsnap_lib.tensors.tensor import RepeatedImagesWarning, drop_repeats


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
        ("0: [1.0, 2.0]\n1: [1.0]\n", "prompt 1"),
        ("0: [1.0, 2.0]\n2: [1.0, 2.0]\n", "prompt 1 is missing"),
        ("0: [1.0, .nan]\n1: [1.0, 2.0]\n", "prompt 0, image 1"),
        ("0: [1.0, .inf]\n", "prompt 0, image 1"),
        ("0: [1.0, x]\n", "prompt 0, image 1"),
        ("0: [1.0, true]\n", "prompt 0, image 1"),
        ("0: [1.0, [2.0]]\n", "prompt 0, image 1"),
        ("0: 3\n", "prompt 0"),
        ("0: []\n", "prompt 0"),
        ("- 1\n", "content"),
        ("", "content"),
        ("0: [1.0, 2.0\n", "cannot be read"),
        ("0:\n- 1.0\n- 2.0\n1:\n- 1.0\n- 2.", "prompt 1"),
        ("0: !!python/object/apply:os.system ['true']\n", "cannot be read"),
        ("a: &a [1.0, 1.0]\n0: [*a, *a]\n", "prompt"),
    ],
)
def test_bad_files_name_file_prompt_and_remedy(tmp_path, text, named):
    path = tmp_path / "p2_i2_s00.yaml"
    if text.endswith("2."):  # a cut that still parses: the value is wrong only by its length, so cut a whole line
        text = text.rsplit("\n", 1)[0] + "\n"
    path.write_text(text)
    with pytest.raises(TensorError, match="Fetch the file again") as caught:
        read_values(path)
    assert str(path) in str(caught.value) and named in str(caught.value)


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
