"""The tensors, costs and budgets that the optimiser is measured on: the published data where they are, and the pocket ones."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import numpy as np
import xarray as xr

from tests.reference_data import reference_folder
from ttsnap_lib import CostModel, import_published, open_rewards

# The costs of the reference table: 2.85 TFLOPs a check, 0.48 with a tiny decoder.
FLUX = CostModel(step=21.5, verify=0.335, decode=2.515)
SDXL = CostModel(step=3.18, verify=0.335, decode=2.515)
SDXL_TINY = CostModel(step=3.18, verify=0.335, decode=0.145)
SDXL_TINY_CHECKS = CostModel(step=3.18, verify=0.335, decode=2.515, preview_decode=0.145)


@dataclass(frozen=True)
class TuningCase:
    """One row of the table: what is tuned, and the gain on held-out prompts that a random search reached.

    Parameters
    ----------
    name : str
    model, reward : str
        Of the published data; a pocket tensor has no reward here.
    cost : CostModel
    images : int
        The budgets are the price of 2, 3 ... this many Best-of-N images.
    wanted : float or None
        Percent.
    """

    name: str
    model: str
    reward: str
    cost: CostModel
    images: int
    wanted: float | None

    @property
    def budgets(self) -> np.ndarray:
        """The budgets, in the cost model's unit."""
        return np.arange(2, self.images + 1) * self.cost.total(1)

    def dataset(self) -> xr.Dataset | None:
        """Return the tensor, or None where the published data are not at hand."""
        return _dataset(self.model, self.reward)


@functools.lru_cache(maxsize=1)  # cases with the same tensor stand side by side
def _dataset(model: str, reward: str) -> xr.Dataset | None:
    if not reward:
        return open_rewards(model).load()
    folder = reference_folder()
    if folder is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the SDXL pool repeats itself
        return import_published(folder / "values", model, [reward], distinct=True)


CASES = (
    TuningCase("flux_imr", "flux", "image_reward", FLUX, 20, 24.4),
    TuningCase("flux_pic", "flux", "pickscore", FLUX, 20, 26.0),
    TuningCase("sdxl_pic, 56 distinct", "sdxl", "pickscore", SDXL, 14, 18.2),
    TuningCase("sdxl_pic, tiny VAE at every decode", "sdxl", "pickscore", SDXL_TINY, 14, 24.9),
    TuningCase(
        "sdxl_pic, tiny VAE at checks, the full one at the end", "sdxl", "pickscore", SDXL_TINY_CHECKS, 14, None
    ),
)
POCKET = (
    TuningCase("pocket-flux", "pocket-flux", "", CostModel.preset("pocket-flux-tiny+pocket-clip"), 20, None),
    TuningCase("pocket-sdxl", "pocket-sdxl", "", CostModel.preset("pocket-sdxl-tiny+pocket-clip"), 20, None),
)
