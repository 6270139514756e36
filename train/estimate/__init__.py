"""In: a configured run, and the hardware it is meant for. Out: its parameters, FLOPs, memory, tokens and hours, before
it is run; as numbers (`cost.estimate_cost`), as a table or as JSON (`table`)."""
