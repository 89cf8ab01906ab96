"""The verbs: each turns a spec into a run directory. Orchestration only; numbers come from core, methods, engine."""
