"""The cost of collectives on a machine, measured or predicted, and the choice of an algorithm by it."""
