"""Model states sharded over groups of ranks: ZeRO and MiCS."""
