"""What a collective costs on a machine, measured or predicted, and which algorithm is therefore chosen."""
