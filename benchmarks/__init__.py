"""The programs behind docs/measurements."""
