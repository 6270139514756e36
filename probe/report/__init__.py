"""In: probed runs (`probe.files.runs.ProbedRun`) or tables of effects. Out: text, figures and the page.

Nothing is measured or estimated here.
"""
