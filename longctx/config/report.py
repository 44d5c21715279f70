"""What `longctx report` may be told."""

from __future__ import annotations

from longctx.config.base import Text, schema


@schema
class ReportConfig:
    """run: a run's folder; the page is written into it as report.html."""

    run: Text
