"""What the fork server of the drill imports once, so that a command begins to work as soon as it is started."""

import papermill  # noqa: F401

import ttsnap_lib.curriculum
import ttsnap_lib.generate
import ttsnap_lib.report
import ttsnap_lib.score
import ttsnap_lib.search_many
import ttsnap_lib.sweeps  # noqa: F401
