"""Several conditions and seeds: a study file in; trained and probed runs, and one table of them, out."""
