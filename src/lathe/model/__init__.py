"""The one transformer: training, cached generation, adapters and quantised weights all run these modules."""
