"""torch.profiler over some steps: profile.steps=[10,12] writes RUN/profile/step10-12.json (Chrome, Perfetto)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longctx import console
from longctx.storage.files import replacing

if TYPE_CHECKING:
    from longctx.config.train import ProfileConfig
    from longctx.distributed.ranks import Ranks


class ProfileWindow:
    """Records steps [first, end) of the run, counted from 0, on rank 0."""

    def __init__(self, config: ProfileConfig, run: Path, ranks: Ranks) -> None:
        self._steps = tuple(config.steps) if config.steps is not None and ranks.first else None
        self._run, self._cuda = run, ranks.device.type == "cuda"
        self._active: Any = None

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self._cuda else []
            self._active = torch.profiler.profile(activities=kinds, record_shapes=True)
            self._active.__enter__()

    def after(self, done: int) -> None:
        """Stop at the end of the recorded steps; done: steps finished so far."""
        if self._steps is not None and done >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace so far, also where the run ends before the last recorded step."""
        if self._active is None or self._steps is None:
            return
        self._active.__exit__(None, None, None)
        path = self._run / "profile" / f"step{self._steps[0]}-{self._steps[1]}.json"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            self._active.export_chrome_trace(str(partial))
        self._active = None
        console.say(f"profile of steps {self._steps[0]} to {self._steps[1] - 1}: {path}")
