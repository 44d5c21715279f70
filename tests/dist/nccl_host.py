"""A rank that writes the host which NCCL would take it for to FOLDER/RANK."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    (Path(sys.argv[1]) / os.environ["RANK"]).write_text(os.environ.get("NCCL_HOSTID", ""))
