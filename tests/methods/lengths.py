"""Lengths of the calibration text of these tests, in tokens."""

PROMPT, BLOCK, SINK = 16, 40, 4
