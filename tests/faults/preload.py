"""What the fork server of the drill imports once, so that a command begins to work as soon as it is started."""

import papermill  # noqa: F401
