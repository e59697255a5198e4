"""The compiled way into a collective: the records that it reads, and its body."""
