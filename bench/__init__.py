"""Benchmarks: suites (what runs), peers (against whom), roofline (the limit), report (tables and plots).

`fastvit-kernels bench` runs them, `fastvit-kernels bench report` shows what a run has written.
"""
