"""In: what a probe measured, as arrays or tables. Out: effects with their statistics, motifs, onsets, comparisons.

Data frames and arrays alone: nothing here reads or writes a file.
"""
