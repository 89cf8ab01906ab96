"""The command line. Heavy imports (torch, transformers, datasets, plotly) happen inside the commands only."""
