"""Config schema of `longctx report`."""

from __future__ import annotations

from longctx.config.base import Given, schema


@schema
class ReportConfig:
    """The root of configs/report.yaml."""

    run: Given  #: a run's folder; the page is written into it as report.html
