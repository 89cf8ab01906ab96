"""One decode step of a tier-1 family: its weights, its buffers, its plans, and what it computes, in torch."""
