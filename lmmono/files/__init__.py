"""Files and processes: atomic writes, locks, signals, and where a result comes from."""
