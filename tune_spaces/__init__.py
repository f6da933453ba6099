"""Search spaces as functions: recipes of what may vary, no logic."""
