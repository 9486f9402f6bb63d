"""Pieces that the benchmarks share: the machine, shapes, contenders, timing, tables, plots."""
