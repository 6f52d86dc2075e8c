"""What igm_rs costs beside its peers: `python -m benchmarks.run` measures, writes JSON, plots and the page."""
