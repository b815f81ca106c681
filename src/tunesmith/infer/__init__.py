"""From ids to ids, text on top: the engine."""
