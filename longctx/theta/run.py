"""`longctx theta`: print thetas by every rule and the lines for config.json, and draw wavelengths.

Without search=true it needs numpy alone and answers in a second or two; torch and transformers are not imported.
"""

from __future__ import annotations

from pathlib import Path

from longctx.assets import config_folder
from longctx.config.theta import ThetaConfig
from longctx.console import emit, emit_json, say, warn
from longctx.storage.model import remark_untrained
from longctx.theta.inputs import starting_rope, target_stages
from longctx.theta.show import document, paste_text, picture, rule_tables, stage_table
from longctx.theta.table import rows


def run(config: ThetaConfig) -> int:
    """Run the verb; returns the exit status. Raises UserError for settings that contradict each other."""
    rope = starting_rope(config)
    stages, chosen_by = target_stages(config, rope)
    if config.search:
        from longctx.theta.search import search

        return search(config, rope, stages)
    if config.model is not None and config.model.path:
        remark_untrained(config_folder(config.model.path), config.model.path)
    table = rows(stages, rope, chosen_by)
    if config.format == "json":
        emit_json(document(rope, table))
    else:
        note = rope.note()
        if note:
            emit(note + "\n")
        for part in (stage_table(table), *rule_tables(table)):
            emit(part)
            emit("")
        emit(paste_text(table))
    for row in table:
        for text in row.warnings:
            warn(text)
    if config.png is not None:
        picture(rope, table, Path(config.png))
        say(f"wavelengths drawn in {config.png}")
    return 0
