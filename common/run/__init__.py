"""How a stage runs, whatever its studies are."""
