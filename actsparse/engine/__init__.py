"""Running a plan: masked (exact, for quality over many positions) and sparse (weights really skipped, for speed)."""
