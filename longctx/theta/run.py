"""`longctx theta`: reads config.json and the curriculum, prints the table, the lines to paste, and a picture.

Without search=true neither torch nor transformers is imported: numpy alone answers, in a second or two.
"""

from __future__ import annotations

from pathlib import Path

from longctx.config.theta import ThetaConfig
from longctx.console import emit, emit_json, say, warn
from longctx.theta.inputs import starting_rope, target_stages
from longctx.theta.show import document, paste_text, picture, rule_table, stage_table
from longctx.theta.table import rows


def run(config: ThetaConfig) -> int:
    """The verb. Raises UserError for everything that cannot be."""
    rope = starting_rope(config)
    stages, chosen_by = target_stages(config, rope)
    if config.search:
        from longctx.theta.search import search

        return search(config, rope, stages)
    table = rows(stages, rope, chosen_by)
    if config.format == "json":
        emit_json(document(rope, table))
    else:
        note = rope.note()
        if note:
            emit(note + "\n")
        emit(stage_table(table))
        emit(rule_table(table))
        emit(paste_text(table))
    for row in table:
        for text in row.warnings:
            warn(text)
    if config.png is not None:
        picture(rope, table, Path(config.png))
        say(f"wavelengths drawn in {config.png}")
    return 0
